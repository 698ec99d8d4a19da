import pytest
import torch
from torch import nn

from onestage.nn.csp import CrossStage, CSPDarknet53, CSPDarknetTiny, PartialBlock


@pytest.mark.parametrize(("backbone", "strides"), [(CSPDarknet53, (8, 16, 32)), (CSPDarknetTiny, (16, 32))])
@pytest.mark.parametrize("width", [0.125, 0.3])
def test_maps_have_the_channels_and_strides_that_it_names(
    backbone: type[nn.Module], strides: tuple[int, ...], width: float
) -> None:
    net = backbone(width=width).eval()
    assert net.strides == strides
    with torch.no_grad():
        maps = net(torch.rand(1, 3, 64, 96))
    expected = [(1, c, 64 // s, 96 // s) for c, s in zip(net.channels, strides, strict=True)]  # type: ignore[arg-type]
    assert [tuple(x.shape) for x in maps] == expected


def test_the_first_stage_keeps_all_channels_in_both_parts_and_the_others_half() -> None:
    """yolov4.cfg: 64 and 64, with a residual of 32; from the second stage on half, with a residual as wide as that."""
    first, second = CSPDarknet53().stages[:2]
    assert isinstance(first, CrossStage) and isinstance(second, CrossStage)
    assert [first.past[0].out_channels, first.enter[0].out_channels, first.residuals[0].reduce[0].out_channels] == [
        64,
        64,
        32,
    ]
    assert [second.past[0].out_channels, second.enter[0].out_channels, second.residuals[0].reduce[0].out_channels] == [
        64,
        64,
        64,
    ]
    assert second.join[0].out_channels == 128


def test_a_stage_joins_what_went_through_before_what_went_past() -> None:
    stage = CrossStage(8, 16, num_residuals=1, whole=False, activation="mish").eval()
    x = torch.rand(1, 8, 8, 8)
    with torch.no_grad():
        down = stage.down(x)
        through = stage.leave(stage.residuals(stage.enter(down)))
        assert torch.equal(stage(x), stage.join(torch.cat((through, stage.past(down)), dim=1)))


def test_the_tiny_block_works_on_the_second_half_of_its_channels() -> None:
    """yolov4-tiny.cfg: groups=2, group_id=1."""
    block = PartialBlock(16).eval()
    x = torch.rand(1, 16, 8, 8)
    with torch.no_grad():
        whole, joined = block(x)
        entered = block.enter(x)
        first = block.first(entered[:, 8:])
        assert torch.equal(joined, block.join(torch.cat((block.second(first), first), dim=1)))
        assert torch.equal(whole, torch.cat((entered, joined), dim=1))
