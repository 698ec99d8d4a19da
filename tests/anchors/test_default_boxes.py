from math import sqrt

import pytest
import torch
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList

from onestage.anchors.default_boxes import DefaultBoxes

SSD300 = {
    "scales": [0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05],
    "aspect_ratios": [[2], [2, 3], [2, 3], [2, 3], [2], [2]],
    "steps": [8, 16, 32, 64, 100, 300],
}
SSD512 = {
    "scales": [0.04, 0.1, 0.26, 0.42, 0.58, 0.74, 0.9, 1.06],
    "aspect_ratios": [[2], [2, 3], [2, 3], [2, 3], [2, 3], [2], [2]],
    "steps": [8, 16, 32, 64, 128, 256, 512],
}


def test_one_level_by_hand() -> None:
    """2x1 cells of an input of 100 px: sides 20 (scale 0.2), 40 (of 0.2 and 0.8), and 2 to 1 of area 400."""
    boxes = DefaultBoxes(scales=[0.2, 0.8], aspect_ratios=[[2]], steps=[50])([(2, 1)], height=100, width=100)
    long, short = 20 * sqrt(2), 20 / sqrt(2)
    sides = [(20, 20), (40, 40), (long, short), (short, long)]
    expected = [(25 - w / 2, y - h / 2, 25 + w / 2, y + h / 2) for y in (25, 75) for w, h in sides]
    torch.testing.assert_close(boxes, torch.tensor(expected))


def test_levels_come_one_after_the_other_row_by_row() -> None:
    anchors = DefaultBoxes(scales=[0.1, 0.2, 0.3], aspect_ratios=[[], [2]], steps=[10, 30])
    assert anchors.per_cell == (2, 4)
    boxes = anchors([(2, 3), (1, 1)], height=20, width=30)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    cells = [(x, y) for y in (5, 15) for x in (5, 15, 25) for _ in range(2)]
    torch.testing.assert_close(centres, torch.tensor([*cells, *[(15, 15)] * 4], dtype=torch.float32))


def test_no_side_is_longer_than_the_input() -> None:
    boxes = DefaultBoxes(scales=[0.9, 1.2], aspect_ratios=[[3]], steps=[200])([(1, 1)], height=200, width=200)
    assert (boxes[:, 2:] - boxes[:, :2]).amax().item() == 200
    assert boxes[1].tolist() == [0, 0, 200, 200]


@pytest.mark.parametrize(
    ("config", "size", "shapes"),
    [
        (SSD300, (300, 300), [(38, 38), (19, 19), (10, 10), (5, 5), (3, 3), (1, 1)]),
        (SSD512, (512, 512), [(64, 64), (32, 32), (16, 16), (8, 8), (4, 4), (2, 2), (1, 1)]),
        (SSD300, (300, 320), [(38, 40), (19, 20), (10, 10), (5, 5), (3, 3), (1, 1)]),
    ],
)
def test_equals_torchvision_to_the_bit(config: dict, size: tuple[int, int], shapes: list[tuple[int, int]]) -> None:  # type: ignore[type-arg]
    height, width = size
    (expected,) = DefaultBoxGenerator(**config)(
        ImageList(torch.empty(1, 3, height, width), [size]), [torch.empty(1, 1, *shape) for shape in shapes]
    )
    assert torch.equal(DefaultBoxes(**config)(shapes, height=height, width=width), expected)


def test_levels_that_do_not_agree_are_refused() -> None:
    with pytest.raises(ValueError, match="needs for its 2 steps as many aspect_ratios and one scale more, got 2 and 2"):
        DefaultBoxes(scales=[0.1, 0.2], aspect_ratios=[[2], [2]], steps=[8, 16])
