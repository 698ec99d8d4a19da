"""``dataset.json``: what a dataset folder holds, so that every key is known without opening a shard."""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Final

from onestage.data.store import SHA256, StoreSettings, open_store
from onestage.errors import InputError

VERSION: Final = 1
FILE_NAME: Final = "dataset.json"


def key_of(image_id: int) -> str:
    """The key of an image; images are numbered over all splits of a dataset.

    >>> key_of(42)
    '000042'
    """
    return f"{image_id:06d}"


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar file: its images are numbered from ``first`` on, without a gap."""

    name: str
    num_samples: int
    num_bytes: int
    sha256: str
    first: int

    def keys(self) -> list[str]:
        """The shard's keys in the order they are stored.

        >>> Shard("train-000000.tar", num_samples=3, num_bytes=10240, sha256="", first=7).keys()
        ['000007', '000008', '000009']
        """
        return [key_of(image_id) for image_id in range(self.first, self.first + self.num_samples)]


@dataclass(frozen=True, slots=True)
class Split:
    """The shards of one split, in order."""

    shards: tuple[Shard, ...]

    @property
    def num_samples(self) -> int:
        return sum(shard.num_samples for shard in self.shards)

    def keys(self) -> list[str]:
        """The split's keys in the order they are stored."""
        return list(chain.from_iterable(shard.keys() for shard in self.shards))


@dataclass(frozen=True, slots=True)
class Manifest:
    """A dataset's classes (labels index them), splits and shards."""

    name: str
    classes: tuple[str, ...]
    splits: dict[str, Split]
    version: int = VERSION

    @property
    def content_hash(self) -> str:
        """sha256 of classes and shard contents: equal for equal data, whatever it is called."""
        shards = {name: [shard.sha256 for shard in split.shards] for name, split in self.splits.items()}
        content = json.dumps({"classes": self.classes, "splits": shards}, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()

    def split(self, name: str) -> Split:
        """The split called ``name``; an ``InputError`` lists those there are."""
        if name not in self.splits:
            raise InputError(f"dataset {self.name!r} has no split {name!r}: choose one of {', '.join(self.splits)}")
        return self.splits[name]

    def save(self, root: Path) -> None:
        """Write ``dataset.json`` into ``root``; a reader sees the old file or the new one, never a part."""
        partial = root / f".{FILE_NAME}.{os.getpid()}"
        partial.write_text(json.dumps(_to_json(self), indent=2) + "\n", encoding="utf-8")
        os.replace(partial, root / FILE_NAME)

    @classmethod
    def load(cls, root: Path | str, *, settings: StoreSettings | None = None) -> "Manifest":
        """The manifest of the dataset ``root``, a folder or an address; ``InputError`` where none can be used."""
        store = open_store(root, settings=settings)
        content = store.manifest_bytes(FILE_NAME)
        where = store.shown(FILE_NAME)
        try:
            fields = json.loads(content.decode("utf-8"))
            if fields["version"] > VERSION:
                raise InputError(f"{where} has format {fields['version']}, newer than {VERSION}: upgrade onestage")
            manifest = _from_json(fields)
            if manifest.content_hash != fields["content_hash"]:
                raise ValueError("its content hash does not match its shards")
        except InputError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            what = f"no field {error}" if isinstance(error, KeyError) else str(error)
            raise InputError(f"{where} is broken ({what}): make it again with `onestage data import ...`") from error
        return manifest


def _to_json(manifest: Manifest) -> dict[str, Any]:
    return {
        "version": manifest.version,
        "name": manifest.name,
        "classes": list(manifest.classes),
        "content_hash": manifest.content_hash,
        "splits": {
            name: {
                "shards": [
                    {
                        "name": shard.name,
                        "samples": shard.num_samples,
                        "bytes": shard.num_bytes,
                        "sha256": shard.sha256,
                        "first": shard.first,
                    }
                    for shard in split.shards
                ]
            }
            for name, split in manifest.splits.items()
        },
    }


def _from_json(fields: dict[str, Any]) -> Manifest:
    return Manifest(
        name=str(fields["name"]),
        classes=tuple(str(name) for name in fields["classes"]),
        splits={
            name: Split(_in_order(_shard_from_json(shard) for shard in split["shards"]))
            for name, split in fields["splits"].items()
        },
        version=int(fields["version"]),
    )


def _shard_from_json(fields: dict[str, Any]) -> Shard:
    shard = Shard(
        name=str(fields["name"]),
        num_samples=int(fields["samples"]),
        num_bytes=int(fields["bytes"]),
        sha256=str(fields["sha256"]),
        first=int(fields["first"]),
    )
    # A manifest may come from elsewhere: it must not lead a reader out of its folder, nor out of its cache.
    if Path(shard.name).name != shard.name or shard.name in ("", "..") or not shard.name.isprintable():
        raise ValueError(f"shard {shard.name!r} is not a plain file name")
    if shard.sha256 and not SHA256.fullmatch(shard.sha256):
        raise ValueError(f"shard {shard.name} has sha256 {shard.sha256[:80]!r}")
    if min(shard.num_samples, shard.num_bytes, shard.first) < 0:
        raise ValueError(f"shard {shard.name} has a number below 0")
    return shard


def _in_order(shards: Iterable[Shard]) -> tuple[Shard, ...]:
    """Keys are looked up by halving: shards must be numbered upwards, and share no key."""
    ordered = tuple(shards)
    for before, after in pairwise(ordered):
        if after.first < before.first + before.num_samples:
            raise ValueError(f"shard {after.name} starts at {after.first}, within {before.name} or before it")
    return ordered
