"""What every matching of anchors with truths says: the index of a truth, or one of two sentinels."""

from typing import Final

import torch
from torch import Tensor

NEGATIVE: Final = -1
"""The anchor is background."""
IGNORED: Final = -2
"""The anchor counts neither as an object nor as background."""


def by_threshold(overlaps: Tensor, *, positive_iou: float, negative_iou: float) -> Tensor:
    """For each of A anchors the truth that it overlaps most, from IoUs (..., G, A), as (..., A) int64.

    From ``positive_iou`` on that is a match, below ``negative_iou`` the anchor is NEGATIVE, between the two IGNORED.
    Without truths (G = 0) every anchor is NEGATIVE. A padded truth overlaps nothing, so it matches nothing.

    >>> by_threshold(torch.tensor([[0.9, 0.45, 0.1]]), positive_iou=0.5, negative_iou=0.4).tolist()
    [0, -2, -1]
    """
    if negative_iou > positive_iou:
        raise ValueError(f"need negative_iou <= positive_iou, got {negative_iou} > {positive_iou}")
    if overlaps.shape[-2] == 0:
        return torch.full_like(overlaps.sum(dim=-2), NEGATIVE, dtype=torch.int64)
    best, truth = overlaps.max(dim=-2)
    truth = truth.masked_fill(best < positive_iou, IGNORED)
    return truth.masked_fill(best < negative_iou, NEGATIVE)
