"""YOLOv3: An Incremental Improvement, arXiv:1804.02767.

B images, K classes, A priors a cell, T truths at a level; boxes in pixels.
Where paper and code differ, structure and constants follow the authors' yolov3.cfg.
"""

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from onestage.assign.best_prior import Assigned
from onestage.boxes.formats import to_cxcywh
from onestage.detectors.base import check_shares
from onestage.detectors.grid import MIN_RATIO, GridDetector, Output, overlapping
from onestage.errors import InputError
from onestage.losses.classes import shared_targets
from onestage.types import XYXY, Target

ALEXEYAB_IOU_NORMALIZER: Final = 0.75  # parser.c's default, which yolov3.cfg leaves as it is
NO_ALPHA: Final = -1.0  # torchvision's word for a focal loss that weighs objects and background alike


class YOLOv3(GridDetector):
    """Three scales (two in yolov3-tiny), priors by shape, logistic objectness and classes.

    ``ignore_iou``: a prediction that overlaps a truth by more is no background, though another answers for the truth.
    ``focal_gamma`` above 0 makes objectness and classes focal losses, which the paper tried (Sec. 4). ``**grid`` is
    what every ``GridDetector`` takes; its ``loss`` "darknet" is AlexeyAB's form.
    """

    def __init__(self, *, ignore_iou: float, focal_gamma: float, **grid: Any) -> None:
        super().__init__(**grid)
        if focal_gamma < 0 or (focal_gamma > 0 and self.loss == "darknet"):
            raise InputError(
                f"detector.focal_gamma must be 0 or more, and 0 with detector.loss=darknet, got {focal_gamma}"
            )
        check_shares(ignore_iou=ignore_iou)
        self.ignore_iou = ignore_iou
        self.focal_gamma = focal_gamma

    def losses(self, output: Output, targets: Sequence[Target]) -> dict[str, Tensor]:
        """Sec. 2.1 and 2.2: squared error of size, cross-entropy of centre, objectness and classes, over B.

        Truths that share a prediction all draw at its box, as in AlexeyAB's code; in the authors' the last one does.
        """
        truths = self.truths(output, targets)
        boxes = to_cxcywh(XYXY(truths.boxes))
        ignored = overlapping(output, truths, above=self.ignore_iou, need_class=self.loss == "darknet")
        box, objectness, classes = [], [], []
        for number, (level, at) in enumerate(zip(output.levels, self.assign(output, truths), strict=True)):
            where = (truths.image[at.truth], at.anchor, at.row, at.column)
            box.append(self._box_loss(level[where], boxes[at.truth], at, number, output.size))
            positive = torch.zeros_like(level[..., 0])
            positive[where] = 1
            counted = (positive > 0) | ~ignored[number]
            objectness.append((self._entropy(level[..., 4], positive) * counted).sum())
            used, target = shared_targets(where, truths.labels[at.truth], num_classes=self.num_classes)
            classes.append(self._entropy(level[used][:, 5:], target).sum())
        parts = {"box": box, "objectness": objectness, "class": classes}
        return {name: torch.stack(levels).sum() / len(targets) for name, levels in parts.items()}

    def _entropy(self, logits: Tensor, target: Tensor) -> Tensor:
        if self.focal_gamma == 0:
            return F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        focal: Tensor = sigmoid_focal_loss(logits, target, alpha=NO_ALPHA, gamma=self.focal_gamma)
        return focal

    def _box_loss(self, raw: Tensor, boxes: Tensor, at: Assigned, number: int, size: tuple[int, int]) -> Tensor:
        """Of raw predictions (T, 5 + K) for truths (T, 4): small boxes count more, by 2 - w h (yolo_layer.c)."""
        offset = boxes[:, :2] / self.strides[::-1][number] - torch.stack((at.column, at.row), dim=1)
        scale = (boxes[:, 2:] / self.prior_at(number, at.anchor)).clamp(min=MIN_RATIO).log()
        centre = F.binary_cross_entropy_with_logits(raw[:, :2], offset.clamp(0, 1), reduction="none")
        extent = 0.5 * (raw[:, 2:4] - scale).square()
        weight = 2 - boxes[:, 2] * boxes[:, 3] / (size[0] * size[1])
        loss = (weight[:, None] * (centre + extent)).sum()
        return ALEXEYAB_IOU_NORMALIZER * loss if self.loss == "darknet" else loss

    def class_scores(self, logits: Tensor) -> Tensor:
        """Sec. 2.2: independent logistic classifiers."""
        return logits.sigmoid()
