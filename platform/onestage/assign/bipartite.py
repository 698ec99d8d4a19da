"""SSD's matching (arXiv:1512.02325, Sec. 2.2, "Matching strategy")."""

import torch
from torch import Tensor

from onestage.assign.match import NEGATIVE, by_threshold


def bipartite(overlaps: Tensor, *, positive_iou: float) -> Tensor:
    """For each of A anchors the truth that it answers for, or NEGATIVE, from IoUs (B, G, A), as (B, A) int64.

    Every truth gets the anchor that overlaps it most, however little; the other anchors match the truth that they
    overlap most, from ``positive_iou`` on. An anchor that is best for several truths goes to the last of them. A truth
    that overlaps no anchor, such as a padded or degenerate one, gets none.

    >>> bipartite(torch.tensor([[[0.9, 0.6, 0.0, 0.0], [0.1, 0.1, 0.2, 0.0]]]), positive_iou=0.5).tolist()
    [[0, 0, 1, -1]]
    """
    matched = by_threshold(overlaps, positive_iou=positive_iou, negative_iou=positive_iou)
    if overlaps.shape[1] == 0:
        return matched
    most, anchor = overlaps.max(dim=2)  # (B, G)
    truth = torch.arange(overlaps.shape[1], device=overlaps.device).expand_as(anchor)
    # The largest index, not whichever is written last: the order of writes is left open on a GPU.
    forced = torch.full_like(matched, NEGATIVE).scatter_reduce(
        1, anchor, truth.masked_fill(most <= 0, NEGATIVE), reduce="amax"
    )
    return torch.where(forced == NEGATIVE, matched, forced)
