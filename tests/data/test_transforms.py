from collections.abc import Callable, Sequence

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from onestage.data.transforms import (
    Augment,
    HorizontalFlip,
    HSVJitter,
    Letterbox,
    RandomPlacement,
    Resize,
    Sample,
    boxes_of,
    fit_of,
    image_of,
    letterbox,
    pixels_of,
    resized,
)
from onestage.types import XYXY, Placement

SampleOf = Callable[..., Sample]
AssertBoxesFit = Callable[..., None]
ERASED = {"scale": (1, 1), "aspect": 1, "translate": 0}


@pytest.mark.parametrize(
    ("shape", "size", "placement"),
    [
        ((100, 200), [100, 100], Placement((0.5, 0.5), (0.0, 25.0))),
        ((50, 25), [100, 200], Placement((2.0, 2.0), (75.0, 0.0))),
        ((480, 640), [416, 416], Placement((0.65, 0.65), (0.0, 52.0))),
        ((1, 1000), [10, 10], Placement((0.01, 1.0), (0.0, 4.0))),
    ],
)
def test_letterbox_by_hand(shape: tuple[int, int], size: list[int], placement: Placement) -> None:
    image, found = letterbox(np.zeros((*shape, 3), np.uint8), size=size, fill=0.5)
    assert found == placement
    inside = np.zeros(size, bool)
    (scale_x, scale_y), (left, top) = (placement.scale, tuple(map(int, placement.offset)))
    inside[top : top + round(shape[0] * scale_y), left : left + round(shape[1] * scale_x)] = True
    assert (image[inside] == 0).all()
    assert (image[~inside] == 128).all()


@settings(max_examples=30)
@given(
    height=st.integers(8, 300),
    width=st.integers(8, 300),
    size=st.sampled_from([[64, 64], [96, 32], [32, 160]]),
)
def test_letterbox_leads_back_to_the_original(height: int, width: int, size: list[int], sample_of: SampleOf) -> None:
    pixels = np.zeros((height, width, 3), np.uint8)
    boxes = torch.tensor([[0.0, 0.0, width, height], [1.0, 2.0, width / 2, height / 3]])
    sample = {**sample_of(), "image": image_of(pixels), "boxes": boxes_of(boxes, size=(height, width))}
    out = Letterbox(size=size)(sample)  # type: ignore[arg-type]
    assert list(out["image"].shape) == [3, *size]
    back = out["placement"].to_original(XYXY(out["boxes"].as_subclass(torch.Tensor)))
    torch.testing.assert_close(back, boxes, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("times", [1, 7])
def test_letterboxed_boxes_lie_on_their_pixels(
    times: int, sample_of: SampleOf, assert_boxes_fit: AssertBoxesFit
) -> None:
    assert_boxes_fit(Letterbox(size=[90, 150])(sample_of(times=times)))


@pytest.mark.parametrize("times", [1, 7])
def test_stretched_boxes_lie_on_their_pixels(times: int, sample_of: SampleOf, assert_boxes_fit: AssertBoxesFit) -> None:
    out = Resize(size=[90, 150])(sample_of(times=times))
    assert out["image"].shape == (3, 90, 150)
    assert out["placement"] == Placement(scale=(pytest.approx(1.25 / times), pytest.approx(0.9 / times)))
    assert_boxes_fit(out)


@pytest.mark.parametrize("size", [(90, 150), (40, 31), (300, 300)])
def test_stretched_as_torchvision_does(size: tuple[int, int], sample_of: SampleOf) -> None:
    sample = sample_of()
    out = Resize(size=size)(sample)
    image = v2.functional.resize(sample["image"], list(size), antialias=max(100 / size[0], 120 / size[1]) > 2)
    assert int((out["image"].int() - image.int()).abs().max()) <= 1
    torch.testing.assert_close(out["boxes"], v2.functional.resize(sample["boxes"], list(size)), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(480, 640), (333, 217)])
def test_far_smaller_is_pillows_antialiased_picture(shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    window = pixels[5:-20, 30:-7]  # a view, as crops are
    expected = np.asarray(Image.fromarray(window).resize((64, 48), Image.Resampling.BILINEAR))
    assert np.abs(resized(window, size=(48, 64)).astype(int) - expected).max() <= 1


def test_fits_by_name(sample_of: SampleOf) -> None:
    for name, transform in (("letterbox", Letterbox), ("stretch", Resize)):
        fit = fit_of(name)
        out = fit.transform(size=(60, 90))(sample_of())
        pixels, placement = fit.place(pixels_of(sample_of()["image"]), size=(60, 90))
        assert isinstance(fit.transform(size=(60, 90)), transform)
        assert np.array_equal(pixels, pixels_of(out["image"]))
        assert placement == out["placement"]
    with pytest.raises(ValueError, match=r"need data.fit to be one of letterbox, stretch, got 'crop'"):
        fit_of("crop")


@pytest.mark.parametrize("times", [1, 2, 9])
@pytest.mark.parametrize("size", [[96, 96], [60, 140]])
def test_placed_boxes_lie_on_their_pixels(
    times: int, size: Sequence[int], sample_of: SampleOf, assert_boxes_fit: AssertBoxesFit
) -> None:
    transforms = [
        RandomPlacement(size=size, scale=(0.4, 2.5), aspect=1.5, translate=0.4),
        v2.RandomHorizontalFlip(),
        v2.RandomVerticalFlip(),
    ]
    kept = set()
    for seed in range(40):
        out = Augment(transforms=transforms)(sample_of(times=times), seed=seed)
        assert list(out["image"].shape) == [3, *size]
        assert (out["boxes"] >= 0).all()
        assert (out["boxes"][:, 2:] <= torch.tensor([size[1], size[0]])).all()
        assert out["crowd"].tolist() == [label == 2 for label in out["labels"].tolist()]
        assert out["difficult"].tolist() == [label == 0 for label in out["labels"].tolist()]
        assert_boxes_fit(out)
        kept.add(len(out["labels"]))
    assert len(kept) > 1


def test_placement_without_chance_is_the_image_itself(sample_of: SampleOf) -> None:
    sample = sample_of()
    out = RandomPlacement(size=[100, 120], **ERASED)(sample)
    assert torch.equal(out["image"], sample["image"])
    assert torch.equal(out["boxes"], sample["boxes"])


def test_boxes_that_show_too_little_are_dropped(sample_of: SampleOf) -> None:
    # Twice as large and centred, the canvas shows x 30 to 90 and y 25 to 75 of the original, so 0.4375, 0.3 and 0.107
    # of the three boxes.
    for min_visible, labels in ((0.5, []), (0.4, [0]), (0.25, [0, 1]), (0.1, [0, 1, 2])):
        out = RandomPlacement(size=[100, 120], scale=(2, 2), aspect=1, translate=0, min_visible=min_visible)(
            sample_of()
        )
        assert out["labels"].tolist() == labels
    assert out["boxes"].tolist() == [[0, 0, 40, 70], [60, 0, 120, 30], [100, 70, 120, 100]]


def test_boxes_thinner_than_two_pixels_are_dropped(sample_of: SampleOf) -> None:
    sample = {
        **sample_of(),
        "boxes": boxes_of(torch.tensor([[0.0, 0, 1.9, 50], [0, 0, 2, 2], [0, 0, 9, 1.9]]), size=[100, 120]),
    }
    out = RandomPlacement(size=[100, 120], **ERASED)(sample)  # type: ignore[arg-type]
    assert out["labels"].tolist() == [1]


def test_image_without_boxes(sample_of: SampleOf) -> None:
    none = torch.zeros(0, dtype=torch.bool)
    boxes = boxes_of(torch.zeros(0, 4), size=[100, 120])
    sample: Sample = {**sample_of(), "boxes": boxes, "labels": none.long(), "crowd": none, "difficult": none}
    out = Augment(transforms=[RandomPlacement(size=[64, 64]), v2.RandomHorizontalFlip(p=1), HSVJitter()])(
        sample, seed=0
    )
    assert out["boxes"].shape == (0, 4)
    assert out["image"].shape == (3, 64, 64)


def test_large_images_do_not_alias(sample_of: SampleOf) -> None:
    """A checkerboard of single pixels is an even grey from afar."""
    board = np.indices((1200, 1200)).sum(axis=0) % 2 * 255
    sample: Sample = {**sample_of(), "image": image_of(np.repeat(board[..., None], 3, axis=2).astype(np.uint8))}
    out = RandomPlacement(size=[128, 128], **ERASED)(sample)
    middle = pixels_of(out["image"])[8:-8, 8:-8].astype(float)
    assert abs(middle.mean() - 127.5) < 2
    assert middle.std() < 4


@pytest.mark.parametrize(("height", "width"), [(3, 4000), (4000, 3), (1, 900)])
def test_an_image_of_a_few_lines_can_be_shrunk(sample_of: SampleOf, height: int, width: int) -> None:
    """By more than it has of them: its boxes are too thin to be kept, but it is drawn."""
    boxes = boxes_of(torch.tensor([[0.0, 0, width, height]] * 3), size=[height, width])
    sample = {**sample_of(), "image": image_of(np.zeros((height, width, 3), np.uint8)), "boxes": boxes}
    out = RandomPlacement(size=[40, 40], **ERASED)(sample)  # type: ignore[arg-type]
    assert out["image"].shape == (3, 40, 40)
    assert len(out["boxes"]) == 0


def test_colours_without_chance_stay(sample_of: SampleOf) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    out = HSVJitter(hue=0, saturation=1, value=1)({**sample_of(), "image": image_of(pixels)})
    assert np.abs(pixels_of(out["image"]).astype(int) - pixels).mean() < 2


def test_value_scales_grey_and_only_grey(sample_of: SampleOf) -> None:
    grey: Sample = {**sample_of(), "image": image_of(np.full((8, 8, 3), 60, np.uint8))}
    levels = set()
    for seed in range(50):
        out = pixels_of(Augment(transforms=[HSVJitter(hue=0.5, saturation=3, value=2)])(grey, seed=seed)["image"])
        assert len(np.unique(out)) == 1
        levels.add(int(out[0, 0, 0]))
    assert 29 <= min(levels) < 45
    assert 80 < max(levels) <= 120


def test_hue_turns_the_circle(sample_of: SampleOf) -> None:
    red: Sample = {**sample_of(), "image": image_of(np.full((1, 1, 3), (200, 0, 0), np.uint8))}
    out = [
        pixels_of(Augment(transforms=[HSVJitter(hue=0.5, saturation=1, value=1)])(red, seed=seed)["image"])
        for seed in range(60)
    ]
    hues = np.array([cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV)[0, 0] for pixels in out])
    assert hues[:, 0].min() < 20
    assert hues[:, 0].max() > 160
    assert (hues[:, 1:] == (255, 200)).all()


def test_flipped_as_torchvision_does(sample_of: SampleOf, assert_boxes_fit: AssertBoxesFit) -> None:
    """The same pixels and boxes, and by the same random number."""
    ours, theirs = Augment(transforms=[HorizontalFlip()]), Augment(transforms=[v2.RandomHorizontalFlip()])
    flipped = 0
    for seed in range(20):
        one, other = ours(sample_of(), seed=seed), theirs(sample_of(), seed=seed)
        assert torch.equal(one["image"], other["image"])
        assert torch.equal(one["boxes"], other["boxes"])
        assert_boxes_fit(one, within_px=0)
        flipped += not torch.equal(one["image"], sample_of()["image"])
    assert 4 < flipped < 16


def test_colours_left_to_the_device_are_those_drawn_here(sample_of: SampleOf) -> None:
    sample = sample_of()
    here, there = (Augment(transforms=[HSVJitter(on_device=on_device)]) for on_device in (False, True))
    for seed in range(5):
        out = there(sample, seed=seed)
        assert torch.equal(out["image"], sample["image"])
        assert "colour" not in here(sample, seed=seed)
        hue, saturation, value = out["colour"].tolist()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            drawn = torch.rand(3).tolist()
        assert hue == pytest.approx(0.2 * drawn[0] - 0.1, abs=1e-6)
        assert saturation == pytest.approx(1.5 ** (2 * drawn[1] - 1), rel=1e-5)
        assert value == pytest.approx(1.5 ** (2 * drawn[2] - 1), rel=1e-5)


@pytest.mark.parametrize("after", [HorizontalFlip(), RandomPlacement(size=[64, 64])])
def test_nothing_comes_after_colours_left_to_the_device(after: HorizontalFlip | RandomPlacement) -> None:
    Augment(transforms=[after, HSVJitter(on_device=True)])
    Augment(transforms=[HSVJitter(), after])
    with pytest.raises(ValueError, match=rf"HSVJitter with on_device=true .* last .* {type(after).__name__} after it"):
        Augment(transforms=[HSVJitter(on_device=True), after])


def test_sample_depends_on_its_seed_alone(sample_of: SampleOf) -> None:
    augment = Augment(transforms=[RandomPlacement(size=[64, 64]), v2.RandomHorizontalFlip(), HSVJitter()])
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = augment(sample_of(), seed=2**64 - 1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    again, other = augment(sample_of(), seed=2**64 - 1), augment(sample_of(), seed=1)
    assert torch.equal(first["image"], again["image"])
    assert torch.equal(first["boxes"], again["boxes"])
    assert not torch.equal(first["image"], other["image"])


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match=r"need 0 < scale\[0\] <= scale\[1\], got \[2, 1\]"):
        RandomPlacement(size=[64, 64], scale=[2, 1])
    with pytest.raises(ValueError, match=r"need aspect >= 1, got 0.5"):
        RandomPlacement(size=[64, 64], aspect=0.5)
    with pytest.raises(ValueError, match=r"need saturation >= 1 and value >= 1, got 0.5 and 1"):
        HSVJitter(saturation=0.5, value=1)
