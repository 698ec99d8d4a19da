"""Windows are read back from a picture whose red is its column and whose green is its row."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou
from torchvision.transforms import v2

from onestage.data.crops import RandomIoUWindow, RandomWindow
from onestage.data.transforms import Augment, OnCanvas, Sample, boxes_of, image_of, pixels_of
from onestage.types import Placement

SampleOf = Callable[..., Sample]
SEEDS = range(60)


def ramp_of(*boxes: Sequence[float]) -> Sample:
    """A picture of 256x256 whose pixel (x, y) is (x, y, 255): what lies beyond it has another blue."""
    pixels = np.full((256, 256, 3), 255, np.uint8)
    pixels[..., 1], pixels[..., 0] = np.indices((256, 256))
    flags = torch.zeros(len(boxes), dtype=torch.bool)
    return {
        "key": "000001",
        "image_id": 1,
        "image": image_of(pixels),
        "boxes": boxes_of(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), size=(256, 256)),
        "labels": torch.arange(len(boxes)),
        "crowd": flags,
        "difficult": flags,
        "placement": Placement(),
    }


def drawn(transform: OnCanvas, sample: Sample) -> list[Sample]:
    return [Augment(transforms=[transform])(sample, seed=seed) for seed in SEEDS]  # type: ignore[list-item]


def window_of(sample: Sample) -> np.ndarray:
    """Left, top, right, bottom of the picture that is seen, in the picture's pixels."""
    pixels = pixels_of(sample["image"]).astype(float)
    seen = pixels[(pixels[..., 2] == 255)]
    return np.array([seen[:, 0].min(), seen[:, 1].min(), seen[:, 0].max() + 1, seen[:, 1].max() + 1])


@pytest.mark.parametrize("times", [1, 2, 9])
@pytest.mark.parametrize("size", [(96, 96), (60, 140)])
@pytest.mark.parametrize("kind", ["jitter", "iou"])
def test_boxes_lie_on_their_pixels(
    kind: str, times: int, size: Sequence[int], sample_of: SampleOf, assert_boxes_fit: Callable[..., None]
) -> None:
    window = (
        RandomWindow(size=size, jitter=0.4, min_visible=0.4)
        if kind == "jitter"
        else RandomIoUWindow(size=size, max_zoom_out=2.0)
    )
    kept = set()
    for seed in SEEDS:
        out = Augment(transforms=[window, v2.RandomHorizontalFlip()])(sample_of(times=times), seed=seed)
        assert list(out["image"].shape) == [3, *size]
        assert out["crowd"].tolist() == [label == 2 for label in out["labels"].tolist()]
        assert out["difficult"].tolist() == [label == 0 for label in out["labels"].tolist()]
        assert_boxes_fit(out, within_px=1.5)
        kept.add(len(out["labels"]))
    assert len(kept) > 1


def test_window_without_jitter_stretches_the_whole_image(sample_of: SampleOf) -> None:
    out = RandomWindow(size=[200, 60], jitter=0)(sample_of())  # from 100 high and 120 wide
    assert out["boxes"].tolist() == [[5, 40, 25, 120], [30, 20, 55, 80], [40, 120, 60, 190]]


def test_jitter_moves_every_edge_by_its_share_at_most() -> None:
    windows = np.array([window_of(one) for one in drawn(RandomWindow(size=[256, 256], jitter=0.2), ramp_of())])
    inward = np.abs(windows - [0, 0, 256, 256])
    assert inward.max() <= 0.2 * 256 + 2
    assert (inward.max(axis=0) > 0.15 * 256).all()
    assert (inward < 2).any(axis=0).all()  # an edge that lies outside shows all of its side


def test_zooming_out_shows_all_of_the_image_on_a_larger_canvas() -> None:
    transform = RandomIoUWindow(size=[256, 256], zoom_out_probability=1.0, max_zoom_out=4.0, min_ious=[1.0], fill=0.25)
    sides = []
    for out in drawn(transform, ramp_of([64, 64, 192, 192])):
        left, top, right, bottom = out["boxes"][0].tolist()
        assert right - left == pytest.approx(bottom - top, abs=1)  # edges of the image lie on whole pixels
        sides.append((right - left) / 128)
        outside = pixels_of(out["image"])[..., 2] < 250
        assert (~outside).mean() == pytest.approx(sides[-1] ** 2, abs=0.03)
        assert np.abs(pixels_of(out["image"])[pixels_of(out["image"])[..., 2] == 64].astype(int) - 64).max() == 0
    assert 0.25 <= min(sides) < 0.3
    assert 0.7 < max(sides) <= 1


@pytest.mark.parametrize("min_iou", [0.1, 0.5, 0.7])
def test_some_box_overlaps_the_patch_enough(min_iou: float) -> None:
    boxes = [[20, 30, 150, 220], [100, 40, 240, 120], [10, 10, 30, 30]]
    transform = RandomIoUWindow(size=[256, 256], zoom_out_probability=0.0, min_ious=[min_iou])
    ious, shapes = [], []
    for out in drawn(transform, ramp_of(*boxes)):
        window = torch.tensor(window_of(out), dtype=torch.float32)
        ious.append(float(box_iou(window[None], torch.tensor(boxes, dtype=torch.float32)).max()))
        shapes.append((window[2:] - window[:2]) / 256)
        centres = (torch.tensor(boxes)[:, :2] + torch.tensor(boxes)[:, 2:]) / 2
        inside = ((centres > window[:2] - 2) & (centres < window[2:] + 2)).all(dim=1)
        assert set(out["labels"].tolist()) <= set(inside.nonzero().flatten().tolist())
        assert len(out["labels"])
    cropped = [iou for iou, shape in zip(ious, shapes, strict=True) if shape.min() < 0.98]
    assert len(cropped) > 30
    assert min(cropped) >= min_iou - 0.03
    aspects = torch.stack([shape[0] / shape[1] for shape in shapes])
    assert aspects.min() >= 0.48
    assert aspects.max() <= 2.1
    assert torch.stack(shapes).min() >= 0.29


def test_patch_that_no_box_overlaps_enough_is_not_taken() -> None:
    """Of a box of 20 pixels no patch of 77 and more can have an IoU of 0.5: the view stays whole."""
    transform = RandomIoUWindow(size=[256, 256], zoom_out_probability=0.0, min_ious=[0.5])
    assert all((window_of(out) == [0, 0, 256, 256]).all() for out in drawn(transform, ramp_of([100, 100, 120, 120])))


def test_image_without_boxes_stays_whole() -> None:
    for out in drawn(RandomIoUWindow(size=[256, 256], zoom_out_probability=0.0), ramp_of()):
        assert torch.equal(out["image"], ramp_of()["image"])
        assert out["boxes"].shape == (0, 4)


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match=r"need 0 <= jitter < 0.5, or opposite edges could meet, got 0.5"):
        RandomWindow(size=[64, 64], jitter=0.5)
    with pytest.raises(ValueError, match=r"need max_zoom_out >= 1 and max_aspect >= 1, got 0.5 and 2"):
        RandomIoUWindow(size=[64, 64], max_zoom_out=0.5)
    with pytest.raises(ValueError, match=r"need 0 < min_scale <= 1, got 0"):
        RandomIoUWindow(size=[64, 64], min_scale=0)
