import pytest
import torch
from torch import nn

from onestage.nn.extraction import Extraction, ExtractionTiny


def convolutions(module: nn.Module) -> list[nn.Conv2d]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]


@pytest.mark.parametrize(
    ("backbone", "channels"),
    [
        (Extraction(width=0.125), 128),
        (Extraction(width=0.125, norm=False), 128),
        (ExtractionTiny(), 256),
        (ExtractionTiny(width=0.25), 64),
    ],
)
def test_the_map_is_of_the_stride_and_channels_it_names(backbone: Extraction | ExtractionTiny, channels: int) -> None:
    with torch.no_grad():
        found = backbone.eval()(torch.rand(1, 3, 128, 192))
    assert (backbone.channels, backbone.stride) == (channels, 64)
    assert found.shape == (1, channels, 2, 3)


def test_extraction_is_figure_3_of_the_paper() -> None:
    with torch.device("meta"):
        layers = convolutions(Extraction())
    expected = [(64, 7), (192, 3), (128, 1), (256, 3), (256, 1), (512, 3)]
    expected += 4 * [(256, 1), (512, 3)] + [(512, 1), (1024, 3)]
    expected += 2 * [(512, 1), (1024, 3)] + 4 * [(1024, 3)]
    assert [(layer.out_channels, layer.kernel_size[0]) for layer in layers] == expected
    assert [number for number, layer in enumerate(layers, start=1) if layer.stride == (2, 2)] == [1, 22]


def test_extraction_halves_the_map_where_figure_3_does() -> None:
    sides, x = [], torch.zeros(1, 3, 448, 448)
    with torch.no_grad():
        for layer in Extraction(width=0.125, norm=False):
            x = layer(x)
            sides.append(x.shape[2])
    assert sorted(set(sides), reverse=True) == [224, 112, 56, 28, 14, 7]
    assert sides.count(7) == 3  # the convolution of stride 2 and the last two


def test_tiny_has_eight_convolutions_of_3x3() -> None:
    found = [(layer.out_channels, layer.kernel_size[0], layer.stride[0]) for layer in convolutions(ExtractionTiny())]
    assert found == [(c, 3, 1) for c in (16, 32, 64, 128, 256, 512, 1024, 256)]


@pytest.mark.parametrize("norm", [True, False])
def test_norm_takes_the_place_of_the_biases(norm: bool) -> None:
    backbone = Extraction(width=0.125, norm=norm)
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in backbone.modules()) == (24 if norm else 0)
    assert all((layer.bias is None) == norm for layer in convolutions(backbone))


def test_a_signal_comes_through_24_layers_without_norm() -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        found = Extraction(width=0.25, norm=False)(torch.rand(2, 3, 128, 128))
    assert 0.05 < found.square().mean().sqrt() < 5  # of an input of 0.6; with torch's own initialisation under 1e-5


@pytest.mark.parametrize("kind", [Extraction, ExtractionTiny])
def test_width_scales_every_layer(kind: type[Extraction] | type[ExtractionTiny]) -> None:
    with torch.device("meta"):
        whole, half = convolutions(kind()), convolutions(kind(width=0.5))
    assert [2 * layer.out_channels for layer in half] == [layer.out_channels for layer in whole]
