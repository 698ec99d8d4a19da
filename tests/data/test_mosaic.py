from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onestage.data import samples
from onestage.data.datamodule import DetectionData
from onestage.data.mosaic import Mosaic
from onestage.data.transforms import MIN_SIDE_PX, Augment, Sample, boxes_of, image_of, pixels_of
from onestage.types import Batch, Placement

DataOf = Callable[..., DetectionData]
SHAPES = [(60, 80), (90, 50), (64, 64), (120, 40)]


def filled(level: int, *, shape: tuple[int, int], boxes: Sequence[Sequence[float]] | None = None) -> Sample:
    """Black, and filled with ``level`` within its boxes: one over the whole image by default. Labels are levels."""
    height, width = shape
    boxes = [[0, 0, width, height]] if boxes is None else boxes
    pixels = np.zeros((height, width, 3), np.uint8)
    for left, top, right, bottom in boxes:
        pixels[int(top) : int(bottom), int(left) : int(right)] = level
    return {
        "key": f"{level:06d}",
        "image_id": level,
        "image": image_of(pixels),
        "boxes": boxes_of(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), size=shape),
        "labels": torch.full((len(boxes),), level),
        "crowd": torch.full((len(boxes),), level == 100),
        "difficult": torch.full((len(boxes),), level == 200),
        "placement": Placement(),
    }


def whole() -> list[Sample]:
    return [filled(50 * (index + 1), shape=shape) for index, shape in enumerate(SHAPES)]


def mosaic_of(images: list[Sample], *, seed: int, epoch: int = 0, **options: Any) -> Sample:
    mosaic = Mosaic(**({"size": [96, 128], "probability": 1.0} | options))
    return Augment(transforms=[mosaic])(images[0], seed=seed, epoch=epoch, others=images[1:])


@pytest.mark.parametrize("num_images", [4, 6])
def test_four_different_images_tile_the_canvas(num_images: int) -> None:
    images = [*whole(), filled(230, shape=(40, 40)), filled(240, shape=(40, 40))][:num_images]
    for seed in range(30):
        out = mosaic_of(images, seed=seed, min_visible=0.0)
        assert out["image"].shape == (3, 96, 128)
        assert (out["key"], out["image_id"]) == ("000050", 50)
        labels = out["labels"].tolist()
        assert 50 in labels
        assert len(set(labels)) == len(labels) == 4
        assert out["crowd"].tolist() == [label == 100 for label in labels]
        assert out["difficult"].tolist() == [label == 200 for label in labels]
        boxes = out["boxes"].as_subclass(torch.Tensor)
        assert float((boxes[:, 2:] - boxes[:, :2]).prod(dim=1).sum()) == pytest.approx(96 * 128)
        for (left, top, right, bottom), label in zip(boxes.int().tolist(), labels, strict=True):
            assert (pixels_of(out["image"])[top + 2 : bottom - 2, left + 2 : right - 2] == label).all()
            assert right - left >= 0.2 * 128 - 1
            assert bottom - top >= 0.2 * 96 - 1


def test_the_tiles_meet_anywhere_and_come_in_any_order() -> None:
    out = [mosaic_of(whole(), seed=seed, min_visible=0.0) for seed in range(60)]
    assert len({tuple(one["labels"].tolist()) for one in out}) > 12
    meeting = torch.stack([one["boxes"][0, 2:] for one in out]) / torch.tensor([128, 96])
    assert (meeting.amin(dim=0) < 0.25).all()
    assert (meeting.amax(dim=0) > 0.75).all()


def test_cut_boxes_stay_on_their_pixels() -> None:
    boxes = [[5, 5, 30, 20], [40, 30, 70, 55]]
    images = [filled(250, shape=(60, 80), boxes=boxes) for _ in range(4)]
    for seed in range(30):
        out = mosaic_of(images, seed=seed, min_visible=0.0)
        covered = np.zeros((96, 128), bool)
        for left, top, right, bottom in out["boxes"].round().int().tolist():
            covered[top:bottom, left:right] = True
        bright = pixels_of(out["image"])[..., 0] > 128
        # All but the edges, which a pixel of one or the other may own, and slivers not worth a box.
        assert (bright != covered).mean() < 0.03


def test_an_image_alone_tiles_itself() -> None:
    out = mosaic_of([filled(90, shape=(60, 80))], seed=0, min_visible=0.0)
    assert out["labels"].tolist() == [90] * 4
    assert (out["image"] == 90).all()


def test_few_images_are_repeated() -> None:
    labels = mosaic_of(whole()[:2], seed=0, min_visible=0.0)["labels"].tolist()
    assert sorted(labels) == [50, 100, 100, 100]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    sides=st.lists(st.integers(4, 300), min_size=2, max_size=8),
    min_visible=st.sampled_from([0.0, 0.2, 0.9]),
)
def test_boxes_stay_inside_and_large_enough(seed: int, sides: list[int], min_visible: float) -> None:
    images = []
    generator = np.random.default_rng(seed)
    for height, width in pairwise(sides):
        corners = np.sort(generator.uniform(0, 1, (5, 2, 2)), axis=1).reshape(5, 4)
        images.append(filled(9, shape=(height, width), boxes=(corners * [width, height, width, height]).tolist()))
    out = mosaic_of(images, seed=seed, min_visible=min_visible)
    boxes = out["boxes"].as_subclass(torch.Tensor)
    assert len(boxes) == len(out["labels"]) == len(out["crowd"]) == len(out["difficult"])
    assert (boxes >= 0).all()
    assert (boxes[:, 2:] <= torch.tensor([128, 96])).all()
    assert (boxes[:, 2:] - boxes[:, :2] >= MIN_SIDE_PX - 1e-3).all()


def test_probability() -> None:
    made = sum(
        len(mosaic_of(whole(), seed=seed, probability=0.3, min_visible=0.0)["labels"]) > 1 for seed in range(200)
    )
    assert 40 < made < 80


@pytest.mark.parametrize(("epoch", "made"), [(0, True), (6, True), (7, False), (9, False)])
def test_off_in_the_last_epochs(epoch: int, made: bool) -> None:
    out = mosaic_of(whole(), seed=0, epoch=epoch, num_epochs=10, plain_epochs=3, min_visible=0.0)
    assert (len(out["labels"]) > 1) == made


def test_each_image_is_decoded_once(data_of: DataOf, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    decode = samples.decode

    def counted(raw: dict[str, Any], *, num_classes: int) -> Sample:
        decoded.append(raw["__key__"])
        return decode(raw, num_classes=num_classes)

    monkeypatch.setattr(samples, "decode", counted)
    list(data_of(dataset, mosaic=Mosaic(size=[32, 48], probability=1.0)).train_dataloader())
    assert sorted(decoded) == [f"{number:06d}" for number in range(19)]


def test_batches_are_the_same_with_workers_and_after_a_resume(data_of: DataOf, dataset: Path) -> None:
    def batches(num_workers: int, *, start: int) -> list[Batch]:
        mosaic = Mosaic(size=[32, 48], probability=1.0)
        loader = data_of(dataset, num_workers=num_workers, mosaic=mosaic).train_dataloader()
        loader.start_at(start)
        return list(loader)

    uninterrupted = batches(0, start=0)
    for expected, found in zip(uninterrupted[2:], batches(2, start=8), strict=True):
        assert torch.equal(expected.images, found.images)
        for one, other in zip(expected.targets, found.targets, strict=True):
            assert torch.equal(one.boxes, other.boxes)


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match=r"need 0 < min_share <= 0.5, got 0.6"):
        Mosaic(size=[64, 64], min_share=0.6)
    with pytest.raises(ValueError, match=r"need zoom >= 1, got 0.5"):
        Mosaic(size=[64, 64], zoom=0.5)
    with pytest.raises(ValueError, match=r"plain_epochs=5 needs an end to count from: set trainer.max_epochs"):
        Mosaic(size=[64, 64], plain_epochs=5)
