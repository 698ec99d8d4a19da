"""Each part alone, on a colour whose result can be said by hand."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from onestage.data.colour import PhotometricDistort
from onestage.data.transforms import Augment, Sample, image_of, pixels_of

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
