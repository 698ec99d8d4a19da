"""Exact random access to the samples in tar shards: the order is decided elsewhere, not by how the bytes lie."""

import io
import os
import tarfile
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

from onestage.data.faults import Unreadable
from onestage.data.manifest import Manifest, Shard
from onestage.data.order import WINDOW_SHARDS
from onestage.data.prefetch import Prefetch
from onestage.data.store import Store, open_store

IMAGE_MEMBERS: Final = ("jpg", "jpeg", "png")
MEMBERS: Final = (*IMAGE_MEMBERS, "json")
"""Nothing else in a shard is ever read: WebDataset's own decoder would unpickle what a stranger put there."""
MAX_OPEN_SHARDS: Final = 2 * WINDOW_SHARDS


def image_of(sample: Mapping[str, Any]) -> tuple[str, bytes]:
    """The member of a sample that is its image, and its bytes; both are empty where it has none."""
    return next(((member, sample[member]) for member in IMAGE_MEMBERS if member in sample), ("", b""))


class _Extent(NamedTuple):
    offset: int
    num_bytes: int


class _Opened(NamedTuple):
    file: BinaryIO
    samples: dict[str, dict[str, _Extent]]


class ShardReader:
    """Reads samples of one split by key; a shard's headers are scanned when it is opened.

    Files are read at offsets (pread), which have no position that processes could move for each other, so a reader may
    be used on both sides of a fork; a pickled reader opens its files anew. ``store`` None is that of ``root``, a path
    or an address, with the usual settings.
    """

    def __init__(self, root: Path | str, split: str, *, manifest: Manifest, store: Store | None = None) -> None:
        self.store = store or open_store(root)
        self.shards = manifest.split(split).shards
        self._firsts = [shard.first for shard in self.shards]
        self._opened: OrderedDict[str, _Opened] = OrderedDict()
        self._prefetch: Prefetch | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": OrderedDict(), "_prefetch": None}

    def expect(self, keys: Sequence[str]) -> None:
        """These keys are read next, about in this order: shards that lie elsewhere can be fetched before."""
        if self._prefetch is not None:
            self._prefetch.stop()
            self._prefetch = None
        if self.store.is_remote and keys:
            coming = {shard.name: shard for shard in map(self._shard_of, keys)}
            self._prefetch = Prefetch(self.store, list(coming.values()), reader=self)

    def read(self, key: str, *, members: Collection[str] = MEMBERS) -> dict[str, Any]:
        """The sample ``key`` in WebDataset's manner: ``__key__``, ``__url__`` (the shard) and its members' bytes.

        Only these ``members`` are read: who needs no picture asks for ("json",). ``Unreadable`` names a shard that is
        missing, cut short or not what the manifest says.
        """
        shard = self._shard_of(key)
        sample: dict[str, Any] = {"__key__": key, "__url__": shard.name}
        try:
            try:
                return sample | self._content(shard, key, members)
            except OSError:
                # A network mount may have let go of a file that lay open.
                self._close(shard)
                return sample | self._content(shard, key, members)
        except OSError as error:
            self._close(shard)
            raise self._broken(shard, f"can't be read ({error.strerror})") from error

    def sizes(self, key: str) -> dict[str, int]:
        """How many bytes each stored member of the sample has, without a look into them; ``Unreadable`` as ``read``."""
        shard = self._shard_of(key)
        try:
            return {member: extent.num_bytes for member, extent in self._extents(shard, key).items()}
        except OSError as error:
            self._close(shard)
            raise self._broken(shard, f"can't be read ({error.strerror})") from error

    def _extents(self, shard: Shard, key: str) -> dict[str, _Extent]:
        samples = self._open(shard).samples
        if key not in samples:
            raise self._broken(shard, f"has no sample {key}")
        return samples[key]

    def _content(self, shard: Shard, key: str, members: Collection[str]) -> dict[str, bytes]:
        extents = self._extents(shard, key)
        file = self._opened[shard.name].file
        content = {}
        for member, extent in extents.items():
            if member in members:
                content[member] = os.pread(file.fileno(), extent.num_bytes, extent.offset)
                if len(content[member]) < extent.num_bytes:
                    self._close(shard)
                    raise self._broken(shard, "is cut short")
        return content

    def _close(self, shard: Shard) -> None:
        """The next sample opens it anew."""
        if (opened := self._opened.pop(shard.name, None)) is not None:
            opened.file.close()

    def _shard_of(self, key: str) -> Shard:
        index = bisect_right(self._firsts, int(key)) - 1
        if index < 0 or int(key) >= self.shards[index].first + self.shards[index].num_samples:
            names = [shard.name for shard in self.shards]
            raise KeyError(f"no sample {key} in {self.store.shown()}'s shards {names}")
        return self.shards[index]

    def _open(self, shard: Shard) -> _Opened:
        if self._prefetch is not None:
            self._prefetch.reached(shard)
        if shard.name not in self._opened:
            file = self.store.open(shard)
            try:
                self._opened[shard.name] = _Opened(file, self._scan(shard, file))
            except BaseException:
                file.close()
                raise
            if len(self._opened) > MAX_OPEN_SHARDS:
                self._opened.popitem(last=False)[1].file.close()
        self._opened.move_to_end(shard.name)
        return self._opened[shard.name]

    def _scan(self, shard: Shard, file: BinaryIO) -> dict[str, dict[str, _Extent]]:
        samples: dict[str, dict[str, _Extent]] = {}
        try:
            with tarfile.open(fileobj=io.BufferedReader(_At(file)), mode="r:") as tar:
                for info in tar:
                    key, _, member = info.name.partition(".")
                    if info.isreg() and not info.issparse() and member in MEMBERS:
                        if not 0 <= info.size <= shard.num_bytes:
                            raise tarfile.ReadError(f"{info.name} has {info.size} bytes")
                        samples.setdefault(key, {})[member] = _Extent(info.offset_data, info.size)
        # A stranger's tar may hold any number, even for the length of a name, and a chain of names without end.
        except (tarfile.TarError, ValueError, OverflowError, RecursionError, MemoryError) as error:
            raise self._broken(
                shard, f"is no tar file that can be read ({str(error) or type(error).__name__})"
            ) from error
        except OSError as error:
            raise self._broken(shard, f"can't be read ({error.strerror})") from error
        return samples

    def _broken(self, shard: Shard, what: str) -> Unreadable:
        return Unreadable(f"shard {self.store.shown(shard.name)} {what}: copy the dataset again, or import it again")


class _At(io.RawIOBase):
    """A file with a position of its own, whoever else reads it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = (0, self._place, os.fstat(self._file.fileno()).st_size)[whence]
        self._place = max(0, base + offset)
        return self._place

    def readinto(self, buffer: Any) -> int:
        content = os.pread(self._file.fileno(), len(buffer), self._place)
        buffer[: len(content)] = content
        self._place += len(content)
        return len(content)
