"""Each part alone, on a colour whose result can be said by hand."""

import colorsys
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from onestage.data.colour import PhotometricDistort, recoloured_batch
from onestage.data.transforms import Augment, Sample, image_of, pixels_of, recoloured

SampleOf = Callable[..., Sample]
NEUTRAL: dict[str, Any] = {"brightness": 0, "contrast": [1, 1], "saturation": [1, 1], "hue": 0, "p": 1}


def colours(sample_of: SampleOf, colour: tuple[int, int, int], **settings: Any) -> np.ndarray:
    """What becomes of ``colour`` over 80 seeds, (80, 3)."""
    sample: Sample = {**sample_of(), "image": image_of(np.full((2, 2, 3), colour, np.uint8))}
    augment = Augment(transforms=[PhotometricDistort(**(NEUTRAL | settings))])
    return np.array([pixels_of(augment(sample, seed=seed)["image"])[0, 0] for seed in range(80)]).astype(int)


@pytest.mark.parametrize("settings", [{"brightness": 0.2, "contrast": [0.5, 2], "hue": 0.5, "p": 0}, {}])
def test_colours_without_chance_stay(sample_of: SampleOf, settings: dict[str, Any]) -> None:
    assert (colours(sample_of, (200, 120, 60), **settings) == (200, 120, 60)).all()


@pytest.mark.parametrize(
    ("settings", "low", "high"),
    [
        ({"brightness": 0.125}, 100 - 32, 100 + 32),
        ({"contrast": [0.5, 1.5]}, 50, 150),
        ({"saturation": [0.1, 3], "hue": 0.5}, 100, 100),  # grey has neither
        ({"brightness": 0.9}, 0, 255),
    ],
)
def test_grey_stays_grey_between_its_bounds(sample_of: SampleOf, settings: dict[str, Any], low: int, high: int) -> None:
    found = colours(sample_of, (100, 100, 100), **settings)
    assert (found == found[:, :1]).all()
    assert low <= found.min() <= low + 0.1 * (high - low)
    assert high - 0.1 * (high - low) <= found.max() <= high


def test_saturation_keeps_the_brightest_channel(sample_of: SampleOf) -> None:
    """(200, 100, 100) has a saturation of 0.5: with 0.5 to 1.5 times that, the others run from 50 to 150."""
    found = colours(sample_of, (200, 100, 100), saturation=[0.5, 1.5])
    assert (found[:, 0] == 200).all()
    assert 48 <= found[:, 1:].min() < 60
    assert 140 < found[:, 1:].max() <= 152


def test_hue_turns_by_its_share_at_most(sample_of: SampleOf) -> None:
    """A twentieth of the circle is 18 degrees, of the 60 between red and yellow: green up to 0.3 of red."""
    found = colours(sample_of, (200, 0, 0), hue=0.05)
    assert (found[:, 0] == 200).all()
    assert 50 <= found[:, 1].max() <= 62
    assert 50 <= found[:, 2].max() <= 62


def test_each_part_has_its_own_chance(sample_of: SampleOf) -> None:
    found = colours(sample_of, (100, 100, 100), brightness=0.1, p=0.5)
    assert 25 < (found[:, 0] == 100).sum() < 55


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match=r"need 0 < contrast\[0\] <= contrast\[1\], got \[2, 1\]"):
        PhotometricDistort(contrast=[2, 1])


FACTORS = [(0.0, 1.0, 1.0), (0.1, 1.0, 1.0), (-0.1, 1.5, 0.7), (0.45, 0.4, 1.5), (-0.5, 3.0, 2.0), (1 / 3, 0.0, 1.0)]


def changed(colour: tuple[float, ...], hue: float, saturation: float, value: float) -> tuple[float, ...]:
    """One colour of 0 to 1, by the standard library."""
    h, s, v = colorsys.rgb_to_hsv(*colour)
    return colorsys.hsv_to_rgb((h + hue) % 1, min(1, s * saturation), min(1, v * value))


def noise() -> np.ndarray:
    """Pictures (6, 20, 30, 3): smooth colours, with black, white, grey and pure ones among them."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 20, 30, 3), dtype=np.uint8)
    pixels[:, 0, :6] = [(0, 0, 0), (255, 255, 255), (128, 128, 128), (255, 0, 0), (0, 255, 0), (255, 0, 255)]
    return pixels


def test_a_batch_is_recoloured_as_the_standard_library_does() -> None:
    pixels = noise()[:, :4]
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    expected = np.array([
        [[changed(tuple(pixel / 255), *by) for pixel in row] for row in image]
        for image, by in zip(pixels, FACTORS, strict=True)
    ])  # fmt: skip
    floats = recoloured_batch(images.float() / 255, torch.tensor(FACTORS)).permute(0, 2, 3, 1).numpy()
    assert np.abs(floats - expected).max() < 1e-5
    levels = recoloured_batch(images, torch.tensor(FACTORS)).permute(0, 2, 3, 1).numpy()
    assert levels.dtype == np.uint8
    assert np.abs(levels - 255 * expected).max() <= 0.51


def test_a_batch_is_recoloured_as_in_the_loader() -> None:
    """Up to the rounding of 8-bit hue, saturation and value, which at most turns hue by a level of 256."""
    pixels = noise()
    batch = recoloured_batch(torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.tensor(FACTORS))
    for image, one, (hue, saturation, value) in zip(pixels, batch, FACTORS, strict=True):
        here = recoloured(image, hue=hue, saturation=saturation, value=value)  # type: ignore[arg-type]
        apart = np.abs(one.permute(1, 2, 0).numpy().astype(int) - here)
        assert apart.mean() < 1.2
        assert apart.max() <= 12


def test_neutral_factors_leave_a_batch_bitwise_as_it_is() -> None:
    images = torch.from_numpy(noise()).permute(0, 3, 1, 2)
    assert torch.equal(recoloured_batch(images, torch.tensor([[0.0, 1, 1]] * 6)), images)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_a_batch_keeps_its_type_and_place(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    images = torch.from_numpy(noise()).permute(0, 3, 1, 2).to(dtype).contiguous(memory_format=memory_format)
    if dtype.is_floating_point:
        images = images / 255
    before = images.clone()
    found = recoloured_batch(images, torch.tensor(FACTORS))
    assert found.dtype == dtype
    assert found.stride() == images.stride()
    assert torch.equal(images, before)
    assert recoloured_batch(images[:0], torch.zeros(0, 3)).shape == (0, 3, 20, 30)


def test_opencv_agrees_on_what_was_turned() -> None:
    """A hue turned by a third is 60 of OpenCV's 180 further."""
    pixels = np.full((1, 4, 4, 3), (200, 120, 40), np.uint8)
    found = recoloured_batch(torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.tensor([[1 / 3, 1.0, 1.0]]))
    hues = [
        cv2.cvtColor(one, cv2.COLOR_RGB2HSV)[..., 0].astype(int)
        for one in (pixels[0], found[0].permute(1, 2, 0).numpy())
    ]
    assert (np.abs(hues[1] - hues[0] - 60) <= 1).all()
