import errno
import hashlib
import io
import os
import pickle
import shutil
import tarfile
import threading
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from onestage.data import shards
from onestage.data.faults import Unreadable
from onestage.data.manifest import Manifest, Shard, Split
from onestage.data.shards import ShardReader
from onestage.errors import InputError


def reader_of(root: Path, split: str = "train") -> ShardReader:
    return ShardReader(root, split, manifest=Manifest.load(root))


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ONESTAGE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Path:
    """A copy of the dataset that a test may damage."""
    return Path(shutil.copytree(dataset, tmp_path / "copy"))


def test_reads_what_tar_reads_in_any_order(dataset: Path) -> None:
    reader = reader_of(dataset)
    for key in ("000018", "000000", "000007", "000000"):
        sample = reader.read(key)
        shard = f"train-00000{int(key) // 4}.tar"
        with tarfile.open(dataset / shard) as tar:
            expected = {kind: tar.extractfile(f"{key}.{kind}").read() for kind in ("png", "json")}  # type: ignore[union-attr]
        assert sample == {"__key__": key, "__url__": shard, **expected}


def test_reads_no_more_than_the_members_asked_for(dataset: Path) -> None:
    reader = reader_of(dataset)
    whole = reader.read("000005")
    assert reader.read("000005", members=("json",)) == {part: whole[part] for part in ("__key__", "__url__", "json")}
    assert reader.read("000005", members=("jpg",)).keys() == {"__key__", "__url__"}


def test_key_of_another_split(dataset: Path) -> None:
    with pytest.raises(KeyError, match="no sample 000019"):
        reader_of(dataset).read("000019")


def test_opens_a_bounded_number_of_files(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MAX_OPEN_SHARDS", 2)
    reader = reader_of(dataset)
    for key in [f"{n:06d}" for n in (0, 4, 8, 12, 16, 0, 18)]:
        assert reader.read(key)["__key__"] == key
        assert len(reader._opened) <= 2


def test_pickles_and_forks(dataset: Path) -> None:
    reader = reader_of(dataset)
    first = reader.read("000001")
    assert pickle.loads(pickle.dumps(reader)).read("000001") == first
    with get_context("fork").Pool(2) as pool:
        keys = [f"{n:06d}" for n in range(19)] * 4
        assert pool.map(reader.read, keys) == [reader.read(key) for key in keys]


def test_missing_shard_is_named(copy: Path) -> None:
    (copy / "train-000001.tar").unlink()
    reader = reader_of(copy)
    reader.read("000000")
    with pytest.raises(InputError, match=r"shard .*train-000001.tar is missing: copy the dataset again"):
        reader.read("000004")


@pytest.mark.parametrize("num_bytes", [0, 100, 700, 5000])
def test_truncated_shard_is_named(copy: Path, num_bytes: int) -> None:
    path = copy / "train-000001.tar"
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(num_bytes)
    with pytest.raises(InputError, match=rf"train-000001.tar has {num_bytes} bytes where dataset.json says {size}"):
        reader_of(copy).read("000004")


def test_shard_truncated_while_it_is_read(copy: Path, dataset: Path) -> None:
    reader = reader_of(copy)
    reader.read("000004")
    with (copy / "train-000001.tar").open("r+b") as file:
        file.truncate(600)
    with pytest.raises(InputError, match=r"train-000001.tar is cut short"):
        reader.read("000005")
    shutil.copy(dataset / "train-000001.tar", copy)
    assert reader.read("000005")["__key__"] == "000005"


def test_shard_overwritten_with_something_else(copy: Path) -> None:
    path = copy / "train-000001.tar"
    path.write_bytes(b"\xaa" * path.stat().st_size)
    with pytest.raises(Unreadable, match=r"train-000001.tar is not what dataset.json says \(its checksum differs\)"):
        reader_of(copy).read("000004")


def test_one_byte_that_differs_in_a_folder_is_found(copy: Path) -> None:
    path = copy / "train-000001.tar"
    content = bytearray(path.read_bytes())
    reader_of(copy).read("000004")
    content[2000] ^= 1
    path.write_bytes(content)
    for _ in range(2):
        with pytest.raises(Unreadable, match=r"its checksum differs\): copy the dataset again, or import it again"):
            reader_of(copy).read("000004")
    assert reader_of(copy).read("000000")["__key__"] == "000000"
    content[2000] ^= 1
    path.write_bytes(content)
    assert reader_of(copy).read("000004")["__key__"] == "000004"


def alone(root: Path, content: bytes) -> ShardReader:
    """Over one shard of this content, which dataset.json knows well."""
    (root / "a.tar").write_bytes(content)
    shard = Shard("a.tar", 1, len(content), hashlib.sha256(content).hexdigest(), 0)
    return ShardReader(root, "train", manifest=Manifest(name="a", classes=("cat",), splits={"train": Split((shard,))}))


def tar_of(**changed: Any) -> bytes:
    """A tar of one member, ``000000.jpg``, with its header ``changed``."""
    info = tarfile.TarInfo("000000.jpg")
    info.size = 3
    for name, value in changed.items():
        setattr(info, name, value)
    header = info.tobuf(tarfile.GNU_FORMAT)
    return (header + b"abc" + bytes(1024 + 509)).ljust(4096, b"\0")


@pytest.mark.parametrize(
    "content",
    [
        b"\xaa" * 10240,
        b"",
        tar_of()[:100],
        tar_of(size=-512),
        tar_of(size=2**62),
        # Each long name announces another one.
        tar_of(type=tarfile.GNUTYPE_LONGNAME, name="././@LongLink", size=512)[:512] * 3000,
        tar_of(type=tarfile.GNUTYPE_LONGNAME, name="././@LongLink", size=2**62),
        tar_of(type=tarfile.XHDTYPE, size=2**62),
    ],
    ids=[
        *("noise", "empty", "header cut short", "size below 0", "size beyond all", "names without end"),
        *("name beyond all memory", "fields beyond all memory"),
    ],
)
def test_a_shard_that_was_never_a_sound_tar(tmp_path: Path, content: bytes) -> None:
    reader = alone(tmp_path, content)
    with pytest.raises(Unreadable, match=r"a.tar (is no tar file that can be read|has no sample 000000)") as raised:
        reader.read("000000")
    assert "\n" not in str(raised.value)


def test_sizes_are_read_from_sound_headers(tmp_path: Path) -> None:
    assert alone(tmp_path, tar_of()).read("000000")["jpg"] == b"abc"


def test_a_shard_that_is_a_folder(copy: Path) -> None:
    (copy / "train-000001.tar").unlink()
    (copy / "train-000001.tar").mkdir()
    with pytest.raises(Unreadable, match=r"train-000001.tar can't be (opened|read) \(Is a directory\)"):
        reader_of(copy).read("000004")


def test_a_mount_that_let_go_of_a_file(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = reader_of(copy)
    first = reader.read("000004")

    def stale(*args: object) -> bytes:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with monkeypatch.context() as patched:
        patched.setattr(os, "pread", stale)
        with pytest.raises(Unreadable, match=r"train-000001.tar can't be read \(Stale file handle\)"):
            reader.read("000004")
    assert reader.read("000004") == first
    answers = iter([stale])
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda *args: next(answers, pread)(*args))
    assert reader.read("000004") == first  # opened anew: no sample is lost
    assert next(answers, None) is None


def test_a_folder_needs_no_cache_that_can_be_written(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ONESTAGE_CACHE", str(tmp_path / "file"))
    assert reader_of(dataset).read("000000")["__key__"] == "000000"


def test_a_folder_is_hashed_once_on_a_machine(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader_of(copy).read("000000")
    with monkeypatch.context() as patched:
        patched.setattr(hashlib, "file_digest", lambda *args: pytest.fail("hashed again"))
        assert pickle.loads(pickle.dumps(reader_of(copy))).read("000000")["__key__"] == "000000"


def test_nothing_is_fetched_ahead_from_a_folder(dataset: Path) -> None:
    reader = reader_of(dataset)
    reader.expect(["000000", "000004"])
    assert not [one for one in threading.enumerate() if one.name == "onestage-prefetch"]


def test_only_images_and_annotations_are_read(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("000000.jpg", "000000.json", "000000.pkl", "000000.pth", "000000.cls.json"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
        link = tarfile.TarInfo("000000.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    shard = Shard("a.tar", 1, (tmp_path / "a.tar").stat().st_size, "", 0)
    manifest = Manifest(name="a", classes=("cat",), splits={"train": Split((shard,))})
    sample = ShardReader(tmp_path, "train", manifest=manifest).read("000000")
    assert sample == {"__key__": "000000", "__url__": "a.tar", "jpg": b"abc", "json": b"abc"}
