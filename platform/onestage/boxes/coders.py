"""Boxes as offsets from anchors, and back (Faster R-CNN, arXiv:1506.01497, eq. 2)."""

import math
from collections.abc import Sequence

import torch

from onestage.boxes.formats import to_cxcywh, to_xyxy
from onestage.types import CXCYWH, XYXY, Deltas


class BoxCoder:
    """Centres as shifts in units of the anchor's size, sizes as logarithms of ratios, each times its weight.

    ``weights`` are for x, y, width and height: SSD divides by "variances" 0.1 and 0.2, which is 10 and 5 here. A size's
    logarithm is cut at ``max_log_ratio`` when decoding, so that a young network's boxes stay finite.

    >>> coder, anchor = BoxCoder(), XYXY(torch.tensor([[0.0, 0, 10, 10]]))
    >>> coder.encode(anchor, XYXY(torch.tensor([[5.0, 0, 15, 10]]))).tolist()
    [[0.5, 0.0, 0.0, 0.0]]
    """

    def __init__(
        self, *, weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0), max_log_ratio: float = math.log(1000 / 16)
    ) -> None:
        self.weights = tuple(weights)
        self.max_log_ratio = max_log_ratio

    def encode(self, anchors: XYXY, boxes: XYXY) -> Deltas:
        """Boxes (..., 4) relative to the anchors (..., 4) beside them."""
        anchor, box = to_cxcywh(anchors), to_cxcywh(boxes)
        shift = (box[..., :2] - anchor[..., :2]) / anchor[..., 2:]
        ratio = (box[..., 2:] / anchor[..., 2:]).log()
        return Deltas(torch.cat((shift, ratio), dim=-1) * anchors.new_tensor(self.weights))

    def decode(self, anchors: XYXY, deltas: Deltas) -> XYXY:
        """The boxes (..., 4) that ``deltas`` tell of; the inverse of ``encode``."""
        anchor, scaled = to_cxcywh(anchors), deltas / deltas.new_tensor(self.weights)
        centre = anchor[..., :2] + scaled[..., :2] * anchor[..., 2:]
        size = anchor[..., 2:] * scaled[..., 2:].clamp(max=self.max_log_ratio).exp()
        return to_xyxy(CXCYWH(torch.cat((centre, size), dim=-1)))
