"""Which of the many background anchors count (SSD, arXiv:1512.02325, Sec. 2.2, "Hard negative mining")."""

import torch
from torch import Tensor


def hard_negatives(loss: Tensor, positive: Tensor, *, ratio: float) -> Tensor:
    """In each image the anchors of highest loss that are not positive, ``ratio`` for each positive, as (B, A) bool.

    ``loss`` and ``positive`` are (B, A). An image without positives gets no negatives, and no image more than it has.

    >>> loss, positive = torch.tensor([[9.0, 1.0, 3.0, 2.0]]), torch.tensor([[True, False, False, False]])
    >>> hard_negatives(loss, positive, ratio=2).tolist()
    [[False, False, True, True]]
    """
    by_loss = loss.detach().masked_fill(positive, -torch.inf).argsort(dim=1, descending=True)
    rank = by_loss.argsort(dim=1)
    return (rank < ratio * positive.sum(dim=1, keepdim=True)) & ~positive
