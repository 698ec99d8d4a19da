"""Labels in little time: all of a small set, whole shards of a large one."""

import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from onestage.config import build, compose
from onestage.data.datamodule import DetectionData
from onestage.data.formats.record import Record, Source
from onestage.data.manifest import Manifest
from onestage.data.pack import pack
from onestage.data.sampling import sample
from onestage.data.shards import ShardReader

NUM_TRAIN, NUM_VAL, PER_SHARD = 40, 6, 5


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Image n has one box of class n % 2 whose width is n + 1 pixels; eight shards to train on."""
    folder = tmp_path_factory.mktemp("sampled")
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(folder / "one.png")

    def record(number: int) -> Record:
        return Record(folder / "one.png", 64, 64, [(0.0, 0.0, number + 1.0, 8.0)], [number % 2], [False], [False], "x")

    splits = {"train": [record(n) for n in range(NUM_TRAIN)], "val": [record(n) for n in range(NUM_VAL)]}
    pack(Source("sampled", ("even", "odd"), splits, []), folder / "set", samples_per_shard=PER_SHARD)
    return folder / "set"


def readers(root: Path) -> tuple[Manifest, dict[str, ShardReader]]:
    manifest = Manifest.load(root)
    return manifest, {name: ShardReader(root, name, manifest=manifest) for name in manifest.splits}


def test_a_small_set_is_read_whole(root: Path) -> None:
    data: DetectionData = build(compose("train", [f"data.root={root}"])["data"])
    found = data.labels()
    assert (found.num_images, found.of_images, str(found)) == (46, 46, "46 images")
    widths = sorted(box[2] for entry in found.contents.splits["train"] for box in entry.boxes)
    assert widths == [float(n + 1) for n in range(NUM_TRAIN)]


def test_time_that_is_up_leaves_a_sample_and_says_so(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, own = readers(root)
    ticks = iter(range(1000))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(ticks)))
    found = sample(manifest, own, limit_s=15)
    assert found.num_images == 15 and str(found) == "a sample of 15 of 46 images"
    assert found.contents.splits["val"], "every split has its turn"


def test_a_part_of_the_shards_lies_evenly_over_the_split(root: Path) -> None:
    manifest, own = readers(root)
    num_shards = len(manifest.split("train").shards)
    assert num_shards >= 4
    found = sample(manifest, own, most_shards=2)
    firsts = [shard.first for shard in manifest.split("train").shards]
    keys = [int(entry.where) for entry in found.contents.splits["train"]]
    assert min(keys) == firsts[0]
    assert max(keys) >= firsts[num_shards // 2]


def test_a_broken_shard_is_passed_over(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "set")
    (tmp_path / "set" / Manifest.load(root).split("val").shards[0].name).unlink()
    manifest, own = readers(tmp_path / "set")
    found = sample(manifest, own)
    assert len(found.contents.splits["train"]) == NUM_TRAIN
