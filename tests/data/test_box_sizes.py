"""Box sizes as the network sees them: against the batches of evaluation, and by hand."""

import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from onestage.data.box_sizes import box_sizes
from onestage.data.datamodule import DetectionData
from onestage.data.formats.record import Record, Source
from onestage.data.manifest import Manifest
from onestage.data.pack import pack
from onestage.errors import InputError

BOXES = [(4.0, 3.0, 24.0, 13.0), (0.0, 0.0, 101.0, 30.0), (10.0, 10.0, 12.5, 30.0), (50.0, 5.0, 90.0, 25.0)]


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One image of 101x37 with four boxes, of which the third is a crowd and the fourth difficult."""
    folder = tmp_path_factory.mktemp("wide")
    path = folder / "one.png"
    Image.fromarray(np.zeros((37, 101, 3), np.uint8)).save(path)
    record = Record(
        path=path,
        width=101,
        height=37,
        boxes=BOXES,
        labels=[0, 0, 0, 0],
        difficult=[False, False, False, True],
        crowd=[False, False, True, False],
        source="one.png",
    )
    pack(Source("wide", ("thing",), {"train": [record]}, []), folder / "set")
    return folder / "set"


def test_letterboxed_by_hand(wide: Path) -> None:
    """101x37 on 64 high, 202 wide: the width is what binds, twice as large; the crowd is left out."""
    found = box_sizes(wide, "train", size=[100, 202])
    assert found.sizes.tolist() == [[40, 20], [202, 60], [80, 40]]
    assert (found.num_images, found.skipped) == (1, [])


def test_stretched_by_hand(wide: Path) -> None:
    """Both sides on their own: twice as wide, four times as high."""
    found = box_sizes(wide, "train", size=[148, 202], fit="stretch")
    assert found.sizes.tolist() == [[40, 40], [202, 120], [80, 80]]


def test_they_are_those_of_the_batches_that_evaluation_sees(dataset: Path) -> None:
    """40x30 images on an input whose letterbox rounds their height: 64 wide is 1.6 times, 30 high is 48."""
    size = [50, 63]
    data = DetectionData(root=dataset, batch_size=8, input_size=size, augment={}, seed=0, num_workers=0)
    boxes = [target.boxes for batch in data.dataloader("train") for target in batch.targets]
    expected = torch.cat([one[:, 2:] - one[:, :2] for one in boxes])
    found = box_sizes(dataset, "train", size=size)
    assert found.num_images == 19
    torch.testing.assert_close(found.sizes.float(), expected, rtol=1e-5, atol=1e-4)


def test_no_image_is_read(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    pread = os.pread

    def counted(file: int, num_bytes: int, offset: int) -> bytes:
        asked.append(num_bytes)
        return pread(file, num_bytes, offset)

    box_sizes(dataset, "val", size=[32, 32])  # hashes the shards
    monkeypatch.setattr(os, "pread", counted)
    box_sizes(dataset, "val", size=[32, 32])
    with tarfile.open(dataset / "val-000000.tar") as first, tarfile.open(dataset / "val-000001.tar") as second:
        sizes = {info.name: info.size for info in (*first, *second)}
    pictures = {size for name, size in sizes.items() if name.endswith(".png")}
    annotations = [size for name, size in sorted(sizes.items()) if name.endswith(".json")]
    assert [num_bytes for num_bytes in asked if num_bytes in annotations] == annotations
    assert not pictures & set(asked)


def test_progress_counts_every_image(dataset: Path) -> None:
    told: list[tuple[int, int]] = []
    box_sizes(dataset, "val", size=[32, 32], progress=lambda *one: told.append(one))
    assert told == [(done, 5) for done in range(1, 6)]


def test_a_set_without_boxes_has_none(tmp_path: Path) -> None:
    path = tmp_path / "empty.png"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)
    record = Record(path, 8, 8, boxes=[], labels=[], difficult=[], crowd=[], source="empty.png")
    pack(Source("empty", ("thing",), {"train": [record]}, []), tmp_path / "set")
    found = box_sizes(tmp_path / "set", "train", size=[32, 32])
    assert found.sizes.shape == (0, 2)
    assert found.num_images == 1


def test_a_shard_that_is_gone_is_told_image_by_image_and_the_others_count(dataset: Path, tmp_path: Path) -> None:
    root = shutil.copytree(dataset, tmp_path / "set")
    (root / "train-000001.tar").unlink()
    found = box_sizes(root, "train", size=[32, 32])
    assert [one.key for one in found.skipped] == ["000004", "000005", "000006", "000007"]
    assert all("train-000001.tar is missing" in one.why for one in found.skipped)
    assert found.num_images == 15
    # Images 4 to 7 have 1, 2, 0 and 1 boxes; all 19 have 0 + 1 + 2 six times, and 0.
    assert len(found.sizes) == 18 - 4


@pytest.mark.parametrize(
    "change",
    [{"boxes": None}, {"boxes": [[1, 2, 3]]}, {"crowd": [True]}, {"width": 0}, {"height": "tall"}],
)
def test_an_annotation_that_says_nothing_usable_is_left_out(
    wide: Path, tmp_path: Path, change: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    from onestage.data.shards import ShardReader

    read = ShardReader.read

    def broken(self: ShardReader, key: str, **asked: Any) -> dict[str, object]:
        raw = read(self, key, **asked)
        return {**raw, "json": json.dumps({**json.loads(raw["json"]), **change}).encode()}

    monkeypatch.setattr(ShardReader, "read", broken)
    found = box_sizes(wide, "train", size=[100, 202])
    assert len(found.sizes) == 0
    assert [one.key for one in found.skipped] == ["000000"]
    assert "has no annotation that can be read" in found.skipped[0].why


def test_a_split_that_is_not_there_is_refused(dataset: Path) -> None:
    assert "extra" not in Manifest.load(dataset).splits
    with pytest.raises(InputError, match="has no split 'extra'"):
        box_sizes(dataset, "extra", size=[32, 32])
