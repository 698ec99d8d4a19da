import io
import pickle
import shutil
import tarfile
from multiprocessing import get_context
from pathlib import Path

import pytest

from onestage.data import shards
from onestage.data.manifest import Manifest, Shard, Split
from onestage.data.shards import ShardReader
from onestage.errors import InputError


def reader_of(root: Path, split: str = "train") -> ShardReader:
    return ShardReader(root, split, manifest=Manifest.load(root))


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


def test_key_of_another_split(dataset: Path) -> None:
    with pytest.raises(KeyError, match="no sample 000019"):
        reader_of(dataset).read("000019")


def test_opens_a_bounded_number_of_files(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MAX_OPEN_SHARDS", 2)
    reader = reader_of(dataset)
    for key in [f"{n:06d}" for n in (0, 4, 8, 12, 16, 0, 18)]:
        assert reader.read(key)["__key__"] == key
        assert len(reader._files) <= 2


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


def test_shard_truncated_while_it_is_read(copy: Path) -> None:
    reader = reader_of(copy)
    reader.read("000004")
    with (copy / "train-000001.tar").open("r+b") as file:
        file.truncate(600)
    with pytest.raises(InputError, match=r"train-000001.tar is cut short"):
        reader.read("000005")


def test_shard_overwritten_with_something_else(copy: Path) -> None:
    path = copy / "train-000001.tar"
    path.write_bytes(b"\xaa" * path.stat().st_size)
    with pytest.raises(InputError, match=r"train-000001.tar is no tar file"):
        reader_of(copy).read("000004")


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
