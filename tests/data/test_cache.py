import hashlib
import os
import shutil
import signal
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from onestage.data import cache
from onestage.data.cache import Cache, Checked, Differs, Held
from onestage.errors import InputError


def content_of(number: int, num_bytes: int = 100) -> bytes:
    return bytes([number]) * num_bytes


def name_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def cache_of(folder: Path, *, max_bytes: int = 1000, patience_s: float = 5) -> Cache:
    return Cache(folder, max_bytes=max_bytes, patience_s=patience_s)


def fetch(into: Cache, content: bytes, *, wait: bool = True) -> bool:
    """Whether there was room for it."""
    name = name_of(content)
    with into.alone(name):
        file = into.fetch(name, len(content), lambda path: path.write_bytes(content) and None, wait=wait)
    if file is None:
        return False
    with file:
        assert file.read() == content
    return True


def held(in_cache: Cache, *numbers: int) -> list[int]:
    return [number for number in numbers if in_cache.has(name_of(content_of(number)))]


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    kept = cache_of(tmp_path, max_bytes=350)
    for number in (1, 2, 3):
        fetch(kept, content_of(number))
    file = kept.open(name_of(content_of(1)), 100)  # used after 2 and 3
    assert file is not None
    fetch(kept, content_of(4))
    assert held(kept, 1, 2, 3, 4) == [1, 3, 4]
    fetch(kept, content_of(5, 200))
    assert held(kept, 1, 3, 4) == [4]
    # Who has a shard open reads on when it is gone.
    with file:
        assert file.read() == content_of(1)
    assert kept.open(name_of(content_of(1)), 100) is None


def test_use_counts_over_processes_and_runs(tmp_path: Path) -> None:
    for number in (1, 2):
        fetch(cache_of(tmp_path), content_of(number))
    file = cache_of(tmp_path).open(name_of(content_of(1)), 100)
    assert file is not None
    file.close()
    fetch(cache_of(tmp_path, max_bytes=200), content_of(3))
    assert held(cache_of(tmp_path), 1, 2, 3) == [1, 3]


def test_a_cache_smaller_than_a_shard_holds_that_one(tmp_path: Path) -> None:
    small = cache_of(tmp_path, max_bytes=10)
    for number in (1, 2):
        assert fetch(small, content_of(number))
        assert held(small, 1, 2) == [number]


def test_leaves_the_disk_some_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = cache_of(tmp_path)
    for number in (1, 2, 3):
        fetch(kept, content_of(number))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: usage._replace(free=30))
    fetch(kept, content_of(4))  # 30 bytes are free: one shard has to go
    assert held(kept, 1, 2, 3, 4) == [2, 3, 4]


@pytest.mark.parametrize(
    ("written", "message"),
    [(content_of(1, 99), "has 99 bytes where dataset.json says 100"), (content_of(2), "its checksum differs")],
    ids=["short", "other"],
)
def test_what_differs_is_not_kept(tmp_path: Path, written: bytes, message: str) -> None:
    kept, name = cache_of(tmp_path), name_of(content_of(1))
    with pytest.raises(Differs, match=message), kept.alone(name):
        kept.fetch(name, 100, lambda path: path.write_bytes(written) and None)
    assert list((tmp_path / "shards").iterdir()) == []
    assert fetch(kept, content_of(1))


@pytest.mark.parametrize("damaged", [b"", content_of(1, 99), content_of(2)], ids=["empty", "short", "other"])
def test_what_was_damaged_in_the_cache_is_fetched_anew(tmp_path: Path, damaged: bytes) -> None:
    name = name_of(content_of(1))
    fetch(cache_of(tmp_path), content_of(1))
    (tmp_path / "shards" / name).write_bytes(damaged)
    assert cache_of(tmp_path).open(name, 100) is None
    assert not (tmp_path / "shards" / name).exists()


def _fetch_slowly(folder: Path, number: int, *, for_s: float, every_s: float = 0.02) -> None:
    """Write a byte at a time."""
    content = content_of(number)
    name = name_of(content)

    def download(path: Path) -> None:
        with path.open("wb", buffering=0) as file:
            started = time.monotonic()
            for byte in content:
                file.write(bytes([byte]))
                time.sleep(every_s if time.monotonic() - started < for_s else 0)

    slow = cache_of(folder)
    with slow.alone(name):
        fetched = slow.fetch(name, len(content), download)
        assert fetched is not None


@pytest.fixture
def fetching(tmp_path: Path) -> Any:
    """``fetching(number, for_s=..., every_s=...)``: another process, which fetches that shard when this returns."""
    started = []

    def start(number: int, **speed: float) -> Any:
        process = get_context("fork").Process(target=_fetch_slowly, args=(tmp_path, number), kwargs=speed)
        process.start()
        started.append(process)
        name = name_of(content_of(number))
        _wait_until(lambda: any((tmp_path / "shards").glob(f"{name}.*")))
        return process

    cache_of(tmp_path)
    yield start
    for process in started:
        process.kill()
        process.join(5)


def _wait_until(true: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 5
    while not true():
        assert time.monotonic() < give_up
        time.sleep(0.005)


def test_waits_for_another_process_as_long_as_that_gets_on(tmp_path: Path, fetching: Any) -> None:
    fetching(1, for_s=1.0)
    other = cache_of(tmp_path, patience_s=0.4)
    started = time.monotonic()
    with other.alone(name_of(content_of(1))):
        assert time.monotonic() - started > 0.5  # longer than its patience
        assert held(other, 1) == [1]


def test_does_not_wait_for_one_that_stands_still(tmp_path: Path, fetching: Any) -> None:
    process = fetching(1, for_s=30.0)
    os.kill(process.pid, signal.SIGSTOP)
    other, name = cache_of(tmp_path, patience_s=0.3), name_of(content_of(1))
    started = time.monotonic()
    with pytest.raises(Held, match=r"another process has been fetching it, without progress"), other.alone(name):
        pass
    assert 0.3 <= time.monotonic() - started < 3
    with pytest.raises(Held), other.alone(name, wait=False):
        pass
    assert time.monotonic() - started < 3
    with other.alone(name_of(content_of(2))):  # another shard is another matter
        pass


def test_room_that_others_fill_is_theirs_until_they_are_done_or_dead(tmp_path: Path, fetching: Any) -> None:
    process = fetching(1, for_s=30.0)
    # Once a byte is there it holds no lock but the shard's.
    _wait_until(lambda: any(path.stat().st_size for path in (tmp_path / "shards").iterdir()))
    os.kill(process.pid, signal.SIGSTOP)
    small = cache_of(tmp_path, max_bytes=150, patience_s=0.3)
    assert not fetch(small, content_of(2), wait=False)
    with pytest.raises(Held, match="is full of shards that others are fetching"):
        fetch(small, content_of(2))
    process.kill()
    process.join(5)
    assert fetch(small, content_of(2))
    assert [path.name for path in (tmp_path / "shards").iterdir()] == [name_of(content_of(2))]


def test_room_is_waited_for(tmp_path: Path, fetching: Any) -> None:
    fetching(1, for_s=0.3)
    small = cache_of(tmp_path, max_bytes=150)
    assert fetch(small, content_of(2))
    assert held(small, 1, 2) == [2]


def test_room_is_waited_for_as_long_as_those_who_have_it_get_on(tmp_path: Path, fetching: Any) -> None:
    """On a slow line the others' turns may take far longer than any patience with one that stands still."""
    fetching(1, for_s=1.0)
    small = cache_of(tmp_path, max_bytes=150, patience_s=0.4)
    started = time.monotonic()
    assert fetch(small, content_of(2))
    assert time.monotonic() - started > 0.5
    assert held(small, 1, 2) == [2]


def test_failures_are_noted_for_a_while_and_for_all(tmp_path: Path) -> None:
    first = cache_of(tmp_path)
    assert first.failure("a") is None
    first.note_failure("a", "no answer", for_s=0.3)
    assert first.failure("a") == cache_of(tmp_path).failure("a") == "no answer"
    assert first.failure("b") is None
    time.sleep(0.35)
    assert first.failure("a") is None and cache_of(tmp_path).failure("a") is None
    assert list((tmp_path / "failed").iterdir()) == []


def test_a_file_is_hashed_once_on_a_machine_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    digest = hashlib.file_digest

    def counted(file: Any, kind: str) -> Any:
        hashed.append(kind)
        return digest(file, kind)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    path = tmp_path / "a.tar"
    path.write_bytes(content_of(1))

    def same(checked: Checked, content: bytes) -> bool:
        with path.open("rb", buffering=0) as file:
            return checked.matches(file, path, name_of(content))

    here = Checked(tmp_path / "cache")
    assert same(here, content_of(1)) and same(here, content_of(1)) and same(Checked(tmp_path / "cache"), content_of(1))
    assert len(hashed) == 1
    assert not same(here, content_of(2))  # another dataset says otherwise
    assert len(hashed) == 2
    path.write_bytes(content_of(2))
    assert not same(here, content_of(1)) and same(here, content_of(2))
    assert len(hashed) == 4
    nowhere = Checked(None)
    assert same(nowhere, content_of(2)) and same(nowhere, content_of(2))
    assert len(hashed) == 5
    assert not same(Checked(path / "no folder"), content_of(1))


def test_markers_grow_old(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(content_of(1))
    with path.open("rb", buffering=0) as file:
        assert Checked(tmp_path).matches(file, path, name_of(content_of(1)))
    (marker,) = (one for one in (tmp_path / "checked").iterdir() if not one.name.startswith("lock-"))
    Checked(tmp_path)
    assert marker.exists()
    long_ago = time.time() - 31 * 86400
    os.utime(marker, (long_ago, long_ago))
    Checked(tmp_path)
    assert not marker.exists()


def test_what_is_evicted_leaves_no_marker(tmp_path: Path) -> None:
    small = cache_of(tmp_path, max_bytes=100)
    for number in range(5):
        fetch(small, content_of(number))
    assert len([one for one in (tmp_path / "checked").iterdir() if not one.name.startswith("lock-")]) == 1


def test_the_folder_that_is_named_else_that_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a file", "temporary"):
        (tmp_path / name).mkdir() if name == "temporary" else (tmp_path / name).touch()
    monkeypatch.setattr(cache.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    found = []
    for changed in (
        {"ONESTAGE_CACHE": str(tmp_path / "asked")},
        {"ONESTAGE_CACHE": "", "XDG_CACHE_HOME": str(tmp_path / "xdg")},
        {"XDG_CACHE_HOME": "relative", "HOME": str(tmp_path / "home")},  # the standard has relative ones ignored
        {"XDG_CACHE_HOME": "", "HOME": ""},
        {"HOME": str(tmp_path / "a file")},
    ):
        for name, value in changed.items():
            monkeypatch.setenv(name, value)
        found.append(cache.folder(None).relative_to(tmp_path).as_posix())
    temporary = f"temporary/onestage-{os.getuid()}"
    assert found == ["asked", "xdg/onestage", "home/.cache/onestage", temporary, temporary]
    assert (tmp_path / temporary).stat().st_mode & 0o777 == 0o700
    assert cache.folder(str(tmp_path / "named")) == tmp_path / "named"
    with pytest.raises(InputError, match=r"cache folder .*a file/x can't be made or written: set data.cache"):
        cache.folder(str(tmp_path / "a file" / "x"))
    # Somebody else made it before us.
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    (tmp_path / "temporary" / "onestage-12345").mkdir()
    with pytest.raises(InputError, match=r"no folder for a cache can be written: set data.cache"):
        cache.folder(None)
