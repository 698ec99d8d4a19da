import pytest
import torch
from torch.nn import functional as F

from onestage.nn.local import LocallyConnected


def test_is_a_convolution_where_all_places_have_the_same_weights() -> None:
    local, x = LocallyConnected(4, 5, kernel=3, size=(6, 7)), torch.rand(2, 4, 6, 7)
    weight, bias = torch.rand(5, 4, 3, 3), torch.rand(5)
    with torch.no_grad():
        local.weight.copy_(weight.flatten(1).expand(42, -1, -1))
        local.bias.copy_(bias[:, None, None].expand(-1, 6, 7))
        torch.testing.assert_close(local(x), F.conv2d(x, weight, bias, padding=1))


def test_each_place_has_weights_of_its_own_row_by_row() -> None:
    local = LocallyConnected(1, 1, kernel=1, size=(2, 3))
    with torch.no_grad():
        local.weight.copy_(torch.arange(6.0).view(6, 1, 1))
        local.bias.copy_(torch.tensor([[10.0, 20, 30], [40, 50, 60]]))
        found = local(torch.full((1, 1, 2, 3), 2.0))
    assert found[0, 0].tolist() == [[10, 22, 34], [46, 58, 70]]


def test_a_place_sees_just_its_neighbourhood() -> None:
    local = LocallyConnected(2, 3, kernel=3, size=(5, 5))
    x = torch.zeros(1, 2, 5, 5)
    with torch.no_grad():
        x[0, 0, 0, 4] = 1
        touched = (local(x)[0] != 0).any(dim=0)
    assert touched.nonzero().tolist() == [[0, 3], [0, 4], [1, 3], [1, 4]]


def test_is_born_with_the_variance_of_he_and_without_bias() -> None:
    local = LocallyConnected(64, 32, kernel=3, size=(4, 4))
    # arXiv:1502.01852, eq. 14: (1 + a^2) n Var = 2, where n is 3 * 3 * 64 and a the leak of 0.1
    assert local.weight.std().item() == pytest.approx((2 / (1.01 * 576)) ** 0.5, rel=0.01)
    assert not local.bias.any()


def test_goes_along_into_channels_last() -> None:
    local, x = LocallyConnected(2, 3, kernel=3, size=(4, 5)), torch.rand(1, 2, 4, 5)
    with torch.no_grad():
        expected = local(x)
        torch.testing.assert_close(local.to(memory_format=torch.channels_last)(x), expected)
