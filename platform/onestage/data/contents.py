"""What a set holds, packed or still labelled files: every image with its boxes, and its bytes when asked for."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from threading import Lock
from typing import Final

from onestage.data import clean
from onestage.data.faults import Unreadable
from onestage.data.formats import coco, voc, yolo
from onestage.data.formats import findings as kinds
from onestage.data.formats.record import Box, Finding, Record
from onestage.data.manifest import FILE_NAME, Manifest, Shard
from onestage.data.shards import IMAGE_MEMBERS, ShardReader, image_of
from onestage.data.store import is_address
from onestage.data.truth import BadTruth, Truth
from onestage.errors import InputError

PACKED: Final = "packed"
READERS: Final = {"voc": voc.read, "coco": coco.read, "yolo": yolo.read}
CERTAIN: Final = {
    "voc": ("Annotations/*.xml", "annotations/*.xml"),
    "coco": ("annotations/*.json", "_annotations.coco.json", "*/_annotations.coco.json"),
    "yolo": ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml"),
}
"""Files that only a set of the format has."""
LIKELY: Final = {
    "voc": ("*.xml", "*/*.xml"),
    "yolo": ("labels/*.txt", "labels/*/*.txt"),
}
"""Files that count where no certain ones are there."""
VAGUE: Final = {"coco": ("*.json",), "yolo": ("*.yaml", "*.yml")}
"""Files that may be about anything, as Label Studio's notes.json beside labels: they count where no other does."""
FILES: Final = {".json": "coco", ".yaml": "yolo", ".yml": "yolo"}

BROKEN_SHARD: Final = "shard that can't be read"
CHANGED_SHARD: Final = "shard that was changed"
BROKEN_SAMPLE: Final = "sample that can't be read"
OUTSIDE_PX: Final = 0.01
"""Boxes are stored with all their digits: what lies further out than this is no rounding."""

Progress = Callable[[int, int], None]
"""Told (images done, images in all) after each image."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One image of ``split`` with its boxes, in pixels of the upright picture; ``where`` names it for people.

    ``content()`` gives its bytes; InputError or OSError where they can't be had.
    """

    split: str
    where: str
    width: int
    height: int
    boxes: list[Box]
    labels: list[int]
    orientation: int
    content: Callable[[], bytes]


@dataclass(frozen=True, slots=True)
class Contents:
    """Every image that can be learnt from, by split; ``findings`` tell of the others, and of what was mended."""

    name: str
    classes: tuple[str, ...]
    splits: dict[str, list[Entry]]
    findings: list[Finding]
    packed: bool

    def entries(self) -> list[Entry]:
        """The images of all splits."""
        return [entry for entries in self.splits.values() for entry in entries]


def open_set(
    place: Path | str,
    *,
    format: str | None = None,
    classes: Iterable[str] | None = None,
    verify: bool = False,
    progress: Progress | None = None,
) -> Contents:
    """What lies at ``place``: a dataset folder, or labelled files of ``format`` (None: found out).

    Labelled files are read as an import reads them, with ``classes`` if given. ``verify`` hashes a dataset folder's
    shards, even those that were found right before. InputError where ``place`` is neither, or says nothing at all.
    """
    format = format or recognise(place)
    if format == PACKED:
        if classes is not None:
            raise InputError(f"{place} is a dataset folder, whose classes are settled: leave --classes out")
        return _packed(place, verify=verify, progress=progress)
    source = clean.clean(READERS[format](Path(place), classes=classes), progress=progress)
    splits = {split: [_of_record(split, record) for record in records] for split, records in source.splits.items()}
    return Contents(source.name, source.classes, splits, source.findings, packed=False)


def recognise(place: Path | str) -> str:
    """``PACKED`` or the format of what lies at ``place``; InputError where it is none, or could be two of them."""
    if is_address(place):
        return PACKED
    place = Path(place)
    if not place.exists():
        raise InputError(f"there is nothing at {place}: check the path")
    if (place / FILE_NAME).is_file():
        return PACKED
    if place.is_file():
        found = [FILES[place.suffix.lower()]] if place.suffix.lower() in FILES else []
    else:
        found = _matching(CERTAIN, place) or _matching(LIKELY, place) or _matching(VAGUE, place)
    if len(found) > 1:
        raise InputError(f"{place} could be {' or '.join(found)}: say which with --format")
    if not found:
        raise InputError(
            f"{place} is no dataset folder (no {FILE_NAME}) and neither VOC (Annotations/*.xml), "
            "COCO (annotations/*.json) nor YOLO (data.yaml): give the folder that holds these, or say --format"
        )
    return found[0]


def _matching(marks: Mapping[str, tuple[str, ...]], place: Path) -> list[str]:
    return [format for format, patterns in marks.items() if any(any(place.glob(one)) for one in patterns)]


def _of_record(split: str, record: Record) -> Entry:
    return Entry(
        split=split,
        where=record.source,
        width=record.width,
        height=record.height,
        boxes=record.boxes,
        labels=record.labels,
        orientation=record.orientation,
        content=record.path.read_bytes,
    )


def _packed(root: Path | str, *, verify: bool, progress: Progress | None) -> Contents:
    manifest = Manifest.load(root)
    total = sum(split.num_samples for split in manifest.splits.values())
    findings: list[Finding] = []
    splits: dict[str, list[Entry]] = {}
    done = 0
    for split in manifest.splits:
        packed = _Packed(ShardReader(root, split, manifest=manifest), split, len(manifest.classes))
        splits[split] = []
        for shard in manifest.split(split).shards:
            found = list(packed.samples(shard))
            splits[split] += [one for one in found if isinstance(one, Entry)]
            findings += [one for one in found if isinstance(one, Finding)]
            if verify and not any(finding.kind == BROKEN_SHARD for finding in findings[-1:]):
                findings += _changed(Path(root) / shard.name, shard)
            done += shard.num_samples
            if progress is not None:
                progress(done, total)
    return Contents(manifest.name, manifest.classes, splits, findings, packed=True)


def _changed(path: Path, shard: Shard) -> Iterator[Finding]:
    """A finding where a shard that could be read has other bytes than the manifest says.

    Readers trust a file once verified until it is written to; a disk that rots does not write.
    """
    if not path.is_file():  # but behind an address, from where each came with its hash verified
        return
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != shard.sha256:
        yield Finding(CHANGED_SHARD, shard.name, f"its sha256 is {sha256[:12]}… and not {shard.sha256[:12]}…")


class _Packed:
    """The samples of one split's shards."""

    def __init__(self, reader: ShardReader, split: str, num_classes: int) -> None:
        self.reader = reader
        self.split = split
        self.num_classes = num_classes
        self.lock = Lock()
        reader.expect(list(chain.from_iterable(shard.keys() for shard in reader.shards)))

    def content(self, key: str) -> bytes:
        """The stored image of a sample."""
        with self.lock:  # the reader closes files that another thread may be reading
            return image_of(self.reader.read(key))[1]

    def samples(self, shard: Shard) -> Iterator[Entry | Finding]:
        """Each sample that can be read, and what is wrong with it and with the others."""
        alone: Finding | None = None
        lost, keys = 0, shard.keys()
        for key in keys:
            where = f"{shard.name}, {key}"
            try:
                yield from self._sample(key, where)
            except BadTruth as error:
                yield Finding(BROKEN_SAMPLE, where, f"it has {error}")
            except Unreadable as error:
                lost += 1
                if len(keys) == 1 or (alone is not None and alone.what == str(error)):
                    # The same words again are about the shard: no need to ask for all the others.
                    num_images = len(keys) - int(key) + shard.first + lost - 1
                    yield Finding(BROKEN_SHARD, shard.name, f"{error} ({num_images:,} images)")
                    return
                if alone is not None:
                    yield alone
                alone = Finding(BROKEN_SAMPLE, where, str(error))
        if alone is not None:
            yield alone

    def _sample(self, key: str, where: str) -> Iterator[Entry | Finding]:
        with self.lock:
            raw, sizes = self.reader.read(key, members=("json",)), self.reader.sizes(key)
        truth = Truth.parse(raw.get("json", b""), num_classes=self.num_classes)
        if not any(sizes.get(member) for member in IMAGE_MEMBERS):
            raise BadTruth("no image", source=truth.source)
        width, height = truth.size
        where = f"{where} (from {truth.source})"
        boxes: list[Box] = []
        labels: list[int] = []
        drawn = clean.Drawn()
        for box, label, crowd in zip(truth.boxes, truth.labels, truth.crowd, strict=True):
            kind, clipped = _placed(box, width=width, height=height)
            if clipped is not None and drawn.has((label, crowd), clipped):
                kind, clipped = kinds.TWICE, None
            if kind is not None:
                corners = ", ".join(f"{side:g}" for side in box)
                yield Finding(kind, where, f"label {label} at {corners} on {width}x{height}")
            if clipped is not None:
                boxes.append(clipped)
                labels.append(label)
        yield Entry(
            split=self.split,
            where=where,
            width=width,
            height=height,
            boxes=boxes,
            labels=labels,
            orientation=truth.orientation,
            content=partial(self.content, key),
        )


def _placed(box: Box, *, width: int, height: int) -> tuple[str | None, Box | None]:
    """The kind of what is wrong with a box, if anything is, and the part of it on the image, if there is one."""
    left, top, right, bottom = box
    if right <= left or bottom <= top:
        return kinds.NO_AREA, None
    if (clipped := clean.part_inside(box, width=width, height=height)) is None:
        return kinds.OUTSIDE, None
    return (None if clean.is_near(box, clipped, within_px=OUTSIDE_PX) else kinds.CLIPPED), clipped
