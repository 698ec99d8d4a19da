import json
from pathlib import Path

import pytest
import torch
from torch import nn

from onestage.nn.darknet import Darknet53, DarknetTiny


def convolutions(module: nn.Module) -> list[nn.Conv2d]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]


@pytest.mark.parametrize(
    ("backbone", "strides", "channels"),
    [
        (Darknet53(width=0.125), (8, 16, 32), (32, 64, 128)),
        (DarknetTiny(), (16, 32), (256, 1024)),
        (DarknetTiny(width=0.25), (16, 32), (64, 256)),
    ],
)
def test_maps_are_of_the_strides_and_channels_it_names_finest_first(
    backbone: Darknet53 | DarknetTiny, strides: tuple[int, ...], channels: tuple[int, ...]
) -> None:
    with torch.no_grad():
        maps = backbone.eval()(torch.rand(1, 3, 64, 96))
    assert backbone.strides == strides
    assert backbone.channels == channels
    assert [tuple(x.shape) for x in maps] == [
        (1, c, 64 // stride, 96 // stride) for c, stride in zip(channels, strides, strict=True)
    ]


def test_darknet53_is_table_1_of_the_paper() -> None:
    backbone = Darknet53()
    found = convolutions(backbone)
    assert len(found) == 52  # the 53rd layer is the classifier
    assert [layer.out_channels for layer in found if layer.stride == (2, 2)] == [64, 128, 256, 512, 1024]
    assert backbone.channels == (256, 512, 1024)
    # darknet53.conv.74, the authors' file of this backbone, has 162,482,580 bytes, 20 of them header.
    floats = sum(value.numel() for name, value in backbone.state_dict().items() if "num_batches" not in name)
    assert 4 * floats + 20 == 162_482_580


def test_darknet_tiny_has_the_convolutions_of_the_cfg(shared: Path) -> None:
    layers = json.loads((shared / "refs" / "layers" / "yolov3-tiny.json").read_text())["layers"]
    expected = [(layer["n"], layer["k"], layer["s"]) for layer in layers if layer["t"] == "conv"][:7]
    found = convolutions(DarknetTiny())
    assert [(layer.out_channels, layer.kernel_size[0], layer.stride[0]) for layer in found] == expected


@pytest.mark.parametrize("kind", [Darknet53, DarknetTiny])
def test_width_scales_every_layer(kind: type[Darknet53] | type[DarknetTiny]) -> None:
    whole, half = convolutions(kind()), convolutions(kind(width=0.5))
    assert [2 * layer.out_channels for layer in half] == [layer.out_channels for layer in whole]
