"""What is wrong with a set, or would make a training worse than it need be: one finding for each thing.

Reading a set already finds what an import has to mend or leave out. Here every image is decoded and hashed as well, and
the boxes are looked at together: which classes are rare, and what is too small to be seen.
"""

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple

from PIL import Image

from onestage.data import images
from onestage.data.contents import BROKEN_SAMPLE, BROKEN_SHARD, CHANGED_SHARD, Contents, Entry, Progress
from onestage.data.formats import findings as kinds
from onestage.data.formats.record import Finding
from onestage.data.statistics import Statistics, smallest_side
from onestage.data.threads import in_threads, num_cores
from onestage.errors import InputError

DAMAGED: Final = "image damaged inside"
"""JPEG has no checksum: of 40 spoilt bytes in a row the decoder stumbles in 19 of 20 files, of 512 in all."""
TWICE_IN_SPLIT: Final = "image twice in a split"
SMALL_IMAGE: Final = "very small image"
SMALL_BOX: Final = "box too small for the input"
RARE_CLASS: Final = "rare class"
NO_BOXES: Final = "class without a box"
NOT_IN_SPLIT: Final = "class missing from a split"
EMPTY_SPLIT: Final = "split without boxes"

RARE_SHARE: Final = 1 / 20
"""A class is rare if the split to learn from has fewer boxes of it than this share of the most frequent class's."""
SMALL_IMAGE_PX: Final = 32
"""The coarsest stride of nearly every detector: an image with a shorter side is less than one cell of that map."""

OWN_REMEDY: Final = {
    TWICE_IN_SPLIT: "kept, and counts twice: take one away",
    SMALL_IMAGE: "kept, and enlarged to the input",
    SMALL_BOX: "kept, though hard to find: choose a larger input, finer strides, or cut the images into tiles",
    RARE_CLASS: "kept: add images of it, and expect a low and unsteady score",
    NO_BOXES: "kept as a class that is never found: add boxes of it or take it out of the classes",
    NOT_IN_SPLIT: "kept: it can't be learnt in train nor judged in the others; split anew",
    EMPTY_SPLIT: "kept: nothing can be learnt or judged there; annotate it, or leave it out",
}
IMPORT_REMEDY: Final = {
    **kinds.REMEDY,
    **OWN_REMEDY,
    DAMAGED: "packed, as only decoding shows it, but training skips and counts it: replace the image",
}
TRAINING_REMEDY: Final = {
    **kinds.REMEDY,
    **OWN_REMEDY,
    BROKEN_SHARD: "training skips and counts its images: copy the dataset again, or import it again",
    CHANGED_SHARD: "read as it is by who read it before it changed, skipped by others: copy the dataset again",
    BROKEN_SAMPLE: "training skips and counts it: import the set again",
    DAMAGED: "training skips and counts it: replace the image and import the set again",
    kinds.NO_AREA: "left as it is: import the set again, which leaves it out",
    kinds.OUTSIDE: "left as it is: import the set again, which leaves it out",
    kinds.CLIPPED: "left as it is: import the set again, which clips it to the image",
    kinds.TWICE: "learnt twice: import the set again, which keeps it once",
    kinds.SIZE_DIFFERS: "its boxes are taken as pixels of the image as it is: import the set again",
    kinds.ROTATED: "turned upright when it is decoded, as its boxes are",
    kinds.NOT_RGB: "decoded to RGB",
}


@dataclass(frozen=True, slots=True)
class Group:
    """All findings of one ``kind``, and what is done about them."""

    kind: str
    remedy: str
    findings: list[Finding]


class _Look(NamedTuple):
    """What decoding an image told; ``sha256`` is None where its bytes could not be had."""

    sha256: str | None
    findings: list[Finding]


def check(
    contents: Contents,
    statistics: Statistics,
    *,
    input_size: Sequence[int],
    strides: Sequence[int],
    progress: Progress | None = None,
) -> list[Group]:
    """Everything that was found in ``contents``, by kind, with ``statistics`` that are its own.

    Boxes are judged at ``input_size`` [H, W] with the finest of ``strides``.
    """
    findings = list(contents.findings)
    looks = _look_at_all(contents, progress)
    for look in looks:
        findings += look.findings
    findings += _copies(contents, looks)
    findings += _classes(statistics)
    findings += _small(contents, statistics, input_size=input_size, strides=strides)
    return grouped(findings, packed=contents.packed)


def grouped(findings: Sequence[Finding], *, packed: bool) -> list[Group]:
    """The findings by kind, in the order in which kinds came up."""
    remedies = TRAINING_REMEDY if packed else IMPORT_REMEDY
    groups: dict[str, Group] = {}
    for finding in findings:
        group = groups.setdefault(finding.kind, Group(finding.kind, remedies[finding.kind], []))
        group.findings.append(finding)
    return list(groups.values())


def _look_at_all(contents: Contents, progress: Progress | None) -> list[_Look]:
    entries = contents.entries()
    looks: list[_Look] = []
    for look in in_threads(partial(_look_at, packed=contents.packed), entries, num_threads=num_cores()):
        looks.append(look)
        if progress is not None:
            progress(len(looks), len(entries))
    return looks


def _look_at(entry: Entry, *, packed: bool) -> _Look:
    """Decode the whole image, as training does; for a packed one, say what reading labelled files tells of theirs."""
    try:
        content = entry.content()
    except (InputError, OSError) as error:
        return _Look(None, [Finding(kinds.UNREADABLE_IMAGE, entry.where, str(error))])
    pixels = images.decode(content, orientation=entry.orientation)
    findings = []
    if pixels is None:
        findings.append(Finding(DAMAGED, entry.where, f"{len(content):,} bytes that can't be decoded to their end"))
    elif (size := (pixels.shape[1], pixels.shape[0])) != (entry.width, entry.height):
        what = f"the image is {size[0]}x{size[1]}, its annotation for {entry.width}x{entry.height}"
        findings.append(Finding(kinds.SIZE_DIFFERS, entry.where, what))
    if packed and pixels is not None:
        if entry.orientation != 1:
            findings.append(Finding(kinds.ROTATED, entry.where, f"orientation {entry.orientation}"))
        with Image.open(io.BytesIO(content), formats=("JPEG", "PNG")) as image:
            if image.mode != "RGB":
                findings.append(Finding(kinds.NOT_RGB, entry.where, f"mode {image.mode}"))
    return _Look(hashlib.sha256(content).hexdigest(), findings)


def _copies(contents: Contents, looks: Sequence[_Look]) -> Iterator[Finding]:
    """Images of the same bytes: in two splits, or twice in one."""
    same: dict[str, list[Entry]] = {}
    for entry, look in zip(contents.entries(), looks, strict=True):
        if look.sha256 is not None:
            same.setdefault(look.sha256, []).append(entry)
    for entries in same.values():
        by_split: dict[str, list[Entry]] = {}
        for entry in entries:
            by_split.setdefault(entry.split, []).append(entry)
        for split, members in by_split.items():
            for copy in members[1:]:
                yield Finding(TWICE_IN_SPLIT, copy.where, f"the same bytes as {members[0].where}, both in {split}")
        first, *others = [members[0] for members in by_split.values()]
        # One file that is listed in both was told when the lists were read.
        if any(other.where != first.where for other in others):
            places = " and ".join(f"{other.where} in {other.split}" for other in others)
            yield Finding(kinds.IN_TWO_SPLITS, first.where, f"in {first.split}; the same bytes as {places}")


def _classes(statistics: Statistics) -> Iterator[Finding]:
    """Classes that are rare or not there."""
    total = statistics.total().by_class
    for name, count in zip(statistics.classes, total.tolist(), strict=True):
        if not count:
            yield Finding(NO_BOXES, name, "in no split")
    for split, split_count in statistics.splits.items():
        if not split_count.boxes:
            yield Finding(EMPTY_SPLIT, split, f"{split_count.images:,} images")
            continue
        for name, here, everywhere in zip(
            statistics.classes, split_count.by_class.tolist(), total.tolist(), strict=True
        ):
            if everywhere and not here:
                yield Finding(NOT_IN_SPLIT, name, f"not in {split}, of {everywhere:,} boxes in all")
    learnt = statistics.splits.get("train", statistics.total()).by_class.tolist()
    most = max(learnt, default=0)
    for name, count in zip(statistics.classes, learnt, strict=True):
        if 0 < count < most * RARE_SHARE:
            what = f"boxes: {count:,}, where {statistics.classes[learnt.index(most)]} has {most:,}"
            yield Finding(RARE_CLASS, name, what)


def _small(
    contents: Contents, statistics: Statistics, *, input_size: Sequence[int], strides: Sequence[int]
) -> Iterator[Finding]:
    """Images below a cell, and boxes below half a cell, of the network."""
    entries = contents.entries()
    for entry in entries:
        if min(entry.width, entry.height) < SMALL_IMAGE_PX:
            yield Finding(SMALL_IMAGE, entry.where, f"{entry.width}x{entry.height}")
    limit = smallest_side(strides)
    sides, shown = statistics.sides, statistics.letterboxed_sides(input_size)
    for index in statistics.too_small(input_size, strides).nonzero()[0].tolist():
        name = statistics.classes[statistics.labels[index]]
        width, height = shown[index]
        here = f"{sides[index, 0]:g}x{sides[index, 1]:g}"
        there = f"{width:.1f}x{height:.1f} at the input, with a side under {limit:g}"
        yield Finding(SMALL_BOX, entries[statistics.images[index]].where, f"{name} of {here} pixels: {there}")
