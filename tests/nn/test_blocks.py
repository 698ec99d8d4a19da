import pytest
import torch

from onestage.nn.blocks import ConvBlock, Reorg, Residual, SamePool, SpatialPyramid, scaled


@pytest.mark.parametrize(
    ("channels", "width", "expected"),
    [(255, 1.0, 255), (1024, 0.125, 128), (64, 0.5, 32), (32, 0.125, 8), (32, 0.01, 8), (64, 0.3, 16), (64, 2.0, 128)],
)
def test_widths_are_multiples_of_eight_and_the_papers_own_at_one(channels: int, width: float, expected: int) -> None:
    assert scaled(channels, width) == expected


@pytest.mark.parametrize(("kernel", "stride", "side"), [(1, 1, 8), (3, 1, 8), (3, 2, 4), (1, 2, 4)])
def test_a_conv_block_keeps_the_size_or_halves_it(kernel: int, stride: int, side: int) -> None:
    block = ConvBlock(3, 16, kernel=kernel, stride=stride)
    assert block(torch.rand(2, 3, 8, 8)).shape == (2, 16, side, side)


def test_a_conv_block_normalises_then_leaks_a_tenth() -> None:
    block = ConvBlock(1, 1, kernel=1).eval()
    with torch.no_grad():
        block[0].weight.fill_(2.0)
        block[1].running_mean.fill_(1.0)
        block[1].running_var.fill_(4.0)
        block[1].weight.fill_(3.0)
        block[1].bias.fill_(-0.5)
        found = block(torch.tensor([3.0, -2.0]).view(1, 1, 1, 2)).flatten()
    # (2 * 3 - 1) / 2 * 3 - 0.5 = 7; (2 * -2 - 1) / 2 * 3 - 0.5 = -8, of which a tenth
    assert found.tolist() == pytest.approx([7.0, -0.8], rel=1e-4)


def test_a_conv_block_has_darknets_batch_norm() -> None:
    block = ConvBlock(1, 1, kernel=1)
    assert block[0].bias is None
    assert block[1].eps == 1e-5
    block[1](torch.tensor([0.0, 20.0]).view(2, 1, 1, 1))
    assert block[1].running_mean.item() == pytest.approx(0.9 * 0 + 0.1 * 10)


def test_a_residual_adds_its_input() -> None:
    block = Residual(16).eval()
    with torch.no_grad():
        x = torch.randn(1, 16, 4, 4)
        assert block.reduce(x).shape == (1, 8, 4, 4)
        block.expand[1].weight.zero_()  # then expand gives its bias, 0
        assert torch.equal(block(x), x)


def test_same_pool_is_padded_at_the_right_and_the_bottom_only() -> None:
    x = torch.tensor([[9.0, 1.0, -3.0], [2.0, -5.0, -4.0]])
    assert SamePool()(x[None, None])[0, 0].tolist() == [[9, 1, -3], [2, -4, -4]]


def test_same_pool_keeps_the_size() -> None:
    assert SamePool()(torch.rand(2, 3, 13, 10)).shape == (2, 3, 13, 10)


def test_a_spatial_pyramid_is_the_widest_pool_first_and_the_map_itself_last() -> None:
    x = torch.zeros(1, 1, 15, 15)
    x[0, 0, 7, 7] = 1.0  # each pool spreads it over its own window
    sums = SpatialPyramid()(x).sum(dim=(0, 2, 3))
    assert sums.tolist() == [13 * 13, 9 * 9, 5 * 5, 1]


def plain_reorg(x: torch.Tensor) -> torch.Tensor:
    """Darknet's by its indices: out[(a * 2 + b) * c/4 + k, j, i] = in[k, 2j + a, 2i + b], in read as (c/4, 2h, 2w)."""
    channels, height, width = x.shape
    wide = x.reshape(channels // 4, 2 * height, 2 * width)
    out = torch.empty(channels, height, width)
    for a in range(2):
        for b in range(2):
            for k in range(channels // 4):
                out[(a * 2 + b) * (channels // 4) + k] = wide[k, a::2, b::2]
    return out.reshape(4 * channels, height // 2, width // 2)


@pytest.mark.parametrize("channels_last", [False, True])
def test_reorg_is_darknets(channels_last: bool) -> None:
    x = torch.rand(2, 8, 4, 6)
    given = x.to(memory_format=torch.channels_last) if channels_last else x
    assert torch.equal(Reorg()(given), torch.stack([plain_reorg(one) for one in x]))
