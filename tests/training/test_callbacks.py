"""Averaged weights and progress, with values by hand."""

import torch

from onestage.training.callbacks import Ema


def test_the_decay_grows_from_a_tenth_to_its_value() -> None:
    ema = Ema(decay=0.5)
    weights = [torch.tensor([0.0])]
    ema._update(weights, [torch.tensor([1.0])], torch.tensor(0))  # decay 1/10
    assert torch.allclose(weights[0], torch.tensor([0.9]))
    ema._update(weights, [torch.tensor([0.0])], torch.tensor(1000))  # decay 0.5
    assert torch.allclose(weights[0], torch.tensor([0.45]))


def test_counters_are_copied_not_averaged() -> None:
    seen = [torch.tensor(10)]
    Ema(decay=0.9)._update(seen, [torch.tensor(7)], torch.tensor(3))
    assert seen[0].item() == 7
