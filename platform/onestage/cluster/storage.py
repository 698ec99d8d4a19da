"""Where a run's files go: a folder that all machines see, or an address that fsspec opens, such as ``s3://``.

Credentials come from the environment alone, and no message shows those of an address.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

from onestage.data import cache
from onestage.data.store import is_address, open_store, redacted
from onestage.errors import InputError
from onestage.training.checkpoint_files import BEST, LAST, by_age, damage, kept_name, kept_steps, newest

_BUCKETS: Final = {"s3", "s3a", "gs", "gcs", "az", "abfs", "adl", "oci", "oss"}
LEFT_S: Final = 86_400.0
"""A marker so old is nobody's: a driver makes a new one for each group of workers, within a minute of its start."""
CHECK_S: Final = 60.0
"""So long a storage may take for a few bytes."""

Say = Callable[[str], None]


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all. Raises OSError."""
    partial = path.with_suffix(".partial")
    with partial.open("w") as file:
        file.write(json.dumps(value, indent=1))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


class RunFolder:
    """The files of run ``run_id`` under ``storage``.

    ``local`` is where this machine reads and writes them. Under an address that is a folder of its own, and
    ``send`` and ``send_checkpoints`` bring to the address what is to last; in a folder they have nothing to do.
    """

    def __init__(self, storage: str, run_id: str) -> None:
        self.is_remote = is_address(storage)
        self.address = f"{storage.rstrip('/')}/{run_id}" if self.is_remote else str(Path(storage) / run_id)
        self.local = cache.folder(None) / "runs" / run_id if self.is_remote else Path(storage) / run_id
        self.checkpoints = self.local / "checkpoints"
        self._there: tuple[Any, str] | None = None
        self._sent: dict[str, tuple[int, int, int]] = {}  # by name, which content of which file

    def shown(self) -> str:
        """The place as messages show it."""
        return redacted(self.address)

    def send(self, path: Path) -> None:
        """Copies a file or a folder below ``local`` to the address. Raises OSError where that fails."""
        if not self.is_remote:
            return
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                self._put(file, file.relative_to(self.local).as_posix())

    def send_checkpoints(self, *, keep: int) -> None:
        """Makes the checkpoints at the address those of ``local``: the newest, ``keep - 1`` before it, and the best.

        What the address has under another name is copied there. Raises OSError where something fails.
        """
        if not self.is_remote:
            return
        names = {path.name for path in self.checkpoints.glob("*.ckpt")}
        # The one before the last is still there under the last one's name; and whoever sees the last sees its best.
        for name in [*(kept_name(step) for step in kept_steps(list(names))), BEST, LAST]:
            if name in names:
                self._put_checkpoint(name)
        files, root = self._connection()
        for step in kept_steps(self._names_there())[max(keep - 1, 0) :]:
            files.rm_file(f"{root}/checkpoints/{kept_name(step)}")

    def fetch(self, name: str) -> Path | None:
        """The file ``name`` of the run, brought here from the address; None where there is none."""
        path = self.local / name
        if self.is_remote:
            files, root = self._connection()
            if not files.exists(f"{root}/{name}"):
                return None
            self._get(f"{root}/{name}", path)
        return path if path.is_file() else None

    def fetch_checkpoint(self, say: Say) -> Path | None:
        """The newest checkpoint that is whole, on this machine; ``say`` gets a line for each that is not."""
        if not self.is_remote:
            return newest(self.checkpoints, say)
        self.fetch(f"checkpoints/{BEST}")
        for name in by_age(self._names_there()):
            path = self.fetch(f"checkpoints/{name}")
            if path is None:
                continue
            if (why := damage(path)) is None:
                return path
            say(f"checkpoint {self.shown()}/checkpoints/{name} is damaged ({why}): passed over")
            path.unlink()
        return None

    def ray_storage(self) -> dict[str, Any]:
        """Where Ray Train keeps what is its own, as RunConfig takes it."""
        if not self.is_remote:
            return {"storage_path": str(self.local / "ray")}
        from pyarrow.fs import FSSpecHandler, PyFileSystem

        files, root = self._connection()
        return {"storage_path": f"{root}/ray", "storage_filesystem": PyFileSystem(FSSpecHandler(files))}

    def _connection(self) -> tuple[Any, str]:
        if self._there is None:
            self._there = _opened(self.address)
        return self._there

    def _names_there(self) -> list[str]:
        files, root = self._connection()
        files.invalidate_cache()
        try:
            return [path.rsplit("/", 1)[-1] for path in files.ls(f"{root}/checkpoints", detail=False)]
        except FileNotFoundError:
            return []

    def _put_checkpoint(self, name: str) -> None:
        path = self.checkpoints / name
        status = path.stat()
        content = (status.st_ino, status.st_mtime_ns, status.st_size)
        if self._sent.get(name) == content:
            return
        files, root = self._connection()
        twin = next((other for other, sent in self._sent.items() if sent == content), None)
        if twin is None:
            self._put(path, f"checkpoints/{name}")
        else:
            files.copy(f"{root}/checkpoints/{twin}", f"{root}/checkpoints/{name}")
        self._sent[name] = content

    def _put(self, path: Path, name: str) -> None:
        """An object store has the whole file or the one before; its size says that it was this one."""
        files, root = self._connection()
        _make_folder(files, f"{root}/{name}".rpartition("/")[0])
        files.put_file(str(path), f"{root}/{name}")
        files.invalidate_cache()
        size, expected = files.info(f"{root}/{name}")["size"], path.stat().st_size
        if size != expected:
            raise OSError(0, f"{self.shown()}/{name} has {size} bytes there, not {expected}")

    def _get(self, there: str, path: Path) -> None:
        files, _ = self._connection()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{uuid4().hex}.fetching")  # other ranks of this machine fetch it too
        try:
            files.get_file(there, str(partial))
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def _opened(address: str) -> tuple[Any, str]:
    """The file system of an address, and the path there."""
    import fsspec

    open_store(address)  # raises InputError for what must not be opened, or can't be for want of a package
    files, path = fsspec.core.url_to_fs(address, skip_instance_cache=not address.startswith("memory:"))
    return files, path


def _make_folder(files: Any, path: str) -> None:
    """Folders in a bucket are but names, and making one would make a bucket that was misspelt."""
    protocols = {files.protocol} if isinstance(files.protocol, str) else set(files.protocol)
    if not protocols & _BUCKETS:
        files.makedirs(path, exist_ok=True)


def check_storage(storage: str) -> None:
    """Writes a small file, reads it back and deletes it. Raises InputError with the host and what to do."""
    content = uuid4().hex.encode()
    name = f".check-{uuid4().hex}"

    def try_out() -> None:
        if is_address(storage):
            files, root = _opened(storage)
            _make_folder(files, root)
            files.pipe_file(f"{root}/{name}", content)
            found = files.cat_file(f"{root}/{name}")
            files.rm_file(f"{root}/{name}")
        else:
            path = Path(storage) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with path.open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                found = path.read_bytes()
            finally:
                path.unlink(missing_ok=True)
        if found != content:
            raise OSError(0, "what was written is not what is read back")

    _within(try_out, storage)


def _within(work: Callable[[], None], storage: str) -> None:
    """Runs ``work`` for at most ``CHECK_S``; a mount whose server is away answers never."""
    errors: list[Exception] = []

    def run() -> None:
        try:
            work()
        except Exception as error:  # each store has errors of its own
            errors.append(error)

    thread = threading.Thread(target=run, name="storage-check", daemon=True)
    thread.start()
    thread.join(CHECK_S)
    if thread.is_alive():
        errors.append(TimeoutError(0, f"no answer in {CHECK_S:g} s"))
    if errors:
        error = errors[0]
        if isinstance(error, InputError):
            raise error
        said = getattr(error, "strerror", None) or next(iter(str(error).splitlines()), "") or type(error).__name__
        raise InputError(
            f"storage={redacted(storage)} can't be used on {socket.gethostname()} ({redacted(said)}): "
            f"mend it or its permissions there, or set storage=... to a place that all machines can write"
        ) from error


@contextlib.contextmanager
def marked(storage: str) -> Iterator[str]:
    """Within this a marker lies in ``storage``, for ``same_place`` on another machine; an address needs none."""
    token = uuid4().hex
    if is_address(storage):
        yield token
        return
    path = Path(storage) / f".same-{token}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    for left in path.parent.glob(".same-*"):  # by drivers that were killed
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > LEFT_S:
                left.unlink()
    try:
        yield token
    finally:
        path.unlink(missing_ok=True)


def same_place(storage: str, token: str) -> None:
    """Raises InputError where ``storage`` is another folder here than where ``marked`` gave the token, or hangs."""
    if is_address(storage):
        return
    folder = Path(storage)

    def look() -> None:
        with contextlib.suppress(OSError):
            os.scandir(folder).close()  # an NFS client asks its server anew
        if not (folder / f".same-{token}").exists():
            raise InputError(
                f"storage={storage} on {socket.gethostname()} is not the folder that the driver has under that name: "
                f"set storage=... to a folder on a network file system, or to an address such as s3://BUCKET/runs"
            )

    _within(look, storage)
