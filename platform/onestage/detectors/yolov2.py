"""YOLO9000: Better, Faster, Stronger, arXiv:1612.08242: YOLOv2.

B images, K classes, A priors a cell, T truths of the batch; boxes in pixels.
Where paper and code differ, structure and constants follow the authors' yolov2.cfg and yolov2-voc.cfg.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onestage.assign.best_prior import Assigned
from onestage.boxes.formats import to_cxcywh
from onestage.boxes.iou import paired_iou
from onestage.detectors.base import Truths, check_shares
from onestage.detectors.grid import MIN_RATIO, GridDetector, Output, overlapping
from onestage.types import XYXY, Target

PRIOR_IMAGES: Final = 12_800  # region_layer.c: so long every box is drawn to its prior
PRIOR_WEIGHT: Final = 0.01


class YOLOv2(GridDetector):
    """One scale, priors by k-means, classes by softmax, objectness that learns the box's IoU.

    ``priors`` are (width, height) in cells, as in the cfg; ``**grid`` is what every ``GridDetector`` takes.
    ``object_weight`` scales the objectness of predictions that answer for a truth; ``ignore_iou``: a prediction that
    overlaps a truth by more is no background. ``loss`` is "paper": cross-entropy of centres and objectness, small boxes
    counting more, as the authors' code has it (pjreddie's region_layer.c); or "darknet": AlexeyAB's form, squared
    errors of the bounded values.
    """

    loss_parts: ClassVar = ("box", "objectness", "class", "prior")

    def __init__(
        self,
        *,
        backbone: nn.Module,
        priors: Sequence[Sequence[float]],
        ignore_iou: float,
        object_weight: float,
        **grid: Any,
    ) -> None:
        cell: int = backbone.strides[-1]  # type: ignore[index,assignment]
        in_pixels = [[cell * width, cell * height] for width, height in priors]
        super().__init__(backbone=backbone, priors=in_pixels, masks=[range(len(priors))], **grid)
        self.prior_unit_px = cell
        check_shares(ignore_iou=ignore_iou)
        self.ignore_iou = ignore_iou
        self.object_weight = object_weight

    def losses(self, output: Output, targets: Sequence[Target]) -> dict[str, Tensor]:
        """Sec. 2; of several truths that share a prediction the last counts, as in region_layer.c."""
        (level,) = output.levels  # (B, A, h, w, 5 + K)
        truths = self.truths(output, targets)
        (at,) = self.assign(output, truths)
        where = (truths.image, at.anchor, at.row, at.column)
        positive, counts = _last_of_each(level.shape[:4], where)
        boxes = to_cxcywh(XYXY(truths.boxes))
        parts = {
            "box": (self._box_loss(level[where], boxes, at, output.size) * counts).sum(),
            "objectness": self._objectness_loss(output, truths, where, positive, counts),
            "class": (F.cross_entropy(level[where][:, 5:], truths.labels, reduction="none") * counts).sum(),
            "prior": self._prior_loss(level, positive),
        }
        return {name: part / len(targets) for name, part in parts.items()}

    def _bounded(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of values that a logistic function bounds (Sec. 2, "Direct location prediction")."""
        if self.loss == "darknet":
            return 0.5 * (logits.sigmoid() - target).square()
        return F.binary_cross_entropy_with_logits(logits, target, reduction="none")

    def _box_loss(self, raw: Tensor, boxes: Tensor, at: Assigned, size: tuple[int, int]) -> Tensor:
        """Of raw predictions (T, 5 + K) for truths (T, 4), as (T,)."""
        offset = boxes[:, :2] / self.stride - torch.stack((at.column, at.row), dim=1)
        scale = (boxes[:, 2:] / self.prior_at(0, at.anchor)).clamp(min=MIN_RATIO).log()
        centre = self._bounded(raw[:, :2], offset.clamp(0, 1))
        loss = (centre + 0.5 * (raw[:, 2:4] - scale).square()).sum(dim=1)
        if self.loss == "darknet":
            return loss
        return loss * (2 - boxes[:, 2] * boxes[:, 3] / (size[0] * size[1]))

    def _objectness_loss(
        self, output: Output, truths: Truths, where: tuple[Tensor, ...], positive: Tensor, counts: Tensor
    ) -> Tensor:
        """Sec. 2, "Convolutional With Anchor Boxes": objectness predicts the IoU of truth and box."""
        (boxes,) = output.by_level(output.boxes.detach())
        reached = paired_iou(XYXY(boxes[where]), XYXY(truths.boxes))
        target = torch.zeros_like(positive).index_put(where, reached * counts, accumulate=True)
        (ignored,) = overlapping(output, truths, above=self.ignore_iou, need_class=False)
        weight = torch.where(positive > 0, self.object_weight, (~ignored).float())
        return (weight * self._bounded(output.levels[0][..., 4], target)).sum()

    def _prior_loss(self, level: Tensor, positive: Tensor) -> Tensor:
        """While young: boxes that answer for nothing are drawn to their prior at the middle of their cell."""
        centre = self._bounded(level[..., :2], torch.full_like(level[..., :2], 0.5))
        drawn = (centre + 0.5 * level[..., 2:4].square()).sum(dim=-1)
        return PRIOR_WEIGHT * (self.seen < PRIOR_IMAGES) * (drawn * (positive == 0)).sum()

    def class_scores(self, logits: Tensor) -> Tensor:
        return logits.softmax(dim=-1)


def _last_of_each(shape: torch.Size, where: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Which predictions of ``shape`` (B, A, h, w) answer for a truth, 1 or 0, and which of the T truths, (T,) 1 or 0.

    ``where`` are the truths' (image, anchor, row, column), each (T,).
    """
    image, anchor, row, column = where
    place = ((image * shape[1] + anchor) * shape[2] + row) * shape[3] + column
    number = torch.arange(len(place), device=place.device)
    last = torch.full((shape.numel(),), -1, device=place.device).scatter_reduce(0, place, number, "amax")
    return (last >= 0).float().view(shape), (last[place] == number).float()
