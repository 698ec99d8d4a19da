"""From what annotations say to what can be learnt from: a look at every image, and a finding for all that is amiss."""

import os
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from itertools import chain
from pathlib import Path
from stat import S_ISREG
from typing import Final

from PIL import Image

from onestage.data import images
from onestage.data.formats import findings as kinds
from onestage.data.formats.record import Annotated, Annotation, Box, Finding, Labelled, Record, Source
from onestage.data.images import Header
from onestage.data.threads import in_threads
from onestage.errors import InputError

TOLERANCE_PX: Final = 1.0
"""How far a box may leave its image without a finding: VOC's corners count from 1, and some tools' from 0."""
RELATIVE_TOLERANCE: Final = 1e-3
"""The same for boxes in shares of the image, which are rounded."""
SAME_PX: Final = 0.5
"""Boxes of one class whose corners are this close are one box drawn twice."""
TAIL_BYTES: Final = 4096
END: Final = {b"\xff\xd8": b"\xff\xd9", b"\x89P": b"IEND\xaeB`\x82"}
"""What a whole file ends with, by its first two bytes: JPEG's end marker, PNG's last chunk."""
NUM_THREADS: Final = 8
IMAGES_PER_TASK: Final = 64


def clean(labelled: Labelled, *, progress: Callable[[int, int], None] | None = None) -> Source:
    """Look at every image's first and last bytes, and mend what can be mended.

    Boxes become pixels of the upright picture, on it and with area. What is amiss is a finding; ``findings.REMEDY``
    says what is done about each kind. An ``InputError`` where no image is left.
    """
    classes = _classes_of(labelled) if labelled.classes is None else labelled.classes
    mender = _Mender(classes, list(labelled.findings))
    num_images = sum(len(members) for members in labelled.splits.values())
    paths = [image.path for image in chain.from_iterable(labelled.splits.values())]
    # On a network's disk, opening is all waiting.
    looks = in_threads(_look, paths, num_threads=NUM_THREADS, items_per_task=IMAGES_PER_TASK)
    splits: dict[str, list[Record]] = {split: [] for split in labelled.splits}
    members = ((split, image) for split, images_of_it in labelled.splits.items() for image in images_of_it)
    for done, ((split, image), look) in enumerate(zip(members, looks, strict=True), start=1):
        if isinstance(look, Header):
            splits[split].append(mender.record(image, look))
        else:
            kind, what = look
            mender.findings.append(Finding(kind, image.source, what))
        if progress is not None:
            progress(done, num_images)
    mender.name_unknown_classes()
    mender.findings += _shared(labelled.splits)
    for split in [split for split, records in splits.items() if not records]:
        mender.findings.append(Finding(kinds.MISSING_SPLIT, labelled.name, f"{split}: no image is left in it"))
        del splits[split]
    if not splits:
        raise InputError(f"{labelled.name} has no image that can be used ({_counted(mender.findings)})")
    return Source(name=labelled.name, classes=classes, splits=splits, findings=mender.findings)


def _classes_of(labelled: Labelled) -> tuple[str, ...]:
    found = {
        annotation.name for members in labelled.splits.values() for image in members for annotation in image.annotations
    }
    return tuple(sorted(found))


def _shared(splits: dict[str, list[Annotated]]) -> Iterator[Finding]:
    """Images that are in two splits."""
    first: dict[Path, str] = {}
    for split, members in splits.items():
        for image in members:
            if first.setdefault(image.path, split) != split:
                yield Finding(kinds.IN_TWO_SPLITS, image.source, f"{first[image.path]} and {split}")


def _counted(findings: list[Finding]) -> str:
    """Such as "2 x image cut short, for example a.jpg"."""
    places: dict[str, list[str]] = defaultdict(list)
    for finding in findings:
        places[finding.kind].append(finding.where)
    listed = (f"{len(where):,} x {kind}, such as {where[0]}" for kind, where in places.items())
    return "; ".join(listed) or "it lists none"


def _look(path: Path) -> Header | tuple[str, str]:
    """The header of an image that is whole, or the kind of fault and what it is."""
    try:
        is_whole = _is_whole(path)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return kinds.UNREADABLE_IMAGE, getattr(error, "strerror", None) or str(error)
    if not is_whole:
        return kinds.CUT_SHORT, "its end is missing"
    try:
        return images.header(path)
    except InputError:
        return kinds.UNREADABLE_IMAGE, "its header is broken"


def _is_whole(path: Path) -> bool:
    """Whether an image ends as its format does; ``ValueError`` where it is none."""
    if not S_ISREG(path.stat().st_mode):  # to open a pipe would wait for ever
        raise ValueError("it is no file")
    with path.open("rb") as file:
        end = END.get(file.read(2))
        if end is None:
            raise ValueError("it is no JPEG or PNG")
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
        if end in file.read():
            return True
        # Phones write more behind the end. In a JPEG, all that is found may be a thumbnail's: decoding tells.
        file.seek(0)
        if end not in file.read():
            return False
        file.seek(0)
        try:
            with Image.open(file, formats=("JPEG", "PNG")) as image:
                image.load()
        except OSError:
            return False
    return True


class _Mender:
    """Makes records of annotated images, and collects what it found."""

    def __init__(self, classes: tuple[str, ...], findings: list[Finding]) -> None:
        self.labels = {name: label for label, name in enumerate(classes)}
        self.findings = findings
        self.unknown: dict[str, list[str]] = defaultdict(list)

    def record(self, image: Annotated, header: Header) -> Record:
        """The record of one image, with the boxes that can be learnt from."""
        is_turned = self._note_header(image, header)
        kept: list[tuple[Box, Annotation]] = []
        drawn = Drawn()
        for annotation in image.annotations:
            if annotation.name not in self.labels:
                self.unknown[annotation.name].append(image.where)
                continue
            box = self._mend(annotation, image, header, is_turned=is_turned)
            if box is None:
                continue
            if drawn.has((annotation.name, annotation.crowd), box):
                self.findings.append(Finding(kinds.TWICE, image.where, _say(annotation, box, header)))
                continue
            kept.append((box, annotation))
        width, height = header.upright
        return Record(
            path=image.path,
            width=width,
            height=height,
            boxes=[box for box, _ in kept],
            labels=[self.labels[annotation.name] for _, annotation in kept],
            difficult=[annotation.difficult for _, annotation in kept],
            crowd=[annotation.crowd for _, annotation in kept],
            source=image.source,
            orientation=header.orientation,
        )

    def name_unknown_classes(self) -> None:
        """One finding for each, not one for each of its boxes, which ``--classes`` may leave out by the thousand."""
        for name, places in sorted(self.unknown.items()):
            self.findings.append(Finding(kinds.UNKNOWN_CLASS, places[0], f"{name}: {len(places):,} boxes in the set"))

    def _note_header(self, image: Annotated, header: Header) -> bool:
        """Whether boxes were drawn on the picture as it is stored, before EXIF turns it."""
        stored, declared = (header.width, header.height), image.declared_size
        if declared not in (None, stored, header.upright):
            what = f"{declared[0]}x{declared[1]} declared, {header.upright[0]}x{header.upright[1]} found"
            self.findings.append(Finding(kinds.SIZE_DIFFERS, image.where, what))
        is_turned = declared == stored != header.upright
        if header.orientation != 1:
            how = "turned with it, as drawn before the turn" if is_turned else "taken as drawn on the upright picture"
            what = f"orientation {header.orientation}, boxes {how}"
            self.findings.append(Finding(kinds.ROTATED, image.where, what))
        if header.mode != "RGB":
            self.findings.append(Finding(kinds.NOT_RGB, image.source, f"mode {header.mode}"))
        return is_turned

    def _mend(self, annotation: Annotation, image: Annotated, header: Header, *, is_turned: bool) -> Box | None:
        """The box on the upright picture; None, and a finding, where nothing is left of it."""
        width, height = header.upright
        box = annotation.box
        tolerances = (TOLERANCE_PX, TOLERANCE_PX)
        if image.relative:
            box = (box[0] * width, box[1] * height, box[2] * width, box[3] * height)
            tolerances = (RELATIVE_TOLERANCE * width, RELATIVE_TOLERANCE * height)
        if is_turned:
            box = turned(box, header)
        if box[2] <= box[0] or box[3] <= box[1]:
            self.findings.append(Finding(kinds.NO_AREA, image.where, _say(annotation, box, header)))
            return None
        on_it = part_inside(box, width=width, height=height)
        if on_it is None:
            self.findings.append(Finding(kinds.OUTSIDE, image.where, _say(annotation, box, header)))
            return None
        if any(abs(box[side] - on_it[side]) > tolerances[side % 2] for side in range(4)):
            self.findings.append(Finding(kinds.CLIPPED, image.where, _say(annotation, box, header)))
        return on_it


def part_inside(box: Box, *, width: int, height: int) -> Box | None:
    """The part of a box that lies on the picture, if there is one.

    >>> part_inside((-5, 10, 20, 90), width=100, height=80), part_inside((100, 0, 120, 9), width=100, height=80)
    ((0.0, 10, 20, 80.0), None)
    """
    left, top, right, bottom = box
    inside = (max(left, 0.0), max(top, 0.0), min(right, float(width)), min(bottom, float(height)))
    return None if inside[2] <= inside[0] or inside[3] <= inside[1] else inside


def turned(box: Box, header: Header) -> Box:
    """A box of the stored picture on the upright one: the same turn as ``images.upright`` gives the pixels.

    >>> turned((0, 0, 10, 5), Header(width=100, height=80, orientation=6, mode="RGB"))  # a quarter to the right
    (75, 0, 80, 10)
    """
    width, height = header.upright
    left, top, right, bottom = box
    if header.orientation >= 5:
        left, top, right, bottom = top, left, bottom, right
    if header.orientation in (2, 3, 6, 7):
        left, right = width - right, width - left
    if header.orientation in (3, 4, 7, 8):
        top, bottom = height - bottom, height - top
    return left, top, right, bottom


def _say(annotation: Annotation, box: Box, header: Header) -> str:
    left, top, right, bottom = box
    width, height = header.upright
    return f"{annotation.name} from {left:g}, {top:g} to {right:g}, {bottom:g} in an image of {width}x{height}"


class Drawn:
    """The boxes of one image so far, by kind and place, so that an image with thousands takes no time."""

    def __init__(self) -> None:
        self.boxes: dict[tuple[Hashable, int, int], list[Box]] = defaultdict(list)

    def has(self, kind: Hashable, box: Box) -> bool:
        """Whether a box of this kind was there already; if not, it is from now on."""
        x, y = int(box[0]), int(box[1])
        near = ((kind, x + dx, y + dy) for dx in (-1, 0, 1) for dy in (-1, 0, 1))
        for place in near:
            if any(is_near(box, other) for other in self.boxes.get(place, ())):
                return True
        self.boxes[kind, x, y].append(box)
        return False


def is_near(box: Box, other: Box, *, within_px: float = SAME_PX) -> bool:
    """Whether no side is further off than ``within_px``."""
    return all(abs(a - b) <= within_px for a, b in zip(box, other, strict=True))
