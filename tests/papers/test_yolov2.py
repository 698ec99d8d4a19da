"""YOLO9000, arXiv:1612.08242, and the authors' yolov2.cfg, yolov2-voc.cfg and yolov2-tiny-voc.cfg."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from onestage.detectors.yolov2 import PRIOR_IMAGES

Make = Callable[..., Any]


@pytest.mark.parametrize(
    ("name", "num_floats"), [("yolov2", 50_983_561), ("yolov2_voc", 50_676_061), ("yolov2_tiny_voc", 15_867_885)]
)
def test_floats_in_the_weight_file(make_detector: Make, name: str, num_floats: int) -> None:
    """yolov2-tiny-voc.weights has 63,471,560 bytes: 20 of header, and 4 a float."""
    layers = make_detector(name).darknet_layers()
    values = {k: v for n, layer in enumerate(layers) for k, v in layer.state_dict(prefix=f"{n}.").items()}
    assert sum(value.numel() for name, value in values.items() if "num_batches" not in name) == num_floats


def test_darknet_19_has_18_convolutions_before_its_classifier(make_detector: Make) -> None:
    """Table 6: 19 with the last, 1x1 one of the classifier; 3x3 doubles the channels, 1x1 halves them."""
    found = [layer for layer in make_detector("yolov2_voc").backbone.modules() if isinstance(layer, nn.Conv2d)]
    filters = "32 64 128 64 128 256 128 256 512 256 512 256 512 1024 512 1024 512 1024"
    assert [layer.out_channels for layer in found] == [int(one) for one in filters.split()]
    assert [layer.kernel_size[0] for layer in found] == [3, 3, 3, 1, 3, 3, 1, 3, 3, 1, 3, 1, 3, 3, 1, 3, 1, 3]


def test_a_416_input_gives_a_13_by_13_map_of_five_boxes(make_detector: Make) -> None:
    """Sec. 2, "Convolutional With Anchor Boxes": 416 / 32 = 13; five priors, each with 4 + 1 + 20 values."""
    detector = make_detector("yolov2_voc", "width=0.125").eval()
    with torch.no_grad():
        (raw,) = detector.raw_maps(torch.zeros(1, 3, 416, 416))
    assert raw.shape == (1, 5 * 25, 13, 13)


@pytest.mark.parametrize("side", [320, 352, 608])
def test_any_multiple_of_32_from_320_to_608_is_taken(make_detector: Make, side: int) -> None:
    """Sec. 2, "Multi-Scale Training"."""
    detector = make_detector("yolov2_voc", "width=0.125").eval()
    with torch.no_grad():
        assert detector(torch.zeros(1, 3, side, side)).boxes.shape == (1, 5 * (side // 32) ** 2, 4)


def test_the_passthrough_turns_26_by_26_by_64_into_13_by_13_by_256(make_detector: Make) -> None:
    """Sec. 2, "Fine-Grained Features" (there of 512 channels; the cfg reduces them to 64 first), before 1,024 more."""
    neck = make_detector("yolov2_voc").neck
    assert neck.channels == (4 * 64 + 1024,)
    assert neck.reorg(torch.zeros(1, 64, 26, 26)).shape == (1, 256, 13, 13)


def test_boxes_are_drawn_to_their_priors_for_12800_images() -> None:
    assert PRIOR_IMAGES == 12_800


def test_priors_of_voc_are_in_cells_of_32_pixels(make_detector: Make) -> None:
    priors = make_detector("yolov2_voc", "width=0.125").priors
    assert priors[0].tolist() == pytest.approx([1.3221 * 32, 1.73145 * 32])
    assert priors[-1].tolist() == pytest.approx([11.2364 * 32, 10.0071 * 32])
