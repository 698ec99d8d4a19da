"""Where a dataset folder lies: on this machine, or behind an address that fsspec opens, such as ``https://``, ``s3://``.

A store hands out whole, verified shards as opened files. What can pass, a timeout, a broken connection, an overloaded
server, a wrong checksum, is tried again; each attempt, and so the whole, has an end. Credentials come from the
environment alone, and no message shows those of an address.
"""

import errno
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import wait as wait_for
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import SystemRandom
from threading import Thread
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Protocol
from urllib.parse import quote, unquote, urlsplit
from uuid import uuid4
from weakref import WeakSet

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt

from onestage.data import cache
from onestage.data.faults import Unreadable
from onestage.errors import InputError

if TYPE_CHECKING:
    from onestage.data.manifest import Shard

BACKOFF_S: Final = 0.5
MAX_BACKOFF_S: Final = 30.0
SLOW_BYTES_PER_S: Final = 16 * 2**10
"""A shard that comes at less than this for ``timeout_s`` on end is given up: a trickle is no answer."""
REMEMBERED_S: Final = 60.0
REMEMBERED_TIMES: Final = 10
"""A shard that failed isn't tried again for so many times as long as that took: little time goes into what is dead."""
MAX_MANIFEST_BYTES: Final = 256 * 2**20
_POLL_S: Final = 0.5
_CONNECT_S: Final = 15.0

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_CHAIN = re.compile(r"[A-Za-z][A-Za-z0-9+._-]*::")
_USERINFO = re.compile(r"(?<=://)[^/\s]+@")
_QUERY = re.compile(r"(://[^\s?'\"]*)\?[^\s'\")]*")
SHA256: Final = re.compile(r"[0-9a-f]{64}")
_WRAPPERS = {"async_wrapper", "blockcache", "cached", "data", "dir", "filecache", "generic", "libarchive"}
_WRAPPERS |= {"reference", "simplecache", "tar", "zip"}
_COPY_AGAIN: Final = "copy the dataset again, or import it again"
_UPLOAD_AGAIN: Final = "upload the dataset again"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSettings:
    """How to read from elsewhere; each is ``data.<name>`` in the config.

    ``cache`` is the folder of the cache (None: ``ONESTAGE_CACHE``, else the user's), ``cache_gib`` its bound.
    ``timeout_s`` is how long an attempt may go on with no answer, or with a trickle. ``retries`` is how often what
    failed is tried again.
    """

    cache: str | None = None
    cache_gib: float = 50.0
    timeout_s: float = 60.0
    retries: int = 4

    def __post_init__(self) -> None:
        for name in ("cache_gib", "timeout_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"need data.{name} > 0, got {getattr(self, name)}")
        if self.retries < 0:
            raise ValueError(f"need data.retries >= 0, got {self.retries}")

    @property
    def cache_bytes(self) -> int:
        return int(self.cache_gib * 2**30)


class Store(Protocol):
    """A dataset folder, read only. It may be used on both sides of a fork, and pickled."""

    @property
    def settings(self) -> StoreSettings:
        """How it reads."""
        ...

    @property
    def is_remote(self) -> bool:
        """Whether shards are fetched before they are read."""
        ...

    def shown(self, name: str = "") -> str:
        """The address of the folder, or of a file in it, as messages show it."""
        ...

    def manifest_bytes(self, name: str) -> bytes:
        """The content of the manifest file ``name``; ``InputError`` where it can't be had."""
        ...

    def open(self, shard: "Shard") -> BinaryIO:
        """The whole, verified shard, opened to be read with pread; ``Unreadable`` says why it can't be had.

        The file is the caller's: it stays readable when the cache lets go of it.
        """
        ...

    def fetch_ahead(self, shard: "Shard") -> None:
        """Bring the shard near if that needs no waiting for others; what fails is left to ``open``."""
        ...


def open_store(root: str | Path, *, settings: StoreSettings | None = None) -> Store:
    """The store of the dataset folder ``root``, a path or an address; nothing is read yet.

    ``InputError`` for an address that can't be read here, or that would run or wrap something.
    """
    settings = settings or StoreSettings()
    text = os.fspath(root)
    if text.lower().startswith("pipe:"):
        raise InputError("data never comes from a command (pipe:): give a folder, or an address such as s3://...")
    address = _URL.match(text)
    scheme = address[1].lower() if address else ""
    if _CHAIN.match(text) or scheme in _WRAPPERS:
        raise InputError(f"{redacted(text)} wraps another store: give that one's own address, shards are cached anyway")
    if not scheme:
        return LocalStore(Path(text), settings=settings)
    parts = urlsplit(text)
    if scheme in ("file", "local"):
        if parts.netloc not in ("", "localhost"):
            raise InputError(f"{redacted(text)} names a host: write file:///FOLDER for a folder of this machine")
        return LocalStore(Path(unquote(parts.path)), settings=settings)
    _require(scheme, text)
    return RemoteStore(scheme + text[len(scheme) :], scheme, settings=settings)


def is_address(root: str | Path) -> bool:
    """Whether ``root`` is an address of another place rather than a path; a ``Path`` never is.

    >>> is_address("s3://bucket/coco"), is_address("/data/coco"), is_address("pipe:curl")
    (True, False, True)
    """
    return isinstance(root, str) and (_URL.match(root) is not None or root.lower().startswith("pipe:"))


def redacted(text: str) -> str:
    """``text`` without what may be secret in its addresses: user, password and query.

    >>> redacted("no answer from https://ann:pw@host/data?sig=abc")
    'no answer from https://***@host/data?***'
    """
    return _QUERY.sub(r"\1?***", _USERINFO.sub("***@", text))


class LocalStore:
    """A folder of this machine, network mounts included: shards are read where they lie."""

    is_remote: Final = False

    def __init__(self, root: Path, *, settings: StoreSettings) -> None:
        self.root = root
        self.settings: Final = settings
        self._checked: cache.Checked | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_checked": None}

    def shown(self, name: str = "") -> str:
        return str(self.root / name)

    def manifest_bytes(self, name: str) -> bytes:
        path = self.root / name
        try:
            if not self.root.is_dir():
                raise InputError(f"no dataset folder at {self.root}: check the path")
            if not path.is_file():
                raise InputError(
                    f"{self.root} is no dataset folder (no {name}): make one with `onestage data import ...`"
                )
            return path.read_bytes()
        except OSError as error:
            raise InputError(f"{path} can't be read ({error.strerror}): check the disk and the permissions") from error

    def open(self, shard: "Shard") -> BinaryIO:
        path = self.root / shard.name
        try:
            file = path.open("rb", buffering=0)
        except FileNotFoundError:
            raise self._broken(shard, "is missing") from None
        except OSError as error:
            raise self._broken(shard, f"can't be opened ({error.strerror})") from error
        try:
            if (num_bytes := os.fstat(file.fileno()).st_size) != shard.num_bytes:
                raise self._broken(shard, f"has {num_bytes} bytes where dataset.json says {shard.num_bytes}")
            # A dataset that was made without checksums has none to differ.
            if shard.sha256 and not self._once().matches(file, path, shard.sha256):
                raise self._broken(shard, "is not what dataset.json says (its checksum differs)")
        except OSError as error:
            file.close()
            raise self._broken(shard, f"can't be read ({error.strerror})") from error
        except BaseException:
            file.close()
            raise
        return file

    def fetch_ahead(self, shard: "Shard") -> None:
        """Nothing to bring: it is here."""

    def _once(self) -> cache.Checked:
        if self._checked is None:
            folder = None
            with suppress(InputError):  # no place for markers: each process verifies for itself
                folder = cache.folder(self.settings.cache)
            self._checked = cache.Checked(folder)
        return self._checked

    def _broken(self, shard: "Shard", what: str) -> Unreadable:
        return Unreadable(f"shard {self.root / shard.name} {what}: {_COPY_AGAIN}")


class _Fault(Exception):
    """An attempt that failed: why, what to do, whether another may help, and whether the store itself is to blame."""

    def __init__(self, why: str, advice: str, *, passing: bool, ill: bool = False, after_s: float = 0.0) -> None:
        super().__init__(why)
        self.why, self.advice, self.passing, self.ill, self.after_s = why, advice, passing, ill, after_s


class RemoteStore:
    """A folder behind ``address``, read through the cache of this machine.

    A shard that could not be had is remembered by the store, its forks and its pickles, so that not each of its samples
    waits for it again. After a store has not answered, other shards get one attempt each until one of them arrives.
    """

    is_remote: Final = True

    def __init__(self, address: str, scheme: str, *, settings: StoreSettings) -> None:
        self.settings: Final = settings
        self._address = address
        self._scheme = scheme
        # Forks and pickles share what failed; another run, maybe after somebody mended it, starts afresh.
        self._run = uuid4().hex
        self._here: _Connection | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_here": None}

    def shown(self, name: str = "") -> str:
        return redacted(self._remote(name))

    def manifest_bytes(self, name: str) -> bytes:
        try:
            with tempfile.TemporaryDirectory(prefix="onestage-") as folder:
                for attempt in self._attempts(name, self.settings.retries):
                    # A file of its own: what an attempt that was given up still writes must not mix with the next.
                    path = Path(folder) / str(attempt.retry_state.attempt_number)
                    with attempt:
                        self._transfer(name, path, max_bytes=MAX_MANIFEST_BYTES)
                return path.read_bytes()
        except _Fault as fault:
            raise InputError(f"no dataset at {self.shown()} ({name}: {fault.why}): {fault.advice}") from None
        except OSError as error:
            raise InputError(f"no temporary file can be written ({error.strerror}): free some disk") from None

    def open(self, shard: "Shard") -> BinaryIO:
        here, sha256 = self._connection(), self._content(shard)
        started = time.monotonic()
        try:
            if (file := self._kept(here, shard)) is not None:
                return file
            with here.cache.alone(sha256):
                # Meanwhile another process has fetched it, or failed to.
                return self._kept(here, shard) or self._fetch_or_remember(here, shard)
        except cache.Held as error:
            why = f"can't be had: {error}; end that process"
            raise self._remember(here, shard, why, took_s=here.cache.patience_s) from None
        except OSError as error:
            why = f"can't be cached ({error.strerror or type(error).__name__}): mend the disk, or set data.cache"
            raise self._remember(here, shard, why, took_s=time.monotonic() - started) from None

    def fetch_ahead(self, shard: "Shard") -> None:
        with suppress(_Fault, cache.Held, InputError, OSError):
            here, sha256 = self._connection(), self._content(shard)
            if here.cache.has(sha256) or here.ill or self._remembered(here, shard):
                return
            with here.cache.alone(sha256, wait=False):
                if not here.cache.has(sha256) and (file := self._fetch(here, shard, retries=0, wait=False)) is not None:
                    file.close()

    def _connection(self) -> "_Connection":
        if self._here is None or self._here.pid != os.getpid():
            self._here = _Connection(self._address, self._scheme, self.settings)
        return self._here

    def _kept(self, here: "_Connection", shard: "Shard") -> BinaryIO | None:
        """The shard where the cache has it; ``Unreadable`` where it is known that it can't be had."""
        file = here.cache.open(shard.sha256, shard.num_bytes)
        if file is None and (why := self._remembered(here, shard)) is not None:
            raise Unreadable(why)
        return file

    def _fetch_or_remember(self, here: "_Connection", shard: "Shard") -> BinaryIO:
        started = time.monotonic()
        retries = 0 if here.ill else self.settings.retries
        try:
            file = self._fetch(here, shard, retries=retries)
        except _Fault as fault:
            here.ill = here.ill or fault.ill
            attempts = f"after {retries + 1} attempts " if fault.passing and retries else ""
            why = f"can't be had {attempts}({fault.why}): {fault.advice}"
            raise self._remember(here, shard, why, took_s=time.monotonic() - started) from None
        assert file is not None  # who waits for room gets it, or Held
        here.ill = False
        return file

    def _fetch(self, here: "_Connection", shard: "Shard", *, retries: int, wait: bool = True) -> BinaryIO | None:
        """The shard, from there into the cache; a ``_Fault`` is that of the last attempt."""

        def download(path: Path) -> None:
            self._transfer(shard.name, path, max_bytes=shard.num_bytes)

        for attempt in self._attempts(shard.name, retries):
            with attempt:
                try:
                    return here.cache.fetch(shard.sha256, shard.num_bytes, download, wait=wait)
                except cache.Differs as error:
                    raise _Fault(str(error), _UPLOAD_AGAIN, passing=True) from None
        raise AssertionError("an attempt returns or raises")

    def _attempts(self, name: str, retries: int) -> Retrying:
        def tell(state: RetryCallState) -> None:
            fault = state.outcome and state.outcome.exception()
            assert state.next_action is not None
            again = f"attempt {state.attempt_number + 1} of {retries + 1} in {state.next_action.sleep:.1f} s"
            log.warning("%s: %s; %s", self.shown(name), fault, again)

        return Retrying(
            stop=stop_after_attempt(retries + 1),
            wait=_pause_s,
            retry=retry_if_exception(lambda error: isinstance(error, _Fault) and error.passing),
            before_sleep=tell,
            reraise=True,
        )

    def _transfer(self, name: str, path: Path, *, max_bytes: int) -> None:
        """One attempt to copy the file ``name`` to ``path``; a ``_Fault`` says what came of it."""
        try:
            self._watch(*self._connection().begin(name, path), max_bytes=max_bytes)
        except Exception as error:
            raise _diagnosed(error, path, self.settings.timeout_s) from None

    def _watch(self, transfer: "Future[None]", so_far: Callable[[], int], *, max_bytes: int) -> None:
        """Wait for the end of ``transfer``, as long as it gets on."""
        timeout_s = self.settings.timeout_s
        mark, since = 0, time.monotonic()
        while not wait_for([transfer], timeout=min(_POLL_S, timeout_s / 4)).done:
            now, got = time.monotonic(), so_far()
            if got > max_bytes:
                transfer.cancel()
                raise cache.Differs(f"it has more than {max_bytes} bytes")
            if now - since >= timeout_s:
                if got - mark < SLOW_BYTES_PER_S * (now - since):
                    transfer.cancel()
                    raise TimeoutError(f"{got} bytes" if got else "")
                mark, since = got, now
        transfer.result()

    def _remote(self, name: str) -> str:
        return _join(self._scheme, self._address, name) if name else self._address

    def _content(self, shard: "Shard") -> str:
        if not SHA256.fullmatch(shard.sha256):
            raise InputError(f"{self.shown()} has no checksum for {shard.name}: make the dataset again and upload it")
        return shard.sha256

    def _remembered(self, here: "_Connection", shard: "Shard") -> str | None:
        return here.cache.failure(f"{shard.sha256}.{self._run}")

    def _remember(self, here: "_Connection", shard: "Shard", what: str, *, took_s: float) -> Unreadable:
        """The error to raise, noted for the shard's other samples and for all processes."""
        why = f"shard {self.shown(shard.name)} {what}"
        here.cache.note_failure(f"{shard.sha256}.{self._run}", why, for_s=max(REMEMBERED_S, REMEMBERED_TIMES * took_s))
        return Unreadable(why)


class _Connection:
    """What one process has of a store: its cache, its filesystem, and what it learned. Never shared with a fork."""

    def __init__(self, address: str, scheme: str, settings: StoreSettings) -> None:
        self.pid = os.getpid()
        self.ill = False
        _LIVE.add(self)
        self._address, self._scheme, self._settings = address, scheme, settings
        self._filesystem: tuple[Any, str] | None = None
        self._cache: cache.Cache | None = None

    @property
    def cache(self) -> cache.Cache:
        if self._cache is None:
            settings = self._settings
            # The longest that one who fetches may show no progress: an attempt without an answer, then a pause.
            patience_s = 2 * settings.timeout_s + MAX_BACKOFF_S
            folder = cache.folder(settings.cache)
            try:
                self._cache = cache.Cache(folder, max_bytes=settings.cache_bytes, patience_s=patience_s)
            except OSError as error:
                raise InputError(f"cache folder {folder} can't be used ({error.strerror}): set data.cache") from None
        return self._cache

    def begin(self, name: str, path: Path) -> "tuple[Future[None], Callable[[], int]]":
        """A copy of the file ``name`` to ``path`` under way, which can be cancelled, and how much of it is here."""
        from fsspec import get_filesystem_class
        from fsspec.callbacks import Callback

        callback = Callback()

        def so_far() -> int:
            on_disk = path.stat().st_size if path.exists() else 0
            return max(int(callback.value), on_disk)  # few of the clients that block tell the callback

        if not get_filesystem_class(self._scheme).async_impl:
            # Such a client may not bear two threads, nor be of use once it has hung: each copy has its own.
            def copy() -> None:
                fs, root = self._open()
                fs.get_file(_join(self._scheme, root, name), str(path), callback=callback)

            return _in_thread(copy), so_far

        import asyncio

        if self._filesystem is None:
            self._filesystem = self._open()
        fs, root = self._filesystem
        copying = fs._get_file(_join(self._scheme, root, name), str(path), callback=callback)
        return asyncio.run_coroutine_threadsafe(copying, fs.loop), so_far

    def _open(self) -> tuple[Any, str]:
        """Fsspec's filesystem for the address, and the root's path in it."""
        from fsspec import get_filesystem_class

        # Not by ``url_to_fs``, which takes any "::" for a chain, such as that in http://[::1]/; nor fsspec's shared
        # instance, which another part may have made with other limits.
        kind = get_filesystem_class(self._scheme)
        options = {**kind._get_kwargs_from_urls(self._address), **_limits(self._scheme, self._settings.timeout_s)}
        fs = kind(skip_instance_cache=True, **options)
        if self._scheme in ("s3", "s3a"):
            fs.retries = 1  # s3fs would try five times within each attempt of ours
        return fs, kind._strip_protocol(self._address)


_LIVE: Final[WeakSet[_Connection]] = WeakSet()
_INHERITED: Final[list[_Connection]] = []
# They talk on sockets, and an epoll, of the process that this one was forked from: to close them here would end them
# there, and so they are never collected.
os.register_at_fork(after_in_child=lambda: _INHERITED.extend(_LIVE))


def _limits(scheme: str, timeout_s: float) -> dict[str, Any]:
    """How a client is told to give up; fsspec has no common word for it. ``_watch`` holds for those not named here."""
    connect_s = min(timeout_s, _CONNECT_S)
    if scheme in ("http", "https"):
        from aiohttp import ClientTimeout

        timeout = ClientTimeout(total=None, sock_connect=connect_s, sock_read=timeout_s)
        return {"client_kwargs": {"timeout": timeout, "trust_env": True}}  # proxies and ~/.netrc
    if scheme in ("s3", "s3a"):
        retries = {"total_max_attempts": 1, "mode": "standard"}
        config = {"connect_timeout": connect_s, "read_timeout": timeout_s, "retries": retries}
        return {"config_kwargs": config, "max_concurrency": 1, "use_listings_cache": False}
    return {}


def _require(scheme: str, address: str) -> None:
    """``InputError`` where nothing that is installed opens this scheme."""
    from fsspec import get_filesystem_class

    try:
        get_filesystem_class(scheme)
    except ValueError:
        raise InputError(f"no store is known for {scheme}:// in {redacted(address)}: check the address") from None
    except ImportError as error:
        hint = str(error).strip() or f"install what fsspec needs for {scheme}://"
        raise InputError(f"{redacted(address)} can't be opened here: {_one_line(hint)}") from None


def _join(scheme: str, root: str, name: str) -> str:
    """The file ``name`` below ``root``; the query of an http address, such as a signature, stays behind the path.

    >>> _join("https", "https://host/data/?sig=abc", "train 1.tar")
    'https://host/data/train%201.tar?sig=abc'
    """
    if scheme not in ("http", "https"):
        return f"{root.rstrip('/')}/{name}"
    path, mark, query = root.partition("#")[0].partition("?")
    return f"{path.rstrip('/')}/{quote(name)}{mark}{query}"


def _in_thread(call: Callable[[], None]) -> "Future[None]":
    """A call that blocks can't be ended: where it never returns, its thread is left behind."""
    future: Future[None] = Future()

    def work() -> None:
        with suppress(InvalidStateError):
            try:
                call()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(None)

    Thread(target=work, name="onestage-fetch", daemon=True).start()
    return future


def _pause_s(state: RetryCallState) -> float:
    """Twice as long each time and a little at random, or as long as the server asked for."""
    # Not Python's own generator: what a training draws from it must not depend on how often a store failed.
    backoff_s = BACKOFF_S * (2.0 ** (state.attempt_number - 1) + SystemRandom().random())
    fault = state.outcome.exception() if state.outcome else None
    asked_s = fault.after_s if isinstance(fault, _Fault) else 0.0
    return min(max(backoff_s, asked_s), MAX_BACKOFF_S)


def _diagnosed(error: Exception, path: Path, timeout_s: float) -> _Fault:
    """What an attempt's error means for the next one."""
    status = _status(error)
    text = _one_line(getattr(error, "message", "") or str(error))
    if isinstance(error, cache.Differs):
        return _Fault(text, _UPLOAD_AGAIN, passing=True)
    if isinstance(error, OSError) and (
        error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS) or error.filename == str(path)
    ):
        advice = "free some of the disk, or set data.cache to another"
        return _Fault(f"it can't be written here, {error.strerror}", advice, passing=False)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return _Fault("it is missing there", f"check the address, or {_UPLOAD_AGAIN}", passing=False)
    credentials = "check the credentials in the environment"
    if isinstance(error, PermissionError) or status in (401, 403, 407):
        return _Fault(f"access refused, {_named(status, text, error)}", credentials, passing=False)
    if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
        advice = f"{credentials}, or set FSSPEC_S3_ANON=true for a public bucket"
        return _Fault("there are no credentials for it", advice, passing=False)
    if isinstance(error, ValueError | TypeError):
        return _Fault(text or type(error).__name__, "check the address", passing=False)
    again = "check the network and the store"
    if isinstance(error, TimeoutError):
        got = f", only {text}" if text.endswith(" bytes") else ""
        advice = f"{again}, or raise data.timeout_s"
        return _Fault(f"no answer within {timeout_s:g} s{got}", advice, passing=True, ill=True)
    if status is not None and 400 <= status < 500 and status not in (408, 425, 429):
        return _Fault(f"the store answers {_named(status, text, error)}", "check the address", passing=False)
    why = f"the store answers {_named(status, text, error)}" if status else _named(status, text, error)
    return _Fault(why, again, passing=True, ill=True, after_s=_asked_pause_s(error))


def _named(status: int | None, text: str, error: Exception) -> str:
    return " ".join(part for part in (str(status or ""), text or type(error).__name__) if part)


def _status(error: BaseException | None) -> int | None:
    """The HTTP status that an error of any client stands for, if it stands for one."""
    while error is not None:
        for name in ("status", "status_code", "code"):
            value = getattr(error, name, None)
            if isinstance(value, int) and 300 <= value < 600:
                return value
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            if isinstance(status, int) and status >= 300:
                return status
        # s3fs puts the answer behind an OSError; aiohttp puts a made up 400 behind a payload that was cut short.
        error = error.__cause__ if isinstance(error, OSError) else None
    return None


def _asked_pause_s(error: Exception) -> float:
    headers = getattr(error, "headers", None)
    asked = str(headers.get("Retry-After", "")) if headers is not None else ""
    return float(asked) if asked.isdecimal() else 0.0


def _one_line(text: str) -> str:
    lines = redacted(text).strip().splitlines()
    return lines[0][:200].rstrip(".: ") if lines else ""
