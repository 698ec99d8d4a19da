"""A dataset folder from what a format's reader found: the images as they are, in tar shards of even bytes."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from onestage.data.formats.record import Record, Source
from onestage.data.manifest import FILE_NAME, Manifest, Shard, Split, key_of
from onestage.errors import InputError

SAMPLES_PER_SHARD: Final = 256
MAX_SHARD_BYTES: Final = 64 * 2**20
MEMBERS: Final = {".jpg": "jpg", ".jpeg": "jpg", ".png": "png"}

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Told (images done, images in all) after each image."""


def pack(
    source: Source,
    out: Path | str,
    *,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Write ``source`` as the dataset folder ``out``, all of it or nothing.

    Equal sources give equal bytes. A dataset that is there already is left when it has the same content; any other is
    an ``InputError`` unless ``overwrite``. A folder that is no dataset is never replaced.
    """
    out = Path(out).absolute()
    if out.exists() and not (out.is_dir() and ((out / FILE_NAME).is_file() or not any(out.iterdir()))):
        raise InputError(f"{out} exists and is no dataset folder: choose another place")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        manifest = _write(source, partial, samples_per_shard=samples_per_shard, progress=progress or _quiet)
        if (out / FILE_NAME).is_file() and not overwrite:
            present = Manifest.load(out)
            if present.content_hash != manifest.content_hash:
                raise InputError(f"{out} holds another dataset, {present.name!r}: choose another place or overwrite it")
            log.info("%s holds this dataset already and is left as it is", out)
            return present
        _replace(out, partial)
        return manifest
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(source: Source, folder: Path, *, samples_per_shard: int, progress: Progress) -> Manifest:
    num_images = sum(len(records) for records in source.splits.values())
    first = 0
    splits = {}
    for split, records in source.splits.items():
        shards: list[Shard] = []
        for group in _groups(records, samples_per_shard):
            path = folder / f"{split}-{len(shards):06d}.tar"
            _write_shard(path, group, first=first, on_image=lambda done: progress(done, num_images))
            with path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            shards.append(Shard(path.name, len(group), path.stat().st_size, sha256, first))
            first += len(group)
        splits[split] = Split(tuple(shards))
    manifest = Manifest(name=source.name, classes=source.classes, splits=splits)
    manifest.save(folder)
    return manifest


def _groups(records: list[Record], samples_per_shard: int) -> Iterator[list[Record]]:
    """The records of each shard: as many as asked for, fewer where the images are large."""
    group: list[Record] = []
    num_bytes = 0
    for record in records:
        size = record.path.stat().st_size
        if group and (len(group) == samples_per_shard or num_bytes + size > MAX_SHARD_BYTES):
            yield group
            group, num_bytes = [], 0
        group.append(record)
        num_bytes += size
    if group:
        yield group


def _write_shard(path: Path, records: list[Record], *, first: int, on_image: Callable[[int], None]) -> None:
    from webdataset import TarWriter  # brings torch with it: seconds

    # Fixed times, owners and modes: equal content must give equal bytes, and so an equal hash.
    with path.open("wb") as file, TarWriter(file, encoder=False, mtime=0, user="", group="", mode=0o444) as tar:
        for image_id, record in enumerate(records, start=first):
            member = MEMBERS[record.path.suffix.lower()]
            tar.write({"__key__": key_of(image_id), member: record.path.read_bytes(), "json": _json(record, image_id)})
            on_image(image_id + 1)


def _json(record: Record, image_id: int) -> bytes:
    fields = {
        "image_id": image_id,
        "source": record.source,
        "width": record.width,
        "height": record.height,
        "boxes": record.boxes,
        "labels": record.labels,
        "difficult": record.difficult,
        "crowd": record.crowd,
    }
    return json.dumps(fields, separators=(",", ":")).encode()


def _replace(out: Path, partial: Path) -> None:
    """Put ``partial`` in the place of ``out``; a folder that holds files can't be replaced in one step."""
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.rename(out, old)
    os.rename(partial, out)
    shutil.rmtree(old, ignore_errors=True)


def _quiet(done: int, num_images: int) -> None:
    """The progress that nobody asked for."""
