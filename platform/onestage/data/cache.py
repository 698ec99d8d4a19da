"""Shards from elsewhere, kept on this machine's disk: by their content, within a bound, for many processes at once."""

import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Final, NamedTuple
from uuid import uuid4

from filelock import FileLock, Timeout

from onestage.errors import InputError

POLL_S: Final = 0.05
NOTED_BYTES: Final = 4096
CHECKED_FOR_S: Final = 30 * 86400.0
"""A file that was verified longer ago is hashed again when it is next opened."""
_LOCK_DIGITS: Final = 3  # of the checksum: 4096 lock files for ever, instead of one for each shard that ever was
_CHECK_LOCK_S: Final = 60.0
_PARTIAL = re.compile(r"([0-9a-f]{64})\.(\d+)\.[0-9a-f]+\.partial")


def folder(named: str | None) -> Path:
    """The cache's folder, made and writable: the one that is ``named``, else ``ONESTAGE_CACHE``, else the user's own.

    Where the home can't be written, one below the temporary folder. ``InputError`` where none will do.
    """
    if asked := named or os.environ.get("ONESTAGE_CACHE"):
        if _make(chosen := Path(asked).expanduser().absolute()):
            return chosen
        raise InputError(f"cache folder {asked} can't be made or written: set data.cache to one on a local disk")
    for usual in _usual_folders():
        # In a folder for all, somebody else may have made it, to slip files into it.
        if _make(usual) and usual.stat().st_uid == os.getuid():
            return usual
    raise InputError("no folder for a cache can be written: set data.cache (or ONESTAGE_CACHE) to one on a local disk")


def _usual_folders() -> Iterator[Path]:
    for base in (os.environ.get("XDG_CACHE_HOME", ""), os.path.join(os.environ.get("HOME", ""), ".cache")):
        if os.path.isabs(base):
            yield Path(base) / "onestage"
    with suppress(FileNotFoundError):
        yield Path(tempfile.gettempdir()) / f"onestage-{os.getuid()}"


def _make(folder: Path) -> bool:
    """Whether ``folder`` is there, made where it was not, and may be written."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        return False


class Checked:
    """Says whether files have the checksums that they should, and hashes each only once on this machine.

    A marker in ``folder`` stands for a file as it was verified: path, inode, size and time of change. Without a
    ``folder`` that can be written, each process hashes for itself.
    """

    def __init__(self, folder: Path | None) -> None:
        self._markers = None if folder is None else folder / "checked"
        self._known: dict[str, bool] = {}
        if self._markers is not None:
            with suppress(OSError):
                self._markers.mkdir(mode=0o700, parents=True, exist_ok=True)
                _remove_old(self._markers, older_than_s=CHECKED_FOR_S)

    def matches(self, file: FileIO, path: Path, sha256: str) -> bool:
        """Whether ``file``, just opened at ``path``, has this checksum."""
        identity = _identity(os.fstat(file.fileno()), path, sha256)
        if identity not in self._known:
            self._known[identity] = self._marked(identity) or self._hash(file, path, sha256, identity)
        return self._known[identity]

    def trust(self, file: FileIO, path: Path, sha256: str) -> None:
        """``file`` has been verified as it was written."""
        identity = _identity(os.fstat(file.fileno()), path, sha256)
        self._known[identity] = True
        self._mark(identity)

    def forget(self, status: os.stat_result, path: Path, sha256: str) -> None:
        """The file is gone."""
        identity = _identity(status, path, sha256)
        self._known.pop(identity, None)
        if self._markers is not None:
            with suppress(OSError):
                (self._markers / identity).unlink()

    def _hash(self, file: FileIO, path: Path, sha256: str, identity: str) -> bool:
        with self._alone(identity):
            if self._marked(identity):
                return True
            same = _sha256(file) == sha256
            # A file that changed while it was hashed is none of which anything is known.
            if same and _identity(os.fstat(file.fileno()), path, sha256) == identity:
                self._mark(identity)
            return same

    def _marked(self, identity: str) -> bool:
        if self._markers is None:
            return False
        try:
            return time.time() - (self._markers / identity).stat().st_mtime < CHECKED_FOR_S
        except OSError:
            return False

    def _mark(self, identity: str) -> None:
        if self._markers is not None:
            with suppress(OSError):
                (self._markers / identity).touch()

    @contextmanager
    def _alone(self, identity: str) -> Iterator[None]:
        """Of the processes that open a file at once, one hashes; where locks don't work, all do."""
        lock = None
        if self._markers is not None:
            with suppress(OSError, Timeout, NotImplementedError):
                lock = FileLock(self._markers / f"lock-{identity[:1]}", timeout=_CHECK_LOCK_S, poll_interval=POLL_S)
                lock.acquire()
        try:
            yield
        finally:
            if lock is not None:
                lock.release()


def _sha256(file: FileIO) -> str:
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    file.seek(0)
    return digest


def _identity(status: os.stat_result, path: Path, sha256: str) -> str:
    facts = (os.path.abspath(path), status.st_ino, status.st_size, status.st_mtime_ns, sha256)
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _remove_old(folder: Path, *, older_than_s: float) -> None:
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                if not entry.name.startswith("lock-") and time.time() - entry.stat().st_mtime > older_than_s:
                    os.unlink(entry.path)


class Held(Exception):
    """Another process holds what this one waits for, and does not get on."""


class Differs(Exception):
    """What was fetched is not what was asked for."""


class _Kept(NamedTuple):
    used_ns: int
    name: str
    status: os.stat_result


class Cache:
    """Shards by their sha256, so that runs and datasets share them; at most ``max_bytes``, or one shard.

    A shard gets its name when it is whole, verified and on the disk. The one that was used longest ago goes first; who
    has it open reads on. Locks are the kernel's: those of a process that dies are free at once, and what it left half
    fetched is no one's. Where another process is waited for, it has ``patience_s`` to show some progress.
    """

    def __init__(self, folder: Path, *, max_bytes: int, patience_s: float) -> None:
        self.max_bytes = max_bytes
        self.patience_s = patience_s
        self._shards, self._locks, self._failed = (folder / name for name in ("shards", "locks", "failed"))
        for made in (self._shards, self._locks, self._failed):
            made.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._checked = Checked(folder)
        self._notes: dict[str, tuple[float, str]] = {}
        _remove_old(self._failed, older_than_s=0)

    def open(self, sha256: str, num_bytes: int) -> FileIO | None:
        """The shard, if it is here and whole; it counts as used now."""
        path = self._shards / sha256
        try:
            file = path.open("rb", buffering=0)
        except FileNotFoundError:
            return None
        try:
            status = os.fstat(file.fileno())
            whole = status.st_size == num_bytes and self._checked.matches(file, path, sha256)
        except BaseException:
            file.close()
            raise
        if not whole:
            file.close()
            path.unlink(missing_ok=True)
            return None
        with suppress(OSError):
            # Access times are ours to set: most disks keep them seldom or never. The other one is the file's identity.
            os.utime(file.fileno(), ns=(time.time_ns(), status.st_mtime_ns))
        return file

    def has(self, sha256: str) -> bool:
        """Whether the shard seems to be here, without a look into it."""
        return (self._shards / sha256).exists()

    @contextmanager
    def alone(self, sha256: str, *, wait: bool = True) -> Iterator[None]:
        """Within it no other process fetches this shard. ``Held`` where one does, and does not get on."""
        lock = FileLock(self._locks / sha256[:_LOCK_DIGITS], timeout=0)
        for _ in self._while_others_get_on(sha256[:_LOCK_DIGITS]):
            with suppress(Timeout):
                lock.acquire(blocking=False)
                break
            if not wait:
                raise Held("another process is fetching it")
        else:
            raise Held(f"another process has been fetching it, without progress for {self.patience_s:.0f} s")
        try:
            yield
        finally:
            lock.release()

    def fetch(
        self, sha256: str, num_bytes: int, download: Callable[[Path], None], *, wait: bool = True
    ) -> FileIO | None:
        """What ``download`` writes to the path that it is given, kept and opened; call it within ``alone``.

        ``Differs`` where that is not the shard. Without ``wait``, None where there is no room for it just now.
        """
        partial = self._reserve(sha256, num_bytes, wait=wait)
        if partial is None:
            return None
        try:
            download(partial)
            file = partial.open("rb", buffering=0)
            try:
                if (got := os.fstat(file.fileno()).st_size) != num_bytes:
                    raise Differs(f"it has {got} bytes where dataset.json says {num_bytes}")
                if _sha256(file) != sha256:
                    raise Differs("its checksum differs from that in dataset.json")
                os.fsync(file.fileno())
                with self._room():  # who counts under this lock sees the one name or the other
                    os.replace(partial, self._shards / sha256)
                self._checked.trust(file, self._shards / sha256, sha256)
            except BaseException:
                file.close()
                raise
        finally:
            partial.unlink(missing_ok=True)
        return file

    def note_failure(self, name: str, why: str, *, for_s: float) -> None:
        """Note for ``for_s`` seconds, and for all processes, why what they call ``name`` can't be had."""
        until = time.time() + for_s
        self._notes[name] = (until, why)
        with suppress(OSError):  # on a full disk each process remembers for itself
            partial = self._failed / f"{name}.{uuid4().hex}"
            partial.write_text(why[:NOTED_BYTES], encoding="utf-8")
            os.utime(partial, (until, until))
            os.replace(partial, self._failed / name)

    def failure(self, name: str) -> str | None:
        """What has been noted of ``name``, while that holds."""
        until, why = self._notes.get(name, (0.0, ""))
        if time.time() < until:
            return why
        with suppress(OSError):
            note = self._failed / name
            if time.time() < note.stat().st_mtime:
                return note.read_text(encoding="utf-8", errors="replace")
        return None

    def _while_others_get_on(self, prefix: str = "") -> Iterator[None]:
        """Every now and then, until those who fetch shards of this ``prefix`` have shown no progress for too long."""
        give_up, seen = time.monotonic() + self.patience_s, self._under_way(prefix)
        while time.monotonic() <= give_up:
            yield
            time.sleep(POLL_S)
            if (now := self._under_way(prefix)) != seen:
                give_up, seen = time.monotonic() + self.patience_s, now

    def _under_way(self, prefix: str) -> set[tuple[str, int]]:
        """What is being fetched, and how much of each is here."""
        found = set()
        for entry in self._entries():
            if entry.name.startswith(prefix) and _PARTIAL.fullmatch(entry.name):
                with suppress(FileNotFoundError):
                    found.add((entry.name, entry.stat().st_size))
        return found

    def _entries(self) -> list[os.DirEntry[str]]:
        with os.scandir(self._shards) as entries:
            return list(entries)

    def _reserve(self, sha256: str, num_bytes: int, *, wait: bool) -> Path | None:
        """An empty file whose name holds ``num_bytes`` of the room, once there is enough of it."""
        partial = self._shards / f"{sha256}.{num_bytes}.{uuid4().hex}.partial"
        for _ in self._while_others_get_on():
            with self._room():
                fits, others_fetch = self._make_room(num_bytes, sha256)
                # Nothing left to evict: others' shards become that once they are whole. Alone, one has to fit.
                if fits or (wait and not others_fetch):
                    partial.touch(mode=0o600)
                    return partial
            if not wait:
                return None
        raise Held(f"the cache of {self.max_bytes / 2**30:.3g} GiB is full of shards that others are fetching")

    @contextmanager
    def _room(self) -> Iterator[None]:
        """Held for moments, by who counts or changes what is here."""
        lock = FileLock(self._locks / "room", timeout=self.patience_s, poll_interval=POLL_S)
        try:
            lock.acquire()
        except Timeout:
            raise Held("another process has not let go of the cache's lock") from None
        try:
            yield
        finally:
            lock.release()

    def _make_room(self, num_bytes: int, sha256: str) -> tuple[bool, bool]:
        """Evict until ``num_bytes`` fit; whether they do, and whether other processes hold some of the room."""
        reserved = 0
        kept: list[_Kept] = []
        for entry in self._entries():
            with suppress(FileNotFoundError):
                if partial := _PARTIAL.fullmatch(entry.name):
                    if self._is_dead(partial[1], mine=sha256):
                        os.unlink(entry.path)
                    else:
                        reserved += int(partial[2])
                else:
                    status = entry.stat()
                    kept.append(_Kept(status.st_atime_ns, entry.name, status))
        room = self.max_bytes - reserved - sum(one.status.st_size for one in kept)
        room = min(room, shutil.disk_usage(self._shards).free - reserved)
        for oldest in sorted(kept):
            if room >= num_bytes:
                break
            (self._shards / oldest.name).unlink(missing_ok=True)
            self._checked.forget(oldest.status, self._shards / oldest.name, oldest.name)
            room += oldest.status.st_size
        return room >= num_bytes, reserved > 0

    def _is_dead(self, sha256: str, *, mine: str) -> bool:
        """Whether no process fetches it any more; under a lock that this one holds, none does."""
        if sha256[:_LOCK_DIGITS] == mine[:_LOCK_DIGITS]:
            return True
        try:
            with FileLock(self._locks / sha256[:_LOCK_DIGITS], timeout=0, blocking=False):
                return True
        except Timeout:
            return False
