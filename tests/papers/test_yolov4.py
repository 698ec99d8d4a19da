"""YOLOv4, arXiv:2004.10934, and the authors' yolov4.cfg and yolov4-tiny.cfg."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

Make = Callable[..., Any]


@pytest.mark.parametrize(("name", "num_floats"), [("yolov4", 64_429_405), ("yolov4_tiny", 6_062_814)])
def test_floats_in_the_weight_file(make_detector: Make, name: str, num_floats: int) -> None:
    """yolov4.weights has 257,717,640 bytes: 20 of header, and 4 a float."""
    layers = make_detector(name).darknet_layers()
    values = {k: v for n, layer in enumerate(layers) for k, v in layer.state_dict(prefix=f"{n}.").items()}
    assert sum(value.numel() for name, value in values.items() if "num_batches" not in name) == num_floats


def test_cspdarknet53_has_72_convolutions_with_mish_and_the_rest_leaky_ones(make_detector: Make) -> None:
    """yolov4.cfg: 110 convolutions, 107 of them normalised, 72 in the backbone."""
    detector = make_detector("yolov4", "width=0.125")
    assert sum(isinstance(layer, nn.Conv2d) for layer in detector.backbone.modules()) == 72
    assert sum(isinstance(layer, nn.Mish) for layer in detector.modules()) == 72
    assert sum(isinstance(layer, nn.Conv2d) for layer in detector.modules()) == 110
    assert sum(isinstance(layer, nn.LeakyReLU) for layer in detector.modules()) == 107 - 72


def test_yolov4_tiny_has_21_convolutions(make_detector: Make) -> None:
    detector = make_detector("yolov4_tiny", "width=0.125")
    assert sum(isinstance(layer, nn.Conv2d) for layer in detector.modules()) == 21


def test_a_608_input_gives_22743_boxes_on_three_scales(make_detector: Make) -> None:
    """3 * (19^2 + 38^2 + 76^2)."""
    detector = make_detector("yolov4", "width=0.125").eval()
    with torch.no_grad():
        output = detector(torch.zeros(1, 3, 608, 608))
    assert output.boxes.shape == (1, 22_743, 4)
    assert [level.shape[2] for level in output.levels] == [19, 38, 76]


def test_constants_of_the_cfg(make_detector: Make) -> None:
    whole, tiny = make_detector("yolov4", "width=0.125"), make_detector("yolov4_tiny", "width=0.125")
    assert (whole.anchor_iou, whole.ignore_iou) == (0.213, 0.7)
    assert whole.centre_scale == [1.2, 1.1, 1.05]  # at strides 8, 16 and 32
    assert whole.strides == (8, 16, 32)
    assert tiny.centre_scale == [1.05, 1.05]
    assert tiny.masks == [[1, 2, 3], [3, 4, 5]]
    assert whole.nms_distance_power == tiny.nms_distance_power == 0.6
