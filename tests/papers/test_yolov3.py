"""YOLOv3: An Incremental Improvement, arXiv:1804.02767, and the authors' yolov3.cfg and yolov3-tiny.cfg."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from onestage.nn.blocks import SpatialPyramid

Make = Callable[..., Any]


def convolutions(detector: nn.Module) -> list[nn.Conv2d]:
    return [layer for layer in detector.modules() if isinstance(layer, nn.Conv2d)]


@pytest.fixture
def narrow(make_detector: Make) -> Callable[[str], Any]:
    """At an eighth of its width, which none of the numbers here depends on."""
    return lambda name: make_detector(name, "width=0.125").eval()


@pytest.mark.parametrize(
    ("name", "num_predictions", "strides"), [("yolov3", 10_647, (8, 16, 32)), ("yolov3_tiny", 2_535, (16, 32))]
)
def test_predictions_at_416(narrow: Callable[[str], Any], name: str, num_predictions: int, strides: tuple[int]) -> None:
    detector = narrow(name)
    with torch.no_grad():
        output = detector(torch.zeros(1, 3, 416, 416))
    assert output.boxes.shape == (1, num_predictions, 4)
    assert tuple(416 // level.shape[2] for level in reversed(output.levels)) == strides == detector.strides


def test_three_boxes_at_each_scale_of_n_times_n_times_255(narrow: Callable[[str], Any]) -> None:
    """Sec. 2.3: N x N x [3 * (4 + 1 + 80)] for the 80 classes of COCO."""
    with torch.no_grad():
        maps = narrow("yolov3").raw_maps(torch.zeros(1, 3, 416, 416))
    assert [tuple(raw.shape) for raw in maps] == [(1, 255, 13, 13), (1, 255, 26, 26), (1, 255, 52, 52)]


@pytest.mark.parametrize(
    ("name", "num_floats"), [("yolov3", 62_001_757), ("yolov3_spp", 63_052_381), ("yolov3_tiny", 8_858_734)]
)
def test_floats_in_the_weight_file(make_detector: Make, name: str, num_floats: int) -> None:
    """yolov3.weights has 248,007,048 bytes, yolov3-tiny.weights 35,434,956: 20 of header, and 4 a float."""
    layers = make_detector(name).darknet_layers()
    values = {k: v for n, layer in enumerate(layers) for k, v in layer.state_dict(prefix=f"{n}.").items()}
    assert sum(value.numel() for name, value in values.items() if "num_batches" not in name) == num_floats


def test_yolov3_has_75_convolutions_72_of_them_normalised(narrow: Callable[[str], Any]) -> None:
    detector = narrow("yolov3")
    assert len(convolutions(detector)) == 75
    assert len(convolutions(detector.backbone)) == 52
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in detector.modules()) == 72


def test_yolov3_spp_pools_the_coarsest_map_by_13_9_and_5_beside_itself(narrow: Callable[[str], Any]) -> None:
    """yolov3-spp.cfg: one more 1x1, 76 convolutions, and a 1x1 that takes four times the channels."""
    detector = narrow("yolov3_spp")
    pyramids = [layer for layer in detector.modules() if isinstance(layer, SpatialPyramid)]
    assert [layer.windows for layer in pyramids] == [(13, 9, 5)]
    assert len(convolutions(detector)) == 76


def test_yolov3_tiny_has_13_convolutions(narrow: Callable[[str], Any]) -> None:
    assert len(convolutions(narrow("yolov3_tiny"))) == 13


def test_the_nine_priors_of_coco(narrow: Callable[[str], Any]) -> None:
    """Sec. 2.3, "On the COCO dataset the 9 clusters were": three a scale, the smallest on the finest."""
    detector = narrow("yolov3")
    found = [tuple(detector.priors[number].tolist()) for mask in detector.masks for number in mask]
    assert found == [(10, 13), (16, 30), (33, 23), (30, 61), (62, 45), (59, 119), (116, 90), (156, 198), (373, 326)]
