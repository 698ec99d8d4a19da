"""Against torchvision's pyramid."""

from collections import OrderedDict

import pytest
import torch
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelP6P7

from onestage.nn.fpn import FPN

CHANNELS = (24, 40, 56)


@pytest.mark.parametrize(("coarse_from", "entering"), [("p5", 32), ("c5", 56)])
@pytest.mark.parametrize("size", [(8, 12), (4, 4), (20, 12)])
def test_levels_are_torchvisions(coarse_from: str, entering: int, size: tuple[int, int]) -> None:
    theirs = FeaturePyramidNetwork(list(CHANNELS), 32, LastLevelP6P7(entering, 32))
    ours = FPN(CHANNELS, channels=32, coarse_from=coarse_from)  # type: ignore[arg-type]
    state = {f"{name}.{key}" for name, layer in ours.torchvision_layers().items() for key in layer.state_dict()}
    assert state == set(theirs.state_dict())
    for name, layer in ours.torchvision_layers().items():
        layer.load_state_dict(theirs.get_submodule(name).state_dict())
    maps = [torch.randn(2, c, size[0] // 2**n, size[1] // 2**n) for n, c in enumerate(CHANNELS)]
    expected = theirs(OrderedDict((str(n), x) for n, x in enumerate(maps)))
    found = ours(maps)
    assert len(found) == 5
    for one, other in zip(found, expected.values(), strict=True):
        torch.testing.assert_close(one, other)


def test_coarser_levels_round_odd_sizes_up() -> None:
    levels = FPN(CHANNELS, channels=8)([torch.zeros(1, c, 20 // 2**n, 12 // 2**n) for n, c in enumerate(CHANNELS)])
    assert [tuple(level.shape[2:]) for level in levels] == [(20, 12), (10, 6), (5, 3), (3, 2), (2, 1)]


def test_width_scales_the_channels() -> None:
    assert FPN(CHANNELS, channels=256, width=0.25).channels == 64


def test_another_source_of_the_coarse_levels_is_refused() -> None:
    with pytest.raises(ValueError, match=r"detector.neck.coarse_from must be c5 or p5, got p4"):
        FPN(CHANNELS, coarse_from="p4")  # type: ignore[arg-type]
