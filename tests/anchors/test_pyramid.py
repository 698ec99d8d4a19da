"""Against torchvision's generator, and against arithmetic."""

import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from onestage.anchors.pyramid import PyramidAnchors

SIDES = [[32, 40, 50], [64, 80, 101], [128, 161, 203], [256, 322, 406], [512, 645, 812]]
RATIOS = [0.5, 1.0, 2.0]


def levels_of(height: int, width: int) -> list[tuple[int, int]]:
    """P3 to P7, each half of the one before, rounded up."""
    return [(-(-height // stride), -(-width // stride)) for stride in (8, 16, 32, 64, 128)]


@pytest.mark.parametrize("size", [(128, 160), (32, 32), (96, 320), (800, 1344)])
def test_anchors_are_torchvisions_to_the_last_bit(size: tuple[int, int]) -> None:
    levels = levels_of(*size)
    reference = AnchorGenerator(tuple(map(tuple, SIDES)), (tuple(RATIOS),) * 5)
    (expected,) = reference(ImageList(torch.zeros(1, 3, *size), [size]), [torch.zeros(1, 1, *one) for one in levels])
    found = PyramidAnchors(sides=SIDES, ratios=RATIOS)(levels, size)
    assert [len(level) for level in found] == [9 * height * width for height, width in levels]
    assert torch.equal(torch.cat(found), expected)


def test_areas_and_ratios_are_those_asked_for() -> None:
    (anchors,) = PyramidAnchors(sides=[[300, 600]], ratios=[0.25, 1.0, 4.0])([(1, 1)], (8, 8))
    sizes = anchors[:, 2:] - anchors[:, :2]
    assert sizes.tolist() == [[600, 150], [1200, 300], [300, 300], [600, 600], [150, 600], [300, 1200]]


def test_centres_are_a_stride_apart_in_the_order_of_a_flattened_map() -> None:
    (anchors,) = PyramidAnchors(sides=[[32]], ratios=[1.0])([(2, 3)], (32, 60))
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    assert centres.tolist() == [[0, 0], [20, 0], [40, 0], [0, 16], [20, 16], [40, 16]]


def test_levels_of_different_numbers_of_sides_are_refused() -> None:
    with pytest.raises(ValueError, match=r"detector.anchors.sides must have as many on each level, got \[\[8\], "):
        PyramidAnchors(sides=[[8], [9, 12]], ratios=[1.0])
