"""Focal loss (arXiv:1708.02002, Sec. 3)."""

import torch
from torch import Tensor
from torch.nn import functional as F


class FocalLoss:
    """Cross-entropy of logistic classes in which the well classified count little: eq. 5, of each element.

    ``alpha`` weighs the positives, ``1 - alpha`` the negatives; ``gamma`` 0 gives weighted cross-entropy.

    >>> FocalLoss(alpha=0.25, gamma=2.0)(torch.zeros(2), torch.tensor([True, False])) / torch.tensor(2.0).log()
    tensor([0.0625, 0.1875])
    """

    def __init__(self, *, alpha: float, gamma: float) -> None:
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha of a focal loss must be from 0 to 1, got {alpha}: set detector.class_loss.alpha")
        if gamma < 0:
            raise ValueError(f"gamma of a focal loss must be at least 0, got {gamma}: set detector.class_loss.gamma")
        self.alpha = alpha
        self.gamma = gamma

    def __call__(self, logits: Tensor, positive: Tensor) -> Tensor:
        """Of logits and bool targets of one shape, in that shape.

        Kept in logarithms: (1 - p)^gamma of a p that rounds to 1 has no gradient for a gamma below 1.
        """
        truth = torch.where(positive, logits, -logits)
        alpha = torch.where(positive, self.alpha, 1 - self.alpha)
        return -alpha * (self.gamma * F.logsigmoid(-truth)).exp() * F.logsigmoid(truth)
