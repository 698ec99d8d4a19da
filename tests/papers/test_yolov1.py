"""You Only Look Once, arXiv:1506.02640, and Darknet's yolov1.cfg and yolov1-tiny.cfg."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

Make = Callable[..., Any]


@pytest.fixture
def whole(make_detector: Make) -> Callable[[str], Any]:
    """At full size, its values never made: Darknet's has 197 million."""

    def make(name: str) -> Any:
        with torch.device("meta"):
            return make_detector(name).eval()

    return make


def num_of(detector: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(layer, kind) for layer in detector.modules())


def test_a_prediction_is_7_by_7_by_30_on_voc(whole: Callable[[str], Any]) -> None:
    """Sec. 2: S = 7, B = 2, and 20 classes."""
    detector = whole("yolov1")
    output = detector(torch.zeros(2, 3, 448, 448, device="meta"))
    assert detector.raw_maps(torch.zeros(2, 3, 448, 448, device="meta"))[0].shape == (2, 7 * 7 * 30)
    assert output.boxes.shape == (2, 49, 2, 4)
    assert output.classes.shape == (2, 49, 20)


def test_24_convolutions_and_2_connected_layers_of_4096_and_1470(whole: Callable[[str], Any]) -> None:
    """Sec. 2.1 and Fig. 3; batch norm came later."""
    detector = whole("yolov1")
    assert num_of(detector, nn.Conv2d) == 24
    connected = [layer for layer in detector.modules() if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in connected] == [(7 * 7 * 1024, 4096), (4096, 1470)]
    assert num_of(detector, nn.BatchNorm2d) == 0


def test_activations_leak_a_tenth_and_the_last_layer_has_none(whole: Callable[[str], Any]) -> None:
    """Eq. 2."""
    detector = whole("yolov1")
    leaky = [layer for layer in detector.modules() if isinstance(layer, nn.LeakyReLU)]
    assert len(leaky) == 25
    assert {layer.negative_slope for layer in leaky} == {0.1}
    assert list(detector.modules())[-1] is detector.out


def test_coefficients_and_dropout(whole: Callable[[str], Any]) -> None:
    """Sec. 2.2: lambda_coord 5, lambda_noobj .5, and a dropout of .5 after the first connected layer."""
    detector = whole("yolov1")
    assert (detector.lambda_coord, detector.lambda_noobj) == (5, 0.5)
    assert [layer.p for layer in detector.modules() if isinstance(layer, nn.Dropout)] == [0.5]
    assert isinstance(detector.hidden[-1], nn.Dropout)


@pytest.mark.parametrize(
    ("name", "num_floats", "num_values", "boxes"),
    [("yolov1_darknet", 197_328_243, 1715, 3), ("yolov1_tiny", 27_099_950, 1470, 2)],
)
def test_floats_in_the_weight_file(
    whole: Callable[[str], Any], name: str, num_floats: int, num_values: int, boxes: int
) -> None:
    """yolov1.weights has 789,312,988 bytes, tiny-yolov1.weights 108,399,816: 16 of header, and 4 a float."""
    detector = whole(name)
    values = {
        k: v for n, part in enumerate(detector.darknet_layers()) for k, v in part.state_dict(prefix=f"{n}.").items()
    }
    assert sum(value.numel() for key, value in values.items() if "num_batches" not in key) == num_floats
    assert detector.out.out_features == num_values
    assert detector.boxes_per_cell == boxes


def test_darknets_layers(whole: Callable[[str], Any]) -> None:
    """Every convolution is normalised; the local layer and the connected one are not."""
    for name, num in (("yolov1_darknet", 24), ("yolov1_tiny", 8)):
        detector = whole(name)
        assert num_of(detector, nn.Conv2d) == num_of(detector, nn.BatchNorm2d) == num
        assert num_of(detector, nn.Linear) == 1
    assert whole("yolov1_darknet").hidden[0].weight.shape == (49, 256, 1024 * 3 * 3)
