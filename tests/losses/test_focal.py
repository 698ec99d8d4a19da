"""Against torchvision's function, and against the figures of arXiv:1708.02002."""

import pytest
import torch
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from onestage.losses.focal import FocalLoss


def logit(probability: float) -> Tensor:
    return torch.tensor([probability], dtype=torch.float64).logit()


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.9, 1.0])
def test_loss_and_gradient_are_torchvisions(alpha: float, gamma: float) -> None:
    ours = (6 * torch.randn(4, 50)).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    positive = torch.rand(4, 50) < 0.3
    found = FocalLoss(alpha=alpha, gamma=gamma)(ours, positive)
    expected = sigmoid_focal_loss(theirs, positive.float(), alpha=alpha, gamma=gamma)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    found.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("probability", "times"), [(0.9, 100), (0.968, 1000)])
def test_the_well_classified_count_little(probability: float, times: float) -> None:
    """Sec. 3.2: with gamma 2 at 0.9 a hundredth, at about 0.968 a thousandth of cross-entropy."""
    entropy = FocalLoss(alpha=0.5, gamma=0.0)(logit(probability), torch.tensor([True]))
    focal = FocalLoss(alpha=0.5, gamma=2.0)(logit(probability), torch.tensor([True]))
    assert float(entropy / focal) == pytest.approx(times, rel=0.03)


def test_positives_and_negatives_are_each_others_mirror() -> None:
    logits = torch.randn(20)
    positives = FocalLoss(alpha=0.5, gamma=2.0)(logits, torch.ones(20, dtype=torch.bool))
    negatives = FocalLoss(alpha=0.5, gamma=2.0)(-logits, torch.zeros(20, dtype=torch.bool))
    torch.testing.assert_close(positives, negatives)


@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.5, 2.0])
@pytest.mark.parametrize("value", [-1e4, -100.0, -30.0, 30.0, 100.0, 1e4])
def test_extreme_logits_have_finite_losses_and_gradients(gamma: float, value: float) -> None:
    """torchvision's gradient is NaN at 30 with gamma 0.5, one of those that the paper tries (Table 1b)."""
    logits = torch.tensor([value, value], requires_grad=True)
    loss = FocalLoss(alpha=0.25, gamma=gamma)(logits, torch.tensor([True, False]))
    loss.sum().backward()
    assert logits.grad is not None
    assert loss.isfinite().all() and logits.grad.isfinite().all()
    wrong = int(value > 0)  # the element whose target is the other: near the line -value
    assert float(loss[wrong].detach()) == pytest.approx([0.25, 0.75][wrong] * abs(value), rel=1e-4)


@pytest.mark.parametrize(
    ("alpha", "gamma", "message"),
    [
        (1.5, 2.0, "alpha of a focal loss must be from 0 to 1, got 1.5: set detector.class_loss.alpha"),
        (0.25, -1.0, "gamma of a focal loss must be at least 0, got -1.0: set detector.class_loss.gamma"),
    ],
)
def test_wrong_constants_are_refused(alpha: float, gamma: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FocalLoss(alpha=alpha, gamma=gamma)
