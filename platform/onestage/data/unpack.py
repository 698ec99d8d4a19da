"""A dataset folder back to files: each image's bytes as they are stored, its boxes in the format that is asked for."""

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path, PurePosixPath
from typing import Any, Final

from onestage.data.faults import Unreadable
from onestage.data.formats.coco import CocoWriter
from onestage.data.formats.stored import Stored, Writer
from onestage.data.formats.voc import VocWriter
from onestage.data.formats.yolo import YoloWriter
from onestage.data.manifest import Manifest
from onestage.data.shards import ShardReader, image_of
from onestage.data.truth import Truth, named, truth_of
from onestage.errors import InputError

WRITERS: Final[dict[str, type[Writer]]] = {"voc": VocWriter, "coco": CocoWriter, "yolo": YoloWriter}
MAX_NAME_BYTES: Final = 200
"""Of a file's name, which may be 255 long with what is put behind it."""


@dataclass(frozen=True, slots=True)
class Exported:
    """Images and boxes written, by split, and what the format could not keep, a sentence each."""

    splits: dict[str, tuple[int, int]]
    lost: list[str]


def export(
    root: Path | str, format: str, out: Path | str, *, progress: Callable[[int, int], None] | None = None
) -> Exported:
    """Write the dataset folder ``root`` as a folder ``out`` in ``format``: voc, coco or yolo. All of it or nothing.

    An image keeps the name it was imported with where no other has it, else its key is its name. Boxes are those of
    the upright picture, and so are the sizes that go with them. ``out`` must be new or empty.
    """
    if format not in WRITERS:
        raise InputError(f"there is no format {format!r}: choose one of {', '.join(WRITERS)}")
    manifest = Manifest.load(root)
    for split in manifest.splits:
        if not re.fullmatch(r"\w[\w-]*", split):  # it becomes part of a path, and a manifest may come from elsewhere
            raise InputError(f"{root} has a split {split!r}, which can be no file's name: rename it in dataset.json")
    out = Path(out).absolute()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out} is not empty: choose another place")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        writer = WRITERS[format](partial, name=manifest.name, classes=manifest.classes)
        exported = _write_all(root, manifest, writer, progress=progress)
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return exported


def _write_all(
    root: Path | str, manifest: Manifest, writer: Writer, *, progress: Callable[[int, int], None] | None
) -> Exported:
    num_images = sum(split.num_samples for split in manifest.splits.values())
    names = _Names()
    splits = {}
    done = num_rotated = 0
    for split, content in manifest.splits.items():
        reader = ShardReader(root, split, manifest=manifest)
        num_boxes = 0
        keys = content.keys()
        reader.expect(keys)
        for key in keys:
            sample = reader.read(key)
            truth = truth_of(sample, num_classes=len(manifest.classes), sized=True)
            image = _stored(sample, truth, names)
            num_boxes += writer.add(split, image)
            num_rotated += truth.orientation != 1
            done += 1
            if progress is not None:
                progress(done, num_images)
        splits[split] = (content.num_samples, num_boxes)
    lost = writer.close()
    if num_rotated:
        lost.append(f"EXIF: {num_rotated:,} images have to be turned upright by whatever reads them, as boxes are")
    return Exported(splits, lost)


def _stored(sample: dict[str, Any], truth: Truth, names: "_Names") -> Stored:
    member, content = image_of(sample)
    width, height = truth.size
    if not member:
        raise Unreadable(f"{named(sample, truth.source)} has no image: make the dataset again")
    return Stored(
        name=names.of(sample["__key__"], truth.source, suffix=f".{member}"),
        content=content,
        width=width,
        height=height,
        boxes=truth.boxes,
        labels=truth.labels,
        difficult=truth.difficult,
        crowd=truth.crowd,
    )


class _Names:
    """Names for files, no two of them the same but for case or suffix."""

    def __init__(self) -> None:
        self.taken: set[str] = set()

    def of(self, key: str, source: str, *, suffix: str) -> str:
        """The base name of ``source`` where it is free and fit for a file, else the key."""
        stem = PurePosixPath(source.replace("\\", "/")).stem
        is_fit = stem.isprintable() and stem == stem.strip() and len(stem.encode("utf-8", "replace")) <= MAX_NAME_BYTES
        wanted = [stem] if is_fit and stem and not stem.startswith(".") else []
        spare = chain([key], (f"{key}-{number}" for number in count(2)))
        free = next(name for name in chain(wanted, spare) if name.casefold() not in self.taken)
        self.taken.add(free.casefold())
        return free + suffix
