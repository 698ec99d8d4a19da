"""RetinaNet's assignment: every anchor to the truth that it overlaps most (arXiv:1708.02002, Sec. 4, "Anchors")."""

from typing import Final

import torch
from torch import Tensor

from onestage.assign.match import by_threshold
from onestage.boxes.iou import pairwise_iou
from onestage.types import XYXY

MAX_OVERLAPS: Final = 2**26  # IoUs held at a time, 256 MiB: a batch of 16 crowded images would take many GiB


class MaxIoUAssigner:
    """From ``positive_iou`` on an anchor is its best truth's, below ``negative_iou`` background, between them ignored.

    With ``claim_best`` every truth also claims the anchors that overlap it most, all that tie, however little that is;
    each of these keeps its own best truth, as in torchvision. The paper claims none.
    """

    def __init__(self, *, positive_iou: float, negative_iou: float, claim_best: bool) -> None:
        if negative_iou > positive_iou:
            raise ValueError(
                f"need detector.assigner.negative_iou <= positive_iou, got {negative_iou} > {positive_iou}"
            )
        self.positive_iou = positive_iou
        self.negative_iou = negative_iou
        self.claim_best = claim_best

    @torch.no_grad()
    def __call__(self, anchors: XYXY, boxes: XYXY) -> Tensor:
        """For anchors (A, 4) and each image's truths (B, G, 4), padded with zeros: which truth, as (B, A) int64.

        An index from 0 to G - 1, or a sentinel of ``onestage.assign.match``. Boxes without area match nothing.
        """
        num_images = max(1, MAX_OVERLAPS // max(1, boxes.shape[1] * len(anchors)))
        return torch.cat([self._match(anchors, XYXY(some)) for some in boxes.split(num_images)])

    def _match(self, anchors: XYXY, boxes: XYXY) -> Tensor:
        overlaps = pairwise_iou(boxes, anchors)  # (B, G, A)
        matched = by_threshold(overlaps, positive_iou=self.positive_iou, negative_iou=self.negative_iou)
        if not self.claim_best or boxes.shape[1] == 0:
            return matched
        most = overlaps.amax(dim=2, keepdim=True)
        claimed = ((overlaps == most) & (most > 0)).any(dim=1)
        return torch.where(claimed, overlaps.argmax(dim=1), matched)
