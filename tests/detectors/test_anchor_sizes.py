"""The shapes of a detector's anchors, as its paper has them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

SMALL = "width=0.125"


def test_yolov3s_priors(make_detector: Callable[..., Any]) -> None:
    """YOLOv3 (arXiv:1804.02767), Sec. 2.3: nine clusters on COCO."""
    sizes = make_detector("yolov3", SMALL).anchor_sizes()
    assert sizes.tolist()[0] == [10, 13] and sizes.tolist()[-1] == [373, 326]
    assert len(sizes) == 9


def test_yolov4_tiny_leaves_its_smallest_prior_out(make_detector: Callable[..., Any]) -> None:
    assert len(make_detector("yolov4_tiny", SMALL).anchor_sizes()) == 5


def test_retinanet_has_nine_shapes_on_each_of_five_levels(make_detector: Callable[..., Any]) -> None:
    """Focal Loss (arXiv:1708.02002), Sec. 4: areas of 32² to 512², at ratios 1:2, 1:1, 2:1, and three octaves."""
    sizes = make_detector("retinanet_r50", SMALL).anchor_sizes()
    assert sizes.shape == (45, 2)
    areas = sizes.prod(dim=1)
    assert areas.min().item() == pytest.approx(32**2, rel=0.05)
    assert areas.max().item() == pytest.approx((512 * 2 ** (2 / 3)) ** 2, rel=0.01)


def test_ssd300_has_four_or_six_shapes_on_each_of_six_levels(make_detector: Callable[..., Any]) -> None:
    """SSD (arXiv:1512.02325), Sec. 2.2: 4, 6, 6, 6, 4 and 4 a cell; no two of them have one shape."""
    sizes = make_detector("ssd300", SMALL).anchor_sizes()
    assert sizes.shape == (30, 2)
    assert torch.all(sizes <= 300)


def test_yolov1_has_none(make_detector: Callable[..., Any]) -> None:
    assert make_detector("yolov1_tiny", SMALL).anchor_sizes() is None
