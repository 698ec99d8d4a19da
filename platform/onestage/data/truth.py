"""The json of a sample, read in one place: whoever trains, checks, exports or counts takes and refuses the same."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from operator import index
from typing import Any

from onestage.data.faults import Unreadable
from onestage.data.formats.record import Box


class BadTruth(ValueError):
    """A sample's json is of no use. It ends "the sample has ..."; ``source`` is its original file, as far as known."""

    def __init__(self, what: str, *, source: str | None) -> None:
        super().__init__(what)
        self.source = source


@dataclass(frozen=True, slots=True)
class Truth:
    """What is known of one image; the four lists have one entry per box, in pixels of the upright picture.

    ``width`` and ``height`` are that picture's, None where they are not said: who decodes it sees them.
    """

    image_id: int
    source: str
    width: int | None
    height: int | None
    orientation: int
    boxes: list[Box]
    labels: list[int]
    difficult: list[bool]
    crowd: list[bool]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height; ``BadTruth`` where they are not said."""
        if self.width is None or self.height is None:
            raise BadTruth("no annotation that can be read (no width and height)", source=self.source)
        return self.width, self.height

    @classmethod
    def parse(cls, content: bytes, *, num_classes: int) -> "Truth":
        """The truth that a shard's json member holds; ``BadTruth`` says why it can't be used."""
        source = None
        try:
            fields = json.loads(content)
            source = str(fields["source"])
            truth = cls(
                image_id=int(fields["image_id"]),
                source=source,
                width=None if "width" not in fields else int(fields["width"]),
                height=None if "height" not in fields else int(fields["height"]),
                orientation=int(fields.get("orientation", 1)),
                boxes=[_box(*sides) for sides in fields["boxes"]],
                labels=[index(label) for label in fields["labels"]],
                difficult=[bool(index(mark)) for mark in fields["difficult"]],
                crowd=[bool(index(mark)) for mark in fields["crowd"]],
            )
            if not len(truth.difficult) == len(truth.crowd) == len(truth.boxes):
                marks = f"{len(truth.difficult)} and {len(truth.crowd)} marks of difficult and crowd"
                raise ValueError(f"{len(truth.boxes)} boxes but {marks}")
            if truth.orientation not in range(1, 9):
                raise ValueError(f"orientation {truth.orientation} is none of EXIF's")
        except KeyError as error:
            raise BadTruth(f"no annotation that can be read (no field {error})", source=source) from error
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise BadTruth(f"no annotation that can be read ({error})", source=source) from error
        if len(truth.boxes) != len(truth.labels):
            raise BadTruth(f"{len(truth.boxes)} boxes but {len(truth.labels)} labels", source=source)
        if wrong := [label for label in truth.labels if not 0 <= label < num_classes]:
            raise BadTruth(f"label {wrong[0]} where labels run from 0 to {num_classes - 1}", source=source)
        return truth


def truth_of(sample: Mapping[str, Any], *, num_classes: int, sized: bool = False) -> Truth:
    """The truth of a shard's sample, with a ``size`` where asked for; ``Unreadable`` names the sample that has none."""
    try:
        truth = Truth.parse(sample.get("json", b""), num_classes=num_classes)
        if sized:
            _ = truth.size
    except BadTruth as error:
        raise Unreadable(f"{named(sample, error.source)} has {error}: make the dataset again") from error
    return truth


def named(sample: Mapping[str, Any], source: str | None) -> str:
    """A sample of a shard for people, with its original file where that is known."""
    where = f"sample {sample['__key__']} in {sample.get('__url__')}"
    return where if source is None else f"{where} (from {source})"


def _box(left: float, top: float, right: float, bottom: float) -> Box:
    box = left, top, right, bottom
    if not all(map(math.isfinite, box)):  # also refuses what is no number at all
        raise ValueError(f"a box with the corners {', '.join(map(str, box))}")
    return float(left), float(top), float(right), float(bottom)
