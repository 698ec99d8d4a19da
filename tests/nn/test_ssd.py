import torch

from onestage.nn.ssd import DefaultBoxHead, ExtraLayers, ScaledL2Norm


def test_cells_have_the_length_of_the_scale_which_is_learnt_by_channel() -> None:
    norm, x = ScaledL2Norm(16, scale=20.0), torch.rand(2, 16, 3, 4)
    torch.testing.assert_close(norm(x).norm(dim=1), torch.full((2, 3, 4), 20.0))
    with torch.no_grad():
        norm.scale[3] *= 2
    torch.testing.assert_close(norm(x)[:, 3] / x[:, 3], 40 / x.norm(dim=1))
    torch.testing.assert_close(norm(x)[:, 4] / x[:, 4], 20 / x.norm(dim=1))


def test_a_cell_of_zeros_stays_zero_and_has_finite_gradients() -> None:
    norm, x = ScaledL2Norm(8, scale=20.0), torch.zeros(1, 8, 1, 1, requires_grad=True)
    norm(x).sum().backward()
    assert not norm(x).any()
    assert x.grad is not None and x.grad.isfinite().all()


def test_extra_layers_give_each_map_from_the_one_before() -> None:
    layers = [
        {"reduce": 64, "channels": 128, "kernel": 3, "stride": 2, "padding": 1},
        {"reduce": 64, "channels": 64, "kernel": 4, "stride": 1, "padding": 1},
    ]
    extra = ExtraLayers(24, layers=layers, width=0.25)
    assert extra.channels == (32, 16)
    maps = extra(torch.rand(2, 24, 4, 4))
    assert [tuple(x.shape) for x in maps] == [(2, 32, 2, 2), (2, 16, 1, 1)]
    torch.testing.assert_close(extra.layers[1](maps[0]), maps[1])
    assert min(x.min().item() for x in maps) >= 0


def test_the_head_gives_each_level_its_own_raw_values() -> None:
    head = DefaultBoxHead((8, 16), per_cell=(4, 6), num_classes=5)
    logits, deltas = head([torch.rand(2, 8, 3, 4), torch.rand(2, 16, 1, 2)])
    assert [tuple(x.shape) for x in logits] == [(2, 4 * 5, 3, 4), (2, 6 * 5, 1, 2)]
    assert [tuple(x.shape) for x in deltas] == [(2, 4 * 4, 3, 4), (2, 6 * 4, 1, 2)]
    assert min(x.min().item() for x in logits) < 0  # no activation at the end
