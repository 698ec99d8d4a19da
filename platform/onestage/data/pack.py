"""A dataset folder from what a format's reader found: the images as they are, in tar shards of even bytes.

Shards are written side by side in ``.{name}.partial`` beside the dataset folder, which is only renamed to its place
when it is whole. A journal there names each shard that is done, so that the same import goes on where it was cut.
"""

import errno
import hashlib
import io
import json
import logging
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from typing import BinaryIO, Final, NamedTuple

from filelock import FileLock, Timeout

from onestage.data.formats.record import Record, Source
from onestage.data.images import MAGIC
from onestage.data.manifest import FILE_NAME, Manifest, Shard, Split, key_of
from onestage.data.threads import num_cores
from onestage.errors import InputError

SAMPLES_PER_SHARD: Final = 256
MAX_SHARD_BYTES: Final = 64 * 2**20
MAX_WORKERS: Final = 8
"""Threads by default: reading, hashing and writing hold no interpreter lock, but the fifth part in between does."""
LAYOUT: Final = 2
"""Of the bytes in a shard: what another layout left half done is not gone on with."""
JOURNAL: Final = "journal.jsonl"
TELL_EVERY_S: Final = 0.2
MEMBERS: Final = dict(zip(MAGIC, ("jpg", "png"), strict=True))

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Told (images done, images in all) a few times a second: first with those that an earlier import left, last with all.

It runs in the thread that called ``pack``."""


def pack(
    source: Source,
    out: Path | str,
    *,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    num_workers: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Write ``source`` as the dataset folder ``out``, all of it or nothing, with ``num_workers`` threads.

    Equal sources give equal bytes. A dataset that is there already is left when it has the same content; any other is
    an ``InputError`` unless ``overwrite``. A folder that is no dataset is never replaced. Cut short, even by a kill,
    the same call goes on behind the last shard that was finished.
    """
    if samples_per_shard < 1:
        raise InputError(f"need at least one sample per shard, got {samples_per_shard}")
    if num_workers is not None and num_workers < 1:
        raise InputError(f"need at least one worker to pack with, got {num_workers}")
    out = Path(os.path.abspath(out))
    if not out.name:
        raise InputError(f"{out} is no place for a dataset folder: choose a folder below it")
    with _writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    with _alone(out):
        old = _old(out)
        if old.exists() and not out.exists():  # killed amid ``_replace``
            os.rename(old, out)
        if out.exists() and not (out.is_dir() and ((out / FILE_NAME).is_file() or not any(out.iterdir()))):
            raise InputError(f"{out} exists and is no dataset folder: choose another place")
        present = Manifest.load(out) if (out / FILE_NAME).is_file() and not overwrite else None
        if present is not None and _outline(present) != _outline(source):
            raise _taken(out, present)
        partial = _Partial(out, _plan(source, samples_per_shard))
        shards = partial.fill(num_workers=num_workers or _automatic_workers(), progress=progress or _quiet)
        manifest = Manifest(name=source.name, classes=source.classes, splits=_splits(source, shards))
        if present is None:
            with _writing(out):
                manifest.save(partial.dataset)
                _sync(partial.dataset / FILE_NAME)
                _sync(partial.dataset)
                _replace(out, partial.dataset)
        partial.remove()
        if present is not None and present.content_hash != manifest.content_hash:
            raise _taken(out, present)
        if present is not None:
            log.info("%s holds this dataset already and is left as it is", out)
        return present or manifest


class _Item(NamedTuple):
    """An image as it was when the plan was made."""

    record: Record
    num_bytes: int
    mtime_ns: int


class _Job(NamedTuple):
    """A shard to be written; its images are numbered from ``first`` on."""

    split: str
    name: str
    first: int
    items: list[_Item]


class _Plan(NamedTuple):
    """All shards, and a ``fingerprint`` of everything that decides their bytes."""

    jobs: list[_Job]
    fingerprint: str

    @property
    def num_images(self) -> int:
        return sum(len(job.items) for job in self.jobs)


def _plan(source: Source, samples_per_shard: int) -> _Plan:
    jobs: list[_Job] = []
    first = 0
    digest = hashlib.sha256(json.dumps([LAYOUT, source.classes, list(source.splits)]).encode())
    for split, records in source.splits.items():
        for number, items in enumerate(_groups(records, samples_per_shard)):
            jobs.append(_Job(split, f"{split}-{number:06d}.tar", first, items))
            digest.update(f"{jobs[-1].name} {first}".encode())
            for image_id, (record, num_bytes, mtime_ns) in enumerate(items, start=first):
                digest.update(f"{record.path.absolute()} {num_bytes} {mtime_ns}".encode("utf-8", "surrogateescape"))
                digest.update(_json(record, image_id))
            first += len(items)
    return _Plan(jobs, digest.hexdigest())


def _groups(records: list[Record], samples_per_shard: int) -> Iterator[list[_Item]]:
    """The images of each shard: as many as asked for, fewer where they are large."""
    group: list[_Item] = []
    num_bytes = 0
    for record in records:
        try:
            status = record.path.stat()
        except OSError as error:
            raise _unreadable(record.path, error) from error
        if group and (len(group) == samples_per_shard or num_bytes + status.st_size > MAX_SHARD_BYTES):
            yield group
            group, num_bytes = [], 0
        group.append(_Item(record, status.st_size, status.st_mtime_ns))
        num_bytes += status.st_size
    if group:
        yield group


class _Partial:
    """The folder ``.{name}.partial`` beside ``out``: the journal, and the dataset as far as it has come."""

    def __init__(self, out: Path, plan: _Plan) -> None:
        self.out = out
        self.plan = plan
        self.folder = out.with_name(f".{out.name}.partial")
        self.dataset = self.folder / "dataset"
        self._lock = Lock()

    def fill(self, *, num_workers: int, progress: Progress) -> dict[str, Shard]:
        """All shards of the plan by name, those that are missing written now."""
        shards = self._begin()
        rest = [job for job in self.plan.jobs if job.name not in shards]
        if shards:
            log.info("%s: an import was cut here; %d of %d shards are kept", self.out, len(shards), len(self.plan.jobs))
        tally = _Tally(sum(shard.num_samples for shard in shards.values()))
        progress(tally.done, self.plan.num_images)
        with ThreadPoolExecutor(num_workers, thread_name_prefix="pack") as threads:
            try:
                running = {threads.submit(self._write, job, tally) for job in rest}
                while running:
                    finished, running = wait(running, timeout=TELL_EVERY_S, return_when=FIRST_COMPLETED)
                    shards.update((shard.name, shard) for shard in (one.result() for one in finished))
                    progress(tally.done, self.plan.num_images)
            except BaseException:
                tally.stop = True
                threads.shutdown(wait=False, cancel_futures=True)
                raise
        return shards

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _begin(self) -> dict[str, Shard]:
        """The shards that an import of the same plan has finished; whatever else lies here is removed."""
        shards = self._finished()
        if not shards:
            self.remove()
        with _writing(self.out):
            self.dataset.mkdir(parents=True, exist_ok=True)
            for path in self.dataset.iterdir():
                if path.name not in shards:
                    path.unlink()
            # Anew: a kill may have left half a line at the end.
            journal = self.folder / f"{JOURNAL}.new"
            lines = [{"plan": self.plan.fingerprint}, *map(asdict, shards.values())]
            journal.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
            _sync(journal)
            os.replace(journal, self.folder / JOURNAL)
        return shards

    def _finished(self) -> dict[str, Shard]:
        shards: dict[str, Shard] = {}
        try:
            begun, *lines = (self.folder / JOURNAL).read_text(encoding="utf-8").splitlines()
            if json.loads(begun) != {"plan": self.plan.fingerprint}:
                return {}
            for shard in (Shard(**json.loads(line)) for line in lines):
                if (self.dataset / shard.name).stat().st_size == shard.num_bytes:
                    shards[shard.name] = shard
        except (OSError, ValueError, TypeError):
            pass  # no journal, or its last line is cut: what was read before holds
        return shards

    def _write(self, job: _Job, tally: "_Tally") -> Shard:
        with _writing(self.out):
            shard = _write_shard(job, self.dataset, tally)
            with self._lock, (self.folder / JOURNAL).open("a", encoding="utf-8") as journal:
                journal.write(f"{json.dumps(asdict(shard))}\n")
                journal.flush()
                os.fsync(journal.fileno())
        return shard


class _Stopped(Exception):
    """Another shard has failed, or the person has had enough."""


class _Tally:
    """The images that all threads have packed, and the sign for them to ``stop``."""

    def __init__(self, done: int) -> None:
        self.done = done
        self.stop = False
        self._lock = Lock()

    def one_more(self) -> None:
        if self.stop:
            raise _Stopped
        with self._lock:
            self.done += 1


class _Hashed(io.RawIOBase):
    """Writes to ``file``, and knows how much and the sha256 of it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()
        self.num_bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, content: bytes) -> int:  # type: ignore[override]
        self.sha256.update(content)
        self.num_bytes += len(content)
        return self.file.write(content)

    def tell(self) -> int:
        return self.num_bytes


def _write_shard(job: _Job, folder: Path, tally: _Tally) -> Shard:
    """One shard, under its name only once all of it is on the disk."""
    unfinished = folder / f".{job.name}"
    with unfinished.open("wb") as file:
        hashed = _Hashed(file)
        # Each image is written in one piece: thousands of small ones would have the threads queue for Python.
        with tarfile.TarFile(fileobj=hashed, mode="w", format=tarfile.USTAR_FORMAT, copybufsize=2**30) as tar:
            for image_id, item in enumerate(job.items, start=job.first):
                content = _content(item)
                _add(tar, f"{key_of(image_id)}.{_member(content, item.record.path)}", content)
                _add(tar, f"{key_of(image_id)}.json", _json(item.record, image_id))
                tally.one_more()
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, folder / job.name)
    return Shard(job.name, len(job.items), hashed.num_bytes, hashed.sha256.hexdigest(), job.first)


def _content(item: _Item) -> bytes:
    path = item.record.path
    try:
        with path.open("rb", buffering=0) as file:
            content = file.read()
            changed = os.fstat(file.fileno()).st_mtime_ns != item.mtime_ns or len(content) != item.num_bytes
    except OSError as error:
        raise _unreadable(path, error) from error
    if changed:
        raise InputError(f"image {path} was changed while it was packed: import again when nothing writes to it")
    return content


def _member(content: bytes, path: Path) -> str:
    """Named by what it is: a PNG called .jpg would fool who reads the shard by its names."""
    for magic, member in MEMBERS.items():
        if content.startswith(magic):
            return member
    raise InputError(f"image {path} is no JPEG or PNG: mend or remove it")


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    # No time, owner or mode of this machine: equal content must give equal bytes, and so an equal hash.
    info = tarfile.TarInfo(name)
    info.size = len(content)
    info.mode = 0o444
    tar.addfile(info, io.BytesIO(content))


def _json(record: Record, image_id: int) -> bytes:
    fields = {
        "image_id": image_id,
        "source": record.source,
        "width": record.width,
        "height": record.height,
        "orientation": record.orientation,
        "boxes": record.boxes,
        "labels": record.labels,
        "difficult": record.difficult,
        "crowd": record.crowd,
    }
    return json.dumps(fields, separators=(",", ":")).encode()


def _splits(source: Source, shards: dict[str, Shard]) -> dict[str, Split]:
    in_order = sorted(shards.values(), key=lambda shard: shard.first)
    return {
        split: Split(tuple(shard for shard in in_order if shard.name.rpartition("-")[0] == split))
        for split in source.splits
    }


def _outline(dataset: Source | Manifest) -> tuple[object, ...]:
    """What two datasets of the same content have in common, known without packing."""
    if isinstance(dataset, Source):
        counts = {name: len(records) for name, records in dataset.splits.items()}
    else:
        counts = {name: split.num_samples for name, split in dataset.splits.items()}
    return dataset.classes, counts


def _taken(out: Path, present: Manifest) -> InputError:
    return InputError(f"{out} holds another dataset, {present.name!r}: choose another place or overwrite it")


def _unreadable(path: Path, error: OSError) -> InputError:
    what = "has vanished" if isinstance(error, FileNotFoundError) else f"can't be read: {error.strerror}"
    return InputError(f"image {path} {what}: put it right and import again")


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Two imports must not mix in one partial folder; the lock goes with its process, however that ends."""
    path = out.with_name(f".{out.name}.lock")
    lock = FileLock(path)
    with _writing(out):
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise InputError(f"another import is writing {out}: wait for it or choose another place") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """A disk that can't be written to is no fault of the program: one line says which and why."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what = "the disk is full: free some space, and the same import goes on where it stopped"
        elif isinstance(error, FileExistsError | NotADirectoryError):
            what = "a part of this path is a file: choose another place"
        else:
            what = f"{error.strerror or error}: choose another place"
        raise InputError(f"can't write {out}: {what}") from error


def _replace(out: Path, dataset: Path) -> None:
    """Put ``dataset`` in the place of ``out``; a folder that holds files can't be replaced in one step."""
    old = _old(out)
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.rename(out, old)
    os.rename(dataset, out)
    _sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _old(out: Path) -> Path:
    return out.with_name(f".{out.name}.old")


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _automatic_workers() -> int:
    return min(MAX_WORKERS, num_cores())


def _quiet(done: int, num_images: int) -> None:
    """The progress that nobody asked for."""
