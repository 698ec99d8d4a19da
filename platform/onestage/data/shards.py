"""Exact random access to the samples in tar shards: the order is decided elsewhere, not by how the bytes lie."""

import os
import tarfile
from bisect import bisect_right
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

from onestage.data.manifest import Manifest, Shard
from onestage.data.order import WINDOW_SHARDS
from onestage.errors import InputError

MEMBERS: Final = ("jpg", "jpeg", "png", "json")
"""Nothing else in a shard is ever read: WebDataset's own decoder would unpickle what a stranger put there."""
MAX_OPEN_SHARDS: Final = 2 * WINDOW_SHARDS


class _Extent(NamedTuple):
    offset: int
    num_bytes: int


class ShardReader:
    """Reads samples of one split by key; a shard's headers are scanned on its first use, and then kept.

    Files are read at offsets (pread), which have no position that processes could move for each other, so a reader may
    be used on both sides of a fork; a pickled reader opens its files anew.
    """

    def __init__(self, root: Path | str, split: str, *, manifest: Manifest) -> None:
        self.root = Path(root)
        self.shards = manifest.split(split).shards
        self._firsts = [shard.first for shard in self.shards]
        self._indexes: dict[str, dict[str, dict[str, _Extent]]] = {}
        self._files: OrderedDict[str, BinaryIO] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}

    def read(self, key: str) -> dict[str, Any]:
        """The sample ``key`` in WebDataset's manner: ``__key__``, ``__url__`` (the shard) and its members' bytes.

        ``InputError`` names a shard that is missing, cut short or not what the manifest says.
        """
        shard = self._shard_of(key)
        if shard.name not in self._indexes:
            self._indexes[shard.name] = self._scan(shard)
        members = self._indexes[shard.name].get(key)
        if members is None:
            raise self._broken(shard, f"has no sample {key}")
        sample: dict[str, Any] = {"__key__": key, "__url__": shard.name}
        for member, extent in members.items():
            sample[member] = os.pread(self._file(shard).fileno(), extent.num_bytes, extent.offset)
            if len(sample[member]) < extent.num_bytes:
                raise self._broken(shard, "is cut short")
        return sample

    def _shard_of(self, key: str) -> Shard:
        index = bisect_right(self._firsts, int(key)) - 1
        if index < 0 or int(key) >= self.shards[index].first + self.shards[index].num_samples:
            raise KeyError(f"no sample {key} in {self.root}'s shards {[shard.name for shard in self.shards]}")
        return self.shards[index]

    def _file(self, shard: Shard) -> BinaryIO:
        if shard.name not in self._files:
            try:
                file = (self.root / shard.name).open("rb", buffering=0)
            except FileNotFoundError as error:
                raise self._broken(shard, "is missing") from error
            if (num_bytes := os.fstat(file.fileno()).st_size) != shard.num_bytes:
                raise self._broken(shard, f"has {num_bytes} bytes where dataset.json says {shard.num_bytes}")
            self._files[shard.name] = file
            if len(self._files) > MAX_OPEN_SHARDS:
                self._files.popitem(last=False)[1].close()
        self._files.move_to_end(shard.name)
        return self._files[shard.name]

    def _scan(self, shard: Shard) -> dict[str, dict[str, _Extent]]:
        self._file(shard)
        index: dict[str, dict[str, _Extent]] = {}
        try:
            with tarfile.open(self.root / shard.name, "r:") as tar:
                for info in tar:
                    key, _, member = info.name.partition(".")
                    if info.isfile() and member in MEMBERS:
                        index.setdefault(key, {})[member] = _Extent(info.offset_data, info.size)
        except tarfile.TarError as error:
            raise self._broken(shard, f"is no tar file that can be read ({error})") from error
        return index

    def _broken(self, shard: Shard, what: str) -> InputError:
        return InputError(f"shard {self.root / shard.name} {what}: copy the dataset again, or import it again")
