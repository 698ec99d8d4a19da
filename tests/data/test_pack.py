import hashlib
import json
import tarfile
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from onestage.data import pack as pack_module
from onestage.data.formats.record import Source
from onestage.data.manifest import Manifest
from onestage.data.pack import pack
from onestage.errors import InputError


def test_shards_hold_the_images_as_they_came(source: Source, tmp_path: Path) -> None:
    out = tmp_path / "dataset"
    manifest = pack(source, out, samples_per_shard=4)
    names = [f"train-00000{n}.tar" for n in range(5)] + ["val-000000.tar", "val-000001.tar", "test-000000.tar"]
    assert sorted(path.name for path in out.iterdir()) == sorted([*names, "dataset.json"])
    assert Manifest.load(out) == manifest
    images = [record.path.read_bytes() for records in source.splits.values() for record in records]
    seen = 0
    for shard in (shard for split in manifest.splits.values() for shard in split.shards):
        content = (out / shard.name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (shard.num_bytes, shard.sha256)
        with tarfile.open(out / shard.name) as tar:
            members = tar.getnames()
            assert members == [f"{key}.{kind}" for key, kind in product(shard.keys(), ("json", "png"))]
            for name in members[1::2]:
                assert tar.extractfile(name).read() == images[seen]  # type: ignore[union-attr]
                seen += 1
    assert seen == 27


def test_annotation_of_a_sample(source: Source, tmp_path: Path) -> None:
    pack(source, tmp_path / "dataset")
    with tarfile.open(tmp_path / "dataset" / "train-000000.tar") as tar:
        fields = json.load(tar.extractfile("000005.json"))  # type: ignore[arg-type]
    assert fields == {
        "image_id": 5,
        "source": "image5.png",
        "width": 40,
        "height": 30,
        "boxes": [[4.0, 3.0, 20.0, 15.0], [10.0, 10.0, 40.0, 30.0]],
        "labels": [0, 1],
        "difficult": [False, True],
        "crowd": [False, False],
    }


def test_equal_sources_give_equal_bytes(source: Source, tmp_path: Path) -> None:
    one, other = pack(source, tmp_path / "one"), pack(replace(source, name="other"), tmp_path / "other")
    assert one.content_hash == other.content_hash
    assert one.splits == other.splits


def test_large_images_make_shards_of_fewer(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = source.splits["train"][0].path.stat().st_size
    monkeypatch.setattr(pack_module, "MAX_SHARD_BYTES", int(2.5 * size))
    manifest = pack(source, tmp_path / "dataset")
    assert [shard.num_samples for shard in manifest.split("val").shards] == [2, 2, 1]


def test_same_dataset_is_left(source: Source, tmp_path: Path) -> None:
    pack(source, tmp_path / "dataset")
    before = (tmp_path / "dataset" / "dataset.json").stat().st_mtime_ns
    assert pack(replace(source, name="new name"), tmp_path / "dataset").name == "greys"
    assert (tmp_path / "dataset" / "dataset.json").stat().st_mtime_ns == before


def test_other_dataset_is_replaced_only_when_asked(source: Source, tmp_path: Path) -> None:
    out = tmp_path / "dataset"
    pack(source, out)
    other = replace(source, classes=("cat", "dog", "owl"))
    with pytest.raises(InputError, match=r"dataset holds another dataset, 'greys': choose another place or overwrite"):
        pack(other, out)
    assert Manifest.load(out).classes == ("cat", "dog")
    pack(other, out, overwrite=True)
    assert Manifest.load(out).classes == ("cat", "dog", "owl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dataset", "images"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_folder_of_another_kind_is_never_replaced(source: Source, tmp_path: Path, overwrite: bool) -> None:
    with pytest.raises(InputError, match="exists and is no dataset folder"):
        pack(source, tmp_path / "images", overwrite=overwrite)
    assert source.splits["train"][0].path.exists()


def test_empty_folder_is_filled(source: Source, tmp_path: Path) -> None:
    (tmp_path / "dataset").mkdir()
    pack(source, tmp_path / "dataset")
    assert Manifest.load(tmp_path / "dataset").name == "greys"


def test_nothing_is_left_of_a_failure_or_an_earlier_one(source: Source, tmp_path: Path) -> None:
    leftover = tmp_path / ".dataset.partial"
    leftover.mkdir()
    (leftover / "train-000009.tar").write_bytes(b"cut")

    def fail(done: int, num_images: int) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        pack(source, tmp_path / "dataset", progress=fail)
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_progress_counts_images(source: Source, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    pack(source, tmp_path / "dataset", samples_per_shard=4, progress=lambda *counts: told.append(counts))
    assert told == [(n, 27) for n in range(1, 28)]
