"""Against torchvision's ResNets."""

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter

from onestage.nn.resnet import Bottleneck, ResNet


def load(module: nn.Module, layers: dict[str, nn.Module], state: dict[str, Tensor]) -> None:
    for name, layer in layers.items():
        layer.load_state_dict({k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")})


def shaken(module: nn.Module) -> nn.Module:
    """With every number of its batch norms moved from where it is born."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for value in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
                value.add_(0.2 * torch.rand(value.shape))  # type: ignore[union-attr]
    return module


@pytest.mark.parametrize(("stride", "in_channels"), [(1, 64), (1, 32), (2, 64)])
@pytest.mark.parametrize("training", [False, True])
def test_a_bottleneck_is_torchvisions(stride: int, in_channels: int, training: bool) -> None:
    downsample = None
    if stride > 1 or in_channels != 64:
        downsample = nn.Sequential(nn.Conv2d(in_channels, 64, 1, stride, bias=False), nn.BatchNorm2d(64))
    theirs = shaken(torchvision.models.resnet.Bottleneck(in_channels, 16, stride, downsample)).train(training)
    ours = Bottleneck(in_channels, 16, stride=stride, norm_eps=1e-5).train(training)
    load(ours, ours.torchvision_layers(), theirs.state_dict())
    images = torch.randn(2, in_channels, 9, 12)
    torch.testing.assert_close(ours(images), theirs(images))


@pytest.mark.slow
@pytest.mark.parametrize("depth", [50, 101])
def test_maps_are_torchvisions(depth: int) -> None:
    theirs = shaken(getattr(torchvision.models, f"resnet{depth}")(weights=None)).eval()
    ours = ResNet(depth=depth).eval()
    load(ours, ours.torchvision_layers(), theirs.state_dict())
    body = IntermediateLayerGetter(theirs, {"layer2": "c3", "layer3": "c4", "layer4": "c5"})
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for found, expected in zip(ours(images), body(images).values(), strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("depth", [50, 101])
def test_has_all_of_torchvisions_tensors_but_the_classifiers(depth: int) -> None:
    with torch.device("meta"):
        theirs = getattr(torchvision.models, f"resnet{depth}")(weights=None)
        ours = ResNet(depth=depth)  # type: ignore[arg-type]
    expected = {name: value.shape for name, value in theirs.state_dict().items() if not name.startswith("fc.")}
    found = {
        name: value.shape
        for prefix, layer in ours.torchvision_layers().items()
        for name, value in layer.state_dict(prefix=f"{prefix}.").items()
    }
    assert found == expected
    assert len(found) == len(ours.state_dict())


@pytest.mark.parametrize(("width", "channels"), [(1.0, (512, 1024, 2048)), (0.125, (64, 128, 256))])
def test_channels_and_strides_say_what_comes_out(width: float, channels: tuple[int, ...]) -> None:
    with torch.device("meta"):
        backbone = ResNet(depth=50, width=width)
        maps = backbone(torch.zeros(1, 3, 64, 96))
    assert backbone.channels == channels
    found = [tuple(one.shape) for one in maps]
    assert found == [(1, c, 64 // s, 96 // s) for c, s in zip(channels, backbone.strides, strict=True)]


def test_norm_eps_reaches_every_batch_norm() -> None:
    norms = [m for m in ResNet(depth=50, width=0.125, norm_eps=0.0).modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 53 and all(norm.eps == 0.0 for norm in norms)


def test_an_unknown_depth_is_refused() -> None:
    with pytest.raises(ValueError, match=r"detector.backbone.depth must be one of \[50, 101\], got 34"):
        ResNet(depth=34)  # type: ignore[arg-type]
