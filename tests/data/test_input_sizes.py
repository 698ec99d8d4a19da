"""What a multi-scale training sees: the paper's sizes, the same for every rank, worker and resume."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from onestage.data.datamodule import DetectionData
from onestage.data.input_sizes import InputSizes
from onestage.types import Batch

DataOf = Callable[..., DetectionData]
SMALL = InputSizes(size=[32, 48], min=32, max=128, step=32, every=2)


def sides(seed: int, *, batches: int = 600) -> list[int]:
    draw = InputSizes(size=[416, 416], min=320, max=608, step=32, every=10)
    found = [draw(seed=seed, epoch=0, batch=batch) for batch in range(batches)]
    assert all(height == width for height, width in found)
    return [height for height, _ in found]


def test_the_papers_ten_sizes_a_new_one_every_ten_batches() -> None:
    found = sides(0)
    # YOLO9000: "{320, 352, ..., 608}", "every 10 batches".
    assert set(found) == {320, 352, 384, 416, 448, 480, 512, 544, 576, 608}
    assert all(len(set(found[start : start + 10])) == 1 for start in range(0, 600, 10))
    drawn = found[::10]
    assert sum(one != other for one, other in pairwise(drawn)) > 40
    assert found != sides(1)


def test_off_it_is_the_input_size() -> None:
    assert InputSizes(size=[32, 48])(seed=0, epoch=3, batch=25) == (32, 48)


def sizes_of(batches: list[Batch]) -> list[list[int]]:
    return [list(batch.images.shape[2:]) for batch in batches]


def test_batches_follow_and_evaluation_does_not(data_of: DataOf, dataset: Path) -> None:
    data = data_of(dataset, batch_size=1, input_sizes=SMALL)
    batches = list(data.train_dataloader())
    found = sizes_of(batches)
    assert found[::2][:-1] == found[1::2]
    assert len({height for height, _ in found}) > 2
    for batch, (height, width) in zip(batches, found, strict=True):
        for target in batch.targets:
            assert (target.boxes[:, 2:] <= torch.tensor([width, height])).all()
    assert sizes_of(list(data.val_dataloader())) == [[32, 48]] * 5


def test_boxes_grow_with_the_image(data_of: DataOf, dataset: Path) -> None:
    for batch in data_of(dataset, batch_size=1, plain=True, input_sizes=SMALL).train_dataloader():
        side = batch.images.shape[-1]
        for target in batch.targets:
            # The first box is 16 of 40 wide, and the width fills the square.
            assert target.boxes[:1, 2] - target.boxes[:1, 0] == pytest.approx(side * 16 / 40, abs=0.1)


def test_the_same_on_all_ranks_and_with_workers(data_of: DataOf, dataset: Path) -> None:
    def sizes(rank: int, num_workers: int) -> list[list[int]]:
        loader = data_of(dataset, batch_size=2, num_workers=num_workers, input_sizes=SMALL).train_dataloader()
        loader.rank, loader.world_size = rank, 2
        return sizes_of(list(loader))

    assert sizes(0, 0) == sizes(1, 0) == sizes(0, 2)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_same_after_a_resume_within_an_epoch(data_of: DataOf, dataset: Path, num_workers: int) -> None:
    uninterrupted = list(data_of(dataset, batch_size=1, input_sizes=SMALL).train_dataloader())
    loader = data_of(dataset, batch_size=1, num_workers=num_workers, input_sizes=SMALL).train_dataloader()
    loader.load_state_dict({"epoch": 0, "images": 7})
    resumed = list(loader)
    assert len(resumed) == 12
    assert all(torch.equal(a.images, b.images) for a, b in zip(uninterrupted[7:], resumed, strict=True))


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match=r"need 0 < data.input_sizes.min <= data.input_sizes.max, got 608 and 320"):
        InputSizes(size=[416, 416], min=608, max=320)
    with pytest.raises(ValueError, match=r"need data.input_sizes.step >= 1 and data.input_sizes.every >= 0, got 0 and"):
        InputSizes(size=[416, 416], step=0)
