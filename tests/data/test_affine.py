from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import affine

from onestage.data.affine import RandomAffine, turn_and_shear, turned, warped
from onestage.data.transforms import Augment, Sample, array_of, boxes_of, image_of, pixels_of

SampleOf = Callable[..., Sample]
STILL: dict[str, Any] = {"degrees": 0, "shear": 0, "scale": [1, 1], "translate": 0}


def about_the_middle(
    *, degrees: float, shear: tuple[float, float], scale: float, translate: tuple[int, int]
) -> np.ndarray:
    """torchvision's matrix for an image of 120x100: turned, sheared and scaled about its middle, then moved."""
    linear = scale * turn_and_shear(degrees=degrees, shear=shear)
    middle = np.array([60.0, 50.0])
    return np.column_stack([linear, middle + translate - linear @ middle])


@pytest.mark.parametrize(
    ("degrees", "shear", "scale", "translate"),
    [
        (0, (0, 0), 1.0, (0, 0)),
        (90, (0, 0), 1.0, (0, 0)),
        (30, (0, 0), 0.7, (5, -8)),
        (-12, (10, 0), 1.3, (0, 0)),
        (0, (0, 20), 1.0, (3, 3)),
        (200, (-15, 25), 0.9, (-10, 4)),
    ],
)
def test_as_torchvision_does(
    degrees: float, shear: tuple[float, float], scale: float, translate: tuple[int, int], sample_of: SampleOf
) -> None:
    sample = sample_of()
    settings = {"angle": degrees, "translate": list(translate), "scale": scale, "shear": list(shear)}
    matrix = about_the_middle(degrees=degrees, shear=shear, scale=scale, translate=translate)
    found = warped(pixels_of(sample["image"]), matrix, size=(100, 120), fill=0)
    theirs = affine(sample["image"], **settings, interpolation=v2.InterpolationMode.BILINEAR)  # type: ignore[arg-type]
    apart = np.abs(found.astype(int) - pixels_of(theirs))
    assert np.mean(apart > 8) < 0.02  # but at the edges, which each rounds in its own way
    # torchvision clips to the canvas what lies beyond it.
    expected = affine(sample["boxes"], **settings)  # type: ignore[arg-type]
    boxes = turned(array_of(sample["boxes"]), matrix).clip(0, [120, 100, 120, 100])
    assert np.abs(boxes - array_of(expected)).max() < 1e-3


def test_a_quarter_turn_by_hand(sample_of: SampleOf) -> None:
    """Clockwise on a square canvas: (x, y) becomes (100 - y, x)."""
    square: Sample = {
        **sample_of(),
        "image": image_of(np.zeros((100, 100, 3), np.uint8)),
        "boxes": boxes_of(torch.tensor([[10.0, 20, 50, 60], [0, 0, 30, 5], [90, 90, 100, 100]]), size=(100, 100)),
    }
    boxes = turned(array_of(square["boxes"]), np.array([[0.0, -1, 100], [1, 0, 0]]))
    assert boxes.tolist() == [[40, 10, 80, 50], [95, 0, 100, 30], [0, 90, 10, 100]]


def test_boxes_lie_on_their_pixels_in_right_angles(sample_of: SampleOf, assert_boxes_fit: Callable[..., None]) -> None:
    """Without a turn or shear a box stays tight, as large images are made smaller and small ones larger."""
    for times in (1, 2, 9):
        transform = RandomAffine(size=[96, 140], **{**STILL, "scale": [0.5, 2], "translate": 0.3}, min_visible=0.1)
        for seed in range(30):
            out = Augment(transforms=[transform])(sample_of(times=times), seed=seed)
            assert out["image"].shape == (3, 96, 140)
            assert_boxes_fit(out, within_px=1.5)


def test_boxes_hold_their_turned_pixels(sample_of: SampleOf) -> None:
    """All of an object's pixels lie in its box, and reach each of its sides."""
    transform = RandomAffine(size=[160, 160], degrees=180, shear=20, scale=[0.5, 0.6], translate=0)
    for seed in range(40):
        out = Augment(transforms=[transform])(sample_of(), seed=seed)
        assert out["labels"].tolist() == [0, 1, 2]
        pixels = pixels_of(out["image"])
        for label, (left, top, right, bottom) in enumerate(out["boxes"].tolist()):
            rows, columns = np.nonzero((pixels[..., label] > 127) & (np.delete(pixels, label, axis=-1).max(-1) < 64))
            extent = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            # A sharp corner of the turned object is fainter than half its colour for its last pixels.
            assert np.all(np.subtract(extent, [left, top, right, bottom]) * [1, 1, -1, -1] > -1.0)
            assert np.abs(np.subtract(extent, [left, top, right, bottom])).max() <= 4


def test_without_chance_it_is_the_image_itself(sample_of: SampleOf) -> None:
    sample = sample_of()
    out = RandomAffine(size=[100, 120], **STILL)(sample)
    assert torch.equal(out["image"], sample["image"])
    assert torch.equal(out["boxes"], sample["boxes"])


def test_every_setting_stays_within_its_bounds(sample_of: SampleOf) -> None:
    """Read back from the boxes: the middle of the image, and two arms from it, each drawn alone."""
    arms = boxes_of(torch.tensor([[60.0, 50, 60, 50], [90, 50, 90, 50], [60, 80, 60, 80]]), size=(100, 120))
    points = array_of(arms)

    def drawn(**settings: Any) -> np.ndarray:
        transform = RandomAffine(size=[200, 240], **(STILL | settings))
        found = []
        for seed in range(200):
            torch.manual_seed(seed)
            found.append(turned(points, transform._draw(100, 120))[:, :2])
        return np.array(found)

    with torch.random.fork_rng(devices=[]):
        still = drawn()
        moved = drawn(translate=0.1)[:, 0] / [240, 200] - 0.5
        scaled = np.linalg.norm(np.diff(drawn(scale=[0.5, 2])[:, :2], axis=1), axis=-1) / 60
        arm = np.diff(drawn(degrees=30)[:, :2], axis=1)[:, 0]
    assert np.abs(still - [[120, 100], [180, 100], [120, 160]]).max() < 1e-4
    assert 0.09 < moved.max() <= 0.1 and -0.1 <= moved.min() < -0.09
    assert 0.5 <= scaled.min() < 0.55 and 1.8 < scaled.max() <= 2.0
    angles = np.degrees(np.arctan2(arm[:, 1], arm[:, 0]))
    assert -30 <= angles.min() < -27 and 27 < angles.max() <= 30


def test_boxes_that_show_too_little_are_dropped(sample_of: SampleOf) -> None:
    """As for a placement: at twice the size 0.4375, 0.3 and 0.107 of the three boxes are seen."""
    for min_visible, labels in ((0.5, []), (0.4, [0]), (0.25, [0, 1]), (0.1, [0, 1, 2])):
        transform = RandomAffine(size=[100, 120], **(STILL | {"scale": [2, 2]}), min_visible=min_visible)
        assert transform(sample_of())["labels"].tolist() == labels


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match=r"need 0 < scale\[0\] <= scale\[1\], got \[2, 1\]"):
        RandomAffine(size=[64, 64], scale=[2, 1])
    with pytest.raises(ValueError, match=r"need 0 <= shear < 45 degrees, .* got 45"):
        RandomAffine(size=[64, 64], shear=45)
