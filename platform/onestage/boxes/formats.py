"""From one box format to another; a format is a type, minted here."""

import torch
from torch import Tensor

from onestage.types import CXCYWH, XYXY


def to_cxcywh(boxes: XYXY) -> CXCYWH:
    """Boxes (..., 4) by their corners as boxes by their centre and size.

    >>> to_cxcywh(XYXY(torch.tensor([2.0, 4.0, 6.0, 10.0]))).tolist()
    [4.0, 7.0, 4.0, 6.0]
    """
    low, high = boxes[..., :2], boxes[..., 2:]
    return CXCYWH(torch.cat(((low + high) / 2, high - low), dim=-1))


def to_xyxy(boxes: CXCYWH) -> XYXY:
    """Boxes (..., 4) by their centre and size as boxes by their corners: the inverse of ``to_cxcywh``."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return XYXY(torch.cat((centre - half, centre + half), dim=-1))


def clip(boxes: XYXY, *, height: float, width: float) -> XYXY:
    """Boxes (..., 4) cut to an image of the given size."""
    limit: Tensor = boxes.new_tensor([width, height, width, height])
    return XYXY(torch.minimum(boxes.clamp(min=0), limit))
