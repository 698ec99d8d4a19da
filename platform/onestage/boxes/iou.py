"""Intersection over union."""

from typing import Final

import torch
from torch import Tensor

from onestage.types import XYXY

MAX_PAIRS: Final = 2**26
"""Pairs that are compared at a time, 256 MiB of IoUs: one crowded image makes a whole batch's truths many."""


def pairwise_iou(a: XYXY, b: XYXY) -> Tensor:
    """IoU of every a (..., N, 4) with every b (..., M, 4), as (..., N, M). Degenerate boxes give 0, never NaN.

    >>> left, whole = torch.tensor([[0.0, 0, 1, 2]]), torch.tensor([[0.0, 0, 2, 2]])
    >>> pairwise_iou(XYXY(left), XYXY(whole)).tolist()
    [[0.5]]
    """
    return paired_iou(XYXY(a[..., :, None, :]), XYXY(b[..., None, :, :]))


def paired_iou(a: XYXY, b: XYXY) -> Tensor:
    """IoU of each a (..., 4) with the b (..., 4) beside it, as (...). Degenerate boxes give 0, never NaN."""
    # One axis at a time: of every anchor with every truth of a batch, both at once would be gigabytes.
    across, down = (
        (torch.minimum(a[..., axis + 2], b[..., axis + 2]) - torch.maximum(a[..., axis], b[..., axis])).clamp(min=0)
        for axis in (0, 1)
    )
    intersection = across * down
    union = area(a) + area(b) - intersection
    return intersection / union.clamp(min=torch.finfo(intersection.dtype).tiny)


def highest_iou(a: XYXY, b: XYXY) -> Tensor:
    """Of every a (B, N, 4) the highest IoU with any b (B, M, 4) of its image, as (B, N). M is at least 1."""
    num_images = max(1, MAX_PAIRS // (a.shape[1] * b.shape[1]))
    parts = zip(a.split(num_images), b.split(num_images), strict=True)
    return torch.cat([pairwise_iou(XYXY(one), XYXY(other)).amax(dim=2) for one, other in parts])


def shape_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of every size a (N, 2) with every size b (M, 2) as if they shared a centre, as (N, M). Width, then height.

    >>> shape_iou(torch.tensor([[2.0, 2.0]]), torch.tensor([[2.0, 1.0], [4.0, 4.0]])).tolist()
    [[0.5, 0.25]]
    """
    intersection = torch.minimum(a[:, None], b[None]).prod(dim=-1)
    union = a.prod(dim=-1)[:, None] + b.prod(dim=-1)[None] - intersection
    return intersection / union.clamp(min=torch.finfo(intersection.dtype).tiny)


def area(boxes: XYXY) -> Tensor:
    """Area of boxes (..., 4), as (...). A box whose corners are swapped has none."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(dim=-1)
