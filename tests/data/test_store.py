"""The stores against real servers on loopback, which fail as told."""

import errno
import gc
import http.server
import json
import logging
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from filelock import FileLock

from onestage.data import store
from onestage.data.faults import Unreadable
from onestage.data.manifest import Manifest, Shard
from onestage.data.shards import ShardReader
from onestage.data.store import StoreSettings, open_store
from onestage.errors import InputError

TIMEOUT_S = 0.3
PROMPT_S = 8.0
"""What a bounded wait may take here; unbounded ones are hours."""


class Server:
    """Serves ``folder``, and counts; the next GETs of a file fail as ``plan`` says, one after another."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.gets: Counter[str] = Counter()
        self.plan: dict[str, list[str]] = defaultdict(list)
        self.always: dict[str, str] = {}
        self.headers: dict[str, str] = {}
        self.released = threading.Event()
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.answer(self)

            def log_message(self, *args: object) -> None:
                pass

        self._httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._httpd.daemon_threads = True
        threading.Thread(target=self._httpd.serve_forever, args=(0.01,), daemon=True).start()
        self.port = self._httpd.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        self.released.set()
        self._httpd.shutdown()
        self._httpd.server_close()

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        name = Path(unquote(urlsplit(request.path).path)).name
        self.gets[name] += 1
        self.headers = {**dict(request.headers), "path": request.path}
        fault = self.plan[name].pop(0) if self.plan[name] else self.always.get(name, "")
        path = self.folder / name
        if fault.isdigit() or not path.is_file():
            request.send_response(int(fault or 404))
            if fault == "429":
                request.send_header("Retry-After", "2")
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        if fault == "hang":
            self.released.wait(60)
            return
        if fault == "reset":
            request.connection.shutdown(socket.SHUT_RDWR)
            return
        content = path.read_bytes()
        if fault == "corrupt":
            content = content[:-1] + bytes([content[-1] ^ 1])
        if fault == "short":
            content = content[:-512]
        if fault == "endless":
            content = content * 1000
        request.send_response(200)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        try:
            if fault == "trickle":
                for byte in content:
                    request.wfile.write(bytes([byte]))
                    if self.released.wait(0.05):
                        return
            request.wfile.write(content[: len(content) // 2] if fault == "cut" else content)
        except OSError:
            pass  # the client has given up


@pytest.fixture
def served(dataset: Path) -> Iterator[Server]:
    server = Server(dataset)
    yield server
    server.close()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(store, "BACKOFF_S", 0.01)
    monkeypatch.setattr(store.cache, "POLL_S", 0.01)
    monkeypatch.setenv("ONESTAGE_CACHE", str(tmp_path / "cache"))


def settings_of(**changed: Any) -> StoreSettings:
    return StoreSettings(**{"timeout_s": TIMEOUT_S, **changed})


def reader_of(server: Server, **settings: Any) -> ShardReader:
    chosen = settings_of(**settings)
    manifest = Manifest.load(server.url, settings=chosen)
    return ShardReader(server.url, "train", manifest=manifest, store=open_store(server.url, settings=chosen))


def cached(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache" / "shards").iterdir())


FIRST = "train-000000.tar"
KEYS = [f"{n:06d}" for n in range(19)]


def test_reads_over_http_what_lies_in_the_folder(served: Server, dataset: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(dataset)
    assert Manifest.load(served.url) == manifest
    reader, local = reader_of(served), ShardReader(dataset, "train", manifest=manifest)
    for key in KEYS:
        assert reader.read(key) == local.read(key)
    assert {name: count for name, count in served.gets.items() if name != "dataset.json"} == {
        shard.name: 1 for shard in manifest.split("train").shards
    }
    assert cached(tmp_path) == sorted(shard.sha256 for shard in manifest.split("train").shards)
    # What another run, and another dataset with the same shard, need not fetch.
    for key in KEYS:
        reader_of(served).read(key)
    assert served.gets[FIRST] == 1


@pytest.mark.parametrize("fault", ["503", "500", "429", "408", "cut", "corrupt", "short", "hang", "trickle"])
def test_what_passes_is_tried_again(
    served: Server, fault: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "MAX_BACKOFF_S", 0.2)
    served.plan[FIRST] = [fault, fault]
    reader = reader_of(served)
    assert json.loads(reader.read("000000")["json"])["image_id"] == 0
    assert served.gets[FIRST] == 3
    told = [record.getMessage() for record in caplog.records if FIRST in record.getMessage()]
    assert ["attempt 2 of 5" in told[0], "attempt 3 of 5" in told[1], len(told)] == [True, True, 2]
    assert all(record.levelno == logging.WARNING for record in caplog.records)


@pytest.mark.parametrize(
    ("fault", "gets", "message"),
    [
        ("503", 3, r"can't be had after 3 attempts \(the store answers 503 Service Unavailable\): check the network"),
        (
            "corrupt",
            3,
            r"can't be had after 3 attempts \(its checksum differs from that in dataset.json\): upload the dataset",
        ),
        (
            "short",
            3,
            r"can't be had after 3 attempts \(it has \d+ bytes where dataset.json says \d+\): upload the dataset again",
        ),
        ("endless", 3, r"can't be had after 3 attempts \(it has (more than )?\d+ bytes.*\): upload the dataset again"),
        ("cut", 3, r"can't be had after 3 attempts \(.*\): check the network and the store"),
        ("hang", 3, r"can't be had after 3 attempts \(no answer within 0.3 s\): .*raise data.timeout_s"),
        (
            "trickle",
            3,
            r"can't be had after 3 attempts \(no answer within 0.3 s, only \d+ bytes\): .*raise data.timeout_s",
        ),
        ("404", 1, r"can't be had \(it is missing there\): check the address, or upload the dataset again"),
        ("403", 1, r"can't be had \(access refused, 403 Forbidden\): check the credentials in the environment"),
        ("401", 1, r"can't be had \(access refused, 401 Unauthorized\): check the credentials"),
        ("400", 1, r"can't be had \(the store answers 400 Bad Request\): check the address"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 10 else "",
)
def test_what_stays_is_named_after_its_attempts(
    served: Server, tmp_path: Path, fault: str, gets: int, message: str
) -> None:
    served.always[FIRST] = fault
    reader = reader_of(served, retries=2)
    started = time.monotonic()
    with pytest.raises(Unreadable, match=rf"^shard {served.url}/{FIRST} {message}") as raised:
        reader.read("000000")
    assert time.monotonic() - started < PROMPT_S
    assert "\n" not in str(raised.value)
    assert served.gets[FIRST] == gets
    # Its other samples don't ask for it again, here, in a fork, or in a pickle; other shards are as they were.
    for again in (reader, pickle.loads(pickle.dumps(reader))):
        with pytest.raises(Unreadable, match=message):
            again.read("000001")
    with get_context("fork").Pool(1) as pool, pytest.raises(Unreadable, match=message):
        pool.apply_async(reader.read, ("000002",)).get(PROMPT_S)
    assert served.gets[FIRST] == gets
    assert reader.read("000004")["__key__"] == "000004"
    assert len(cached(tmp_path)) == 1  # and nothing of the one that failed
    # Another run, after somebody mended it, finds out at once.
    del served.always[FIRST]
    assert reader_of(served).read("000000")["__key__"] == "000000"


def test_a_connection_that_breaks_is_tried_again(served: Server) -> None:
    served.plan[FIRST] = ["reset"] * 4  # the client itself tries an idle connection once more
    assert reader_of(served).read("000000")["__key__"] == "000000"


def test_a_failed_shard_is_tried_again_after_a_while(served: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "REMEMBERED_S", 0.3)
    served.plan[FIRST] = ["404"]
    reader = reader_of(served)
    with pytest.raises(Unreadable, match="missing"):
        reader.read("000000")
    time.sleep(0.35)
    assert reader.read("000000")["__key__"] == "000000"


def test_a_store_that_is_down_costs_the_later_shards_one_attempt_each(served: Server) -> None:
    served.always = {f"train-00000{index}.tar": "503" for index in range(4)}
    reader = reader_of(served, retries=3)
    for key in ("000000", "000004", "000008"):
        with pytest.raises(Unreadable, match="503"):
            reader.read(key)
    assert [served.gets[f"train-00000{index}.tar"] for index in range(3)] == [4, 1, 1]
    assert reader.read("000016")["__key__"] == "000016"
    with pytest.raises(Unreadable, match="after 4 attempts"):
        reader.read("000012")


def test_waits_twice_as_long_each_time_or_as_long_as_it_is_asked_to(
    served: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("tenacity.nap.time.sleep", pauses.append)
    monkeypatch.setattr(store, "BACKOFF_S", 1.0)
    monkeypatch.setattr(store, "MAX_BACKOFF_S", 6.0)
    served.always[FIRST] = "503"
    with pytest.raises(Unreadable, match="after 6 attempts"):
        reader_of(served, retries=5).read("000000")
    assert all(least <= pause <= least + 1 for pause, least in zip(pauses, (1, 2, 4, 6, 6), strict=True))
    pauses.clear()
    served.plan[FIRST] = ["429"]
    served.always = {}
    reader_of(served).read("000000")
    assert len(pauses) == 1 and 2 <= pauses[0] <= 2.0 + 1e-6  # its Retry-After says 2, ours would be 1 to 2


def test_no_server_there_is_an_end_too(served: Server) -> None:
    reader = reader_of(served, retries=1)
    url = served.url
    served.close()
    with pytest.raises(Unreadable, match=r"after 2 attempts \(.*[Cc]onnect.*\): check the network"):
        reader.read("000000")
    with pytest.raises(
        InputError, match=r"^no dataset at http.*\(dataset.json: .*\): check the network and the store$"
    ):
        Manifest.load(url, settings=settings_of(retries=0))


def test_a_manifest_is_tried_again_and_then_wrong_input(served: Server, tmp_path: Path) -> None:
    served.plan["dataset.json"] = ["503", "hang"]
    assert Manifest.load(served.url, settings=settings_of()).name == "greys"
    assert served.gets["dataset.json"] == 3
    served.always["dataset.json"] = "404"
    with pytest.raises(InputError, match=r"^no dataset at http.*\(dataset.json: it is missing there\)") as raised:
        Manifest.load(f"{served.url}/", settings=settings_of())
    assert not isinstance(raised.value, Unreadable)
    assert served.gets["dataset.json"] == 4
    served.folder = tmp_path
    (tmp_path / "dataset.json").write_text('{"version": 1')
    served.always = {}
    with pytest.raises(InputError, match=rf"^{served.url}/dataset.json is broken .*: make it again"):
        Manifest.load(served.url, settings=settings_of())


def test_no_message_shows_a_secret(served: Server, caplog: pytest.LogCaptureFixture) -> None:
    address = f"http://ann:pass%40word@127.0.0.1:{served.port}/data/?sig=hidden"
    settings = settings_of(retries=1)
    manifest = Manifest.load(address, settings=settings)
    # The server got them all the same.
    assert served.headers["Authorization"] == "Basic YW5uOnBhc3NAd29yZA=="  # ann:pass@word in base64
    assert served.headers["path"] == "/data/dataset.json?sig=hidden"
    told = []
    for fault in ("503", "404", "403", "cut", "reset", "hang"):
        served.always = {FIRST: fault, "dataset.json": fault}
        reader = ShardReader(address, "train", manifest=manifest, store=open_store(address, settings=settings))
        with pytest.raises(Unreadable) as unreadable:
            reader.read("000000")
        with pytest.raises(InputError) as raised:
            Manifest.load(address, settings=settings)
        told += [str(unreadable.value), str(raised.value)]
        assert f"http://***@127.0.0.1:{served.port}/data" in str(unreadable.value)
        with pytest.raises(KeyError) as unknown:
            reader.read("000019")
        told.append(str(unknown.value))
    told += [record.getMessage() for record in caplog.records]
    assert not [line for line in told if "pass" in line or "hidden" in line or "ann" in line.replace("channel", "")]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("pipe:cat /etc/passwd", r"never comes from a command \(pipe:\)"),
        ("PIPE:curl https://host/x.tar", r"never comes from a command \(pipe:\)"),
        ("pipe://cat", r"never comes from a command"),
        ("simplecache::s3://bucket/data", "wraps another store"),
        ("simplecache::/local/data", "wraps another store"),
        ("zip://x::http://host/a.zip", "wraps another store"),
        ("filecache://host/x", "wraps another store"),
        ("reference://x", "wraps another store"),
        ("nosuch://ann:pw@bucket/data", r"no store is known for nosuch:// in nosuch://\*\*\*@bucket/data"),
        ("gs://bucket/data", r"^gs://bucket/data can't be opened here: .*[Ii]nstall gcsfs"),
        ("file://elsewhere/data", "names a host"),
    ],
)
def test_addresses_that_are_refused(address: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        Manifest.load(address)
    assert "\n" not in str(raised.value) and "pw" not in str(raised.value)


def test_file_addresses_are_folders(dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(dataset, tmp_path / "a b")
    address = f"file://{tmp_path}/a%20b"
    manifest = Manifest.load(address)
    assert manifest == Manifest.load(dataset)
    assert ShardReader(address, "train", manifest=manifest).read("000003")["__key__"] == "000003"


def test_a_store_without_async_is_read_and_ended_too(
    memory: tuple[ShardReader, ShardReader], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    reader, local = memory
    assert reader.read("000000") == local.read("000000")
    released = threading.Event()
    monkeypatch.setattr(MemoryFileSystem, "get_file", lambda *args, **kwargs: released.wait(60))
    started = time.monotonic()
    with pytest.raises(Unreadable, match=r"after 2 attempts \(no answer within 0.3 s\)"):
        reader.read("000004")
    assert time.monotonic() - started < PROMPT_S
    released.set()


@pytest.fixture
def memory(dataset: Path) -> tuple[ShardReader, ShardReader]:
    """Readers of a store whose client blocks, and of the folder itself."""
    import fsspec

    fsspec.filesystem("memory").put(str(dataset) + "/", "/greys/", recursive=True)
    manifest = Manifest.load("memory://greys")
    there = open_store("memory://greys", settings=settings_of(retries=1))
    return (
        ShardReader("memory://greys", "train", manifest=manifest, store=there),
        ShardReader(dataset, "train", manifest=manifest),
    )


def test_a_client_that_does_not_tell_how_far_it_is_gets_its_time(
    memory: tuple[ShardReader, ShardReader], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those for FTP and SFTP: only the file that grows says that the copy, longer than the timeout, gets on."""
    from fsspec.implementations.memory import MemoryFileSystem

    def slowly(fs: Any, remote: str, path: str, **_: Any) -> None:
        content = fs.cat_file(remote)
        with Path(path).open("wb", buffering=0) as file:
            for start in range(0, len(content), 512):
                file.write(content[start : start + 512])
                time.sleep(3 * TIMEOUT_S * 512 / len(content))

    monkeypatch.setattr(store, "SLOW_BYTES_PER_S", 1024)
    monkeypatch.setattr(MemoryFileSystem, "get_file", slowly)
    reader, local = memory
    started = time.monotonic()
    assert reader.read("000000") == local.read("000000")
    assert time.monotonic() - started > 2 * TIMEOUT_S


def test_each_copy_of_a_client_that_blocks_has_a_client_of_its_own(
    memory: tuple[ShardReader, ShardReader], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One may hang for good, and ftplib's would mix the answers for two threads."""
    from fsspec.implementations.memory import MemoryFileSystem

    clients: list[Any] = []
    get_file = MemoryFileSystem.get_file

    def counted(fs: Any, *args: Any, **kwargs: Any) -> None:
        clients.append(fs)
        get_file(fs, *args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "get_file", counted)
    reader, _ = memory
    for key in ("000000", "000004", "000008"):
        reader.read(key)
    assert len({id(fs) for fs in clients}) == 3


def test_a_client_that_hangs_while_it_is_made_is_given_up(
    memory: tuple[ShardReader, ShardReader], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those for FTP and SFTP connect in their constructors."""
    from fsspec.implementations.memory import MemoryFileSystem

    released = threading.Event()
    monkeypatch.setattr(MemoryFileSystem, "__init__", lambda *args, **kwargs: released.wait(60) and None)
    with pytest.raises(Unreadable, match=r"after 2 attempts \(no answer within 0.3 s\)"):
        memory[0].read("000000")
    released.set()


def test_a_disk_that_fails_after_the_copy_is_not_tried_for_each_sample(
    served: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    reader = reader_of(served)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        for key in ("000000", "000001", "000002"):
            with pytest.raises(
                Unreadable, match=rf"{FIRST} can't be cached \(No space left on device\): mend the disk"
            ):
                reader.read(key)
    assert served.gets[FIRST] == 1


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_cache_that_cannot_be_had_is_the_readers_to_tell(served: Server, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    reader = reader_of(served, cache=str(tmp_path / "file" / "cache"))
    reader.expect(KEYS)
    ahead = [one for one in threading.enumerate() if one.name == "onestage-prefetch"]
    for thread in ahead:
        thread.join(0.5)
    with pytest.raises(InputError, match=r"can't be made or written: set data.cache") as raised:
        reader.read("000000")
    assert not isinstance(raised.value, Unreadable)  # no image of this set can be read: a clear stop


def test_an_address_of_ipv6_is_no_chain() -> None:
    assert _address_of("http://[::1]:8000/data") == "http://[::1]:8000/data/dataset.json"


def _address_of(root: str) -> str:
    there: Any = open_store(root)
    fs, at = there._connection()._open()
    assert type(fs).__name__ == "HTTPFileSystem"
    return store._join("http", at, "dataset.json")


def test_a_dataset_without_checksums_is_refused_from_elsewhere(served: Server, dataset: Path) -> None:
    shard = Shard(FIRST, 4, (dataset / FIRST).stat().st_size, "", 0)
    with pytest.raises(InputError, match=rf"has no checksum for {FIRST}"):
        open_store(served.url).open(shard)


def test_settings_that_make_no_sense() -> None:
    for changed in ({"cache_gib": 0}, {"timeout_s": -1}, {"timeout_s": float("nan")}, {"retries": -1}):
        with pytest.raises(ValueError, match=rf"need data.{next(iter(changed))} "):
            StoreSettings(**changed)  # type: ignore[arg-type]


def _forget(there: Any) -> None:
    there._here = None
    gc.collect()


@pytest.fixture
def _little_to_collect() -> Iterator[None]:
    """What other tests have left in memory would have to be looked through each time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("_little_to_collect")
def test_a_fork_that_drops_a_store_closes_nothing(served: Server) -> None:
    reader = reader_of(served, timeout_s=5)
    reader.read("000000")
    fork = get_context("fork").Process(target=_forget, args=(reader.store,))
    fork.start()
    fork.join(PROMPT_S)
    assert fork.exitcode == 0
    reader.read("000004")
    connection = weakref.ref(reader.store._connection())  # type: ignore[attr-defined]
    assert connection() is not None and store._INHERITED == []
    _forget(reader.store)
    assert connection() is None  # where it was made, it goes with its last user


def test_works_on_both_sides_of_a_fork(served: Server) -> None:
    reader = reader_of(served, timeout_s=5)
    assert reader.read("000000")["__key__"] == "000000"  # its event loop and session are the parent's
    with get_context("fork").Pool(2) as pool:
        found = pool.map_async(reader.read, ["000004", "000008"])
        assert reader.read("000012")["__key__"] == "000012"
        assert [sample["__key__"] for sample in found.get(PROMPT_S)] == ["000004", "000008"]
    assert reader.read("000016")["__key__"] == "000016"
    assert max(count for name, count in served.gets.items() if name != "dataset.json") == 1


def _read_all(reader: ShardReader, keys: list[str], cache: Path, found: Any) -> None:
    most = 0
    for key in keys:
        assert reader.read(key)["__key__"] == key
        with FileLock(cache / "locks" / "room"):  # without it, files would come and go while they are added up
            most = max(most, sum(path.stat().st_size for path in (cache / "shards").iterdir()))
    found.put(most)


@pytest.mark.parametrize("num_shards", [10.0, 2.5, 0.5])
def test_many_processes_read_through_one_cache(
    served: Server, dataset: Path, tmp_path: Path, num_shards: float
) -> None:
    """A cache of all the shards fetches each once; a smaller one stays within its bound, or holds a single shard."""
    shards = Manifest.load(dataset).split("train").shards
    largest = max(shard.num_bytes for shard in shards)
    reader = reader_of(served, cache_gib=num_shards * largest / 2**30, timeout_s=5)
    context = get_context("fork")
    found: Any = context.Queue()
    workers = [
        context.Process(target=_read_all, args=(reader, KEYS[turn * 4 :] + KEYS[: turn * 4], tmp_path / "cache", found))
        for turn in range(4)
    ]
    for worker in workers:
        worker.start()
    most = max(found.get(timeout=30) for _ in workers)
    for worker in workers:
        worker.join(PROMPT_S)
        assert worker.exitcode == 0
    gets = [served.gets[shard.name] for shard in shards]
    if num_shards > len(shards):
        assert gets == [1] * len(shards)
    else:
        assert len(shards) <= sum(gets) <= 4 * len(shards)
    assert most <= max(num_shards, 1) * largest
    assert all("." not in name for name in cached(tmp_path))


def test_who_waits_for_a_shard_that_fails_does_not_try_it_all_over(served: Server) -> None:
    served.always[FIRST] = "hang"
    reader = reader_of(served, retries=1)
    with get_context("fork").Pool(4) as pool:
        started = time.monotonic()
        told = pool.map_async(_why, [reader] * 4, chunksize=1).get(30)
    assert time.monotonic() - started < 4  # two attempts, not eight
    assert served.gets[FIRST] == 2
    assert len(set(told)) == 1 and "after 2 attempts" in told[0]


def _why(reader: ShardReader) -> str:
    with pytest.raises(Unreadable) as raised:
        reader.read("000000")
    return str(raised.value)


def _wait_until(true: Callable[[], bool], within_s: float = PROMPT_S) -> None:
    give_up = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < give_up
        time.sleep(0.01)


def test_a_killed_process_leaves_no_lock_and_nothing_that_counts(served: Server, tmp_path: Path) -> None:
    served.plan[FIRST] = ["trickle"]
    reader = reader_of(served, timeout_s=30)
    worker = get_context("fork").Process(target=reader.read, args=("000000",))
    worker.start()
    folder = tmp_path / "cache" / "shards"
    _wait_until(lambda: served.gets[FIRST] == 1 and any(folder.glob("*.partial")))
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    worker.join(PROMPT_S)
    started = time.monotonic()
    assert reader.read("000000")["__key__"] == "000000"
    assert time.monotonic() - started < 2
    assert served.gets[FIRST] == 2
    assert cached(tmp_path) == [reader.shards[0].sha256]


def test_a_process_that_stands_still_is_not_waited_for_for_ever(
    served: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "MAX_BACKOFF_S", 0.4)
    served.plan[FIRST] = ["hang"]
    reader = reader_of(served)
    worker = get_context("fork").Process(
        target=open_store(served.url, settings=settings_of(timeout_s=30)).open, args=(reader.shards[0],)
    )
    worker.start()
    try:
        _wait_until(lambda: served.gets[FIRST] == 1)
        started = time.monotonic()
        with pytest.raises(Unreadable, match=r"another process has been fetching it, without progress for 1 s; end"):
            reader.read("000000")
        assert 1 <= time.monotonic() - started < PROMPT_S
    finally:
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        worker.join(PROMPT_S)


def test_shards_are_fetched_before_they_are_read(served: Server) -> None:
    reader = reader_of(served, timeout_s=5)
    reader.expect(KEYS)
    names = [shard.name for shard in reader.shards]
    _wait_until(lambda: all(served.gets[name] == 1 for name in names))
    _wait_until(lambda: all(reader.store._connection().cache.has(shard.sha256) for shard in reader.shards))  # type: ignore[attr-defined]
    served.close()
    assert [reader.read(key)["__key__"] for key in KEYS] == KEYS


def test_fetching_ahead_keeps_to_half_of_the_cache_and_to_the_reader(served: Server) -> None:
    probe = reader_of(served)
    largest = max(shard.num_bytes for shard in probe.shards)
    reader = reader_of(served, cache_gib=4.5 * largest / 2**30, timeout_s=5)
    reader.expect([f"{n:06d}" for n in (16, 12, 8, 4, 0)])
    order = [f"train-00000{index}.tar" for index in (4, 3, 2, 1, 0)]
    _wait_until(lambda: served.gets[order[1]] == 1)
    time.sleep(0.3)
    assert [served.gets[name] for name in order] == [1, 1, 0, 0, 0]
    reader.read("000016")
    _wait_until(lambda: served.gets[order[2]] == 1)
    time.sleep(0.3)
    assert [served.gets[name] for name in order] == [1, 1, 1, 0, 0]


def test_errors_ahead_are_left_to_the_reader(served: Server) -> None:
    served.plan[FIRST] = ["503", "503", "503"]
    reader = reader_of(served, retries=2)
    reader.expect(["000004", "000000"])
    _wait_until(lambda: served.gets[FIRST] == 1 and served.gets["train-000001.tar"] == 1)
    assert reader.read("000000")["__key__"] == "000000"  # once ahead, three times here
    assert served.gets[FIRST] == 4


def test_the_thread_ahead_ends_with_its_reader(served: Server) -> None:
    reader = reader_of(served, cache_gib=1e-6)  # no room for anything: it would wait
    reader.expect(["000000"])
    ahead = next(one for one in threading.enumerate() if one.name == "onestage-prefetch")
    del reader
    ahead.join(PROMPT_S)
    assert not ahead.is_alive()


def test_what_was_fetched_ahead_of_another_epoch_is_let_go(served: Server) -> None:
    reader = reader_of(served, cache_gib=1e-6)
    reader.expect(["000000"])
    first = weakref.ref(reader._prefetch)
    reader.expect(["000004"])
    _wait_until(lambda: first() is None)


@pytest.fixture
def bucket(dataset: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """The dataset in a bucket of an S3 server of its own process, which the environment says how to reach."""
    boto3 = pytest.importorskip("boto3")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = Path(sys.executable).parent / "moto_server"
    if not command.is_file():
        pytest.skip("moto's server is not installed")
    with (tmp_path / "moto.log").open("w") as log:
        process = subprocess.Popen([command, "-H", "127.0.0.1", "-p", str(port)], stdout=log, stderr=log)
    try:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "hunter2",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }.items():
            monkeypatch.setenv(name, value)

        def answers() -> bool:
            with socket.socket() as client:
                return client.connect_ex(("127.0.0.1", port)) == 0

        _wait_until(answers, within_s=60)
        client = boto3.client("s3")
        client.create_bucket(Bucket="data")
        for path in sorted(dataset.iterdir()):
            client.upload_file(str(path), "data", f"sets/greys/{path.name}")
        yield "s3://data/sets/greys"
    finally:
        process.terminate()
        process.wait(10)


@pytest.mark.slow
def test_reads_from_s3(bucket: str, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3

    settings = settings_of(timeout_s=20, retries=1)
    manifest = Manifest.load(bucket, settings=settings)
    assert manifest == Manifest.load(dataset)
    there = open_store(bucket, settings=settings)
    reader, local = (
        ShardReader(bucket, "train", manifest=manifest, store=there),
        ShardReader(dataset, "train", manifest=manifest),
    )
    assert reader.read("000000") == local.read("000000")
    with get_context("fork").Pool(2) as pool:
        keys = [f"{n:06d}" for n in range(12)]
        assert pool.map_async(reader.read, keys).get(60) == [local.read(key) for key in keys]
    boto3.client("s3").delete_object(Bucket="data", Key="sets/greys/train-000003.tar")
    with pytest.raises(Unreadable, match=rf"shard {bucket}/train-000003.tar can't be had \(it is missing there\)"):
        reader.read("000012")
    boto3.client("s3").put_object(Bucket="data", Key="sets/greys/train-000004.tar", Body=b"something else")
    with pytest.raises(Unreadable, match=r"after 2 attempts \(it has 14 bytes where dataset.json says"):
        reader.read("000016")
    with pytest.raises(InputError, match=r"^no dataset at s3://nowhere/x \(dataset.json: it is missing there\)"):
        Manifest.load("s3://nowhere/x", settings=settings)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    with pytest.raises(InputError, match=r"there are no credentials for it\): check the .*FSSPEC_S3_ANON=true"):
        Manifest.load(bucket, settings=settings)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    with pytest.raises(InputError, match=r"Could not connect .*: check the network and the store") as raised:
        Manifest.load(bucket, settings=settings)
    assert "hunter2" not in str(raised.value)
