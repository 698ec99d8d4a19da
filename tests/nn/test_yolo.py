import pytest
import torch
from torch import nn

from onestage.errors import InputError
from onestage.nn.blocks import Reorg, SpatialPyramid
from onestage.nn.yolo import LastMap, LevelHeads, Passthrough, PathAggregation, TopDown, conv_set


def kernels(module: nn.Module) -> list[tuple[int, int]]:
    return [(layer.out_channels, layer.kernel_size[0]) for layer in module.modules() if isinstance(layer, nn.Conv2d)]


def maps_of(channels: tuple[int, ...]) -> list[torch.Tensor]:
    """Finest first, the coarsest of 2x3 cells."""
    return [torch.rand(2, c, 2 * 2**n, 3 * 2**n) for n, c in zip(reversed(range(len(channels))), channels, strict=True)]


def test_a_conv_set_alternates_1x1_and_3x3() -> None:
    assert kernels(conv_set(99, 16)) == [(16, 1), (32, 3), (16, 1), (32, 3), (16, 1)]


def test_the_neck_of_yolov3_keeps_sizes_and_has_the_channels_it_names() -> None:
    neck = TopDown((32, 64, 128), channels=[128, 256, 512], width=0.125).eval()
    assert neck.channels == (16, 32, 64)
    with torch.no_grad():
        fused = neck(maps_of((32, 64, 128)))
    assert [tuple(x.shape) for x in fused] == [(2, 16, 8, 12), (2, 32, 4, 6), (2, 64, 2, 3)]


def test_the_paths_down_of_yolov3_have_256_and_128_channels() -> None:
    neck = TopDown((256, 512, 1024), channels=[128, 256, 512])
    assert [kernels(lateral) for lateral in neck.lateral] == [[(256, 1)], [(128, 1)]]
    assert [fuse[0][0].in_channels for fuse in neck.fuse] == [1024, 256 + 512, 128 + 256]


def test_the_neck_of_yolov3_tiny_puts_the_upsampled_before_the_finer_map() -> None:
    neck = TopDown((256, 1024), channels=[128, 256], conv_sets=False).eval()
    assert neck.channels == (128 + 256, 256)
    fine, coarse = maps_of((256, 1024))
    with torch.no_grad():
        fused, reduced = neck([fine, coarse])
        lateral = neck.lateral[0](reduced)
    assert reduced.shape == (2, 256, 2, 3)
    assert lateral.shape == (2, 128, 2, 3)
    assert torch.equal(fused[:, 128:], fine)
    for row in range(2):  # each coarse value fills the four cells below it
        for column in range(2):
            assert torch.equal(fused[:, :128, row::2, column::2], lateral)


def test_heads_give_each_level_its_own_raw_values() -> None:
    head = LevelHeads((16, 32), out_channels=[21, 14], hidden=[256, 512], width=0.125)
    assert [kernels(hidden) for hidden in head.hidden] == [[(32, 3)], [(64, 3)]]
    with torch.no_grad():
        raw = head.eval()(maps_of((16, 32)))
    assert [tuple(x.shape) for x in raw] == [(2, 21, 4, 6), (2, 14, 2, 3)]
    assert min(x.min().item() for x in raw) < 0  # no activation at the end
    assert all(out.bias is not None for out in head.out)


def test_a_neck_or_head_of_another_number_of_levels_is_refused() -> None:
    for neck in (TopDown, PathAggregation):
        with pytest.raises(InputError, match=r"detector.neck.channels names 2 levels, what comes before has 3"):
            neck((32, 64, 128), channels=[128, 256])
    with pytest.raises(InputError, match=r"detector.head.hidden names 3 levels, what comes before has 2"):
        LevelHeads((16, 32), out_channels=[21, 21], hidden=[256, 512, 1024])


def test_a_spatial_pyramid_comes_after_the_third_convolution_of_the_coarsest_set() -> None:
    neck = TopDown((256, 512, 1024), channels=[128, 256, 512], spp=True)
    coarsest = neck.fuse[0]
    assert kernels(coarsest) == [(512, 1), (1024, 3), (512, 1), (512, 1), (1024, 3), (512, 1)]
    assert isinstance(coarsest[3], SpatialPyramid)
    assert coarsest[4][0].in_channels == 4 * 512
    assert not any(isinstance(layer, SpatialPyramid) for layer in neck.fuse[1:].modules())


def test_path_aggregation_keeps_sizes_and_has_the_channels_it_names() -> None:
    neck = PathAggregation((32, 64, 128), channels=[128, 256, 512], width=0.125).eval()
    assert neck.channels == (16, 32, 64)
    with torch.no_grad():
        fused = neck(maps_of((32, 64, 128)))
    assert [tuple(x.shape) for x in fused] == [(2, 16, 8, 12), (2, 32, 4, 6), (2, 64, 2, 3)]


def test_path_aggregation_brings_every_level_to_every_other() -> None:
    neck = PathAggregation((8, 8, 8), channels=[128, 256, 512], width=0.03).eval()
    maps = [level.requires_grad_() for level in maps_of((8, 8, 8))]
    for fused in neck(maps):
        for gradient in torch.autograd.grad(fused.sum(), maps, retain_graph=True):
            assert gradient.any()


def test_passthrough_puts_the_reorganised_finer_map_before_the_deepened_coarse_one() -> None:
    neck = Passthrough((64, 128), channels=1024, reduced=64, width=0.125).eval()
    assert neck.channels == (4 * 8 + 128,)
    fine, coarse = maps_of((64, 128))
    with torch.no_grad():
        (joined,) = neck([fine, coarse])
        assert torch.equal(joined[:, :32], Reorg()(neck.reduce(fine)))
        assert torch.equal(joined[:, 32:], neck.deepen(coarse))


def test_passthrough_needs_two_maps() -> None:
    with pytest.raises(InputError, match=r"Passthrough needs a backbone with two maps or more"):
        Passthrough((128,), channels=1024, reduced=64)


def test_last_map_is_the_coarsest() -> None:
    fine, coarse = maps_of((64, 128))
    neck = LastMap((64, 128))
    assert neck.channels == (128,)
    assert neck([fine, coarse]) == [coarse]
