"""YOLOv4: Optimal Speed and Accuracy of Object Detection, arXiv:2004.10934.

B images, K classes, A priors a cell, T truths at a level; boxes in pixels.
Where paper and code differ, structure and constants follow the authors' yolov4.cfg (AlexeyAB's Darknet).
"""

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import complete_box_iou_loss

from onestage.detectors.base import check_shares
from onestage.detectors.grid import GridDetector, Output, overlapping
from onestage.errors import InputError
from onestage.losses.classes import shared_targets
from onestage.types import XYXY, Target

DARKNET_IOU_NORMALIZER: Final = 0.07
MIN_SIDE_PX: Final = 1e-2  # CIoU compares aspects, which a box without a side has not


class YOLOv4(GridDetector):
    """Three scales (two in yolov4-tiny), several priors a truth, CIoU boxes, logistic objectness and classes.

    Besides the best prior, all whose IoU by shape is above ``anchor_iou`` answer for a truth. ``ignore_iou``: a
    prediction that overlaps a truth by more, with some class to show, is no background. ``box_weight`` scales 1 - CIoU.
    ``label_smoothing`` e moves the classes' targets to 1 - e / 2 and e / 2. ``**grid`` is what every ``GridDetector``
    takes; its ``loss`` "darknet" is AlexeyAB's form in objectness and classes. His box delta is no gradient of CIoU, or
    of anything: with "darknet" the boxes have CIoU's, times his normaliser, under which they hardly learn.
    """

    def __init__(
        self,
        *,
        anchor_iou: float,
        ignore_iou: float,
        box_weight: float,
        label_smoothing: float,
        **grid: Any,
    ) -> None:
        super().__init__(**grid)
        check_shares(anchor_iou=anchor_iou, ignore_iou=ignore_iou, label_smoothing=label_smoothing)
        if box_weight <= 0:
            raise InputError(f"detector.box_weight must be above 0, got {box_weight}")
        self.anchor_iou = anchor_iou
        self.ignore_iou = ignore_iou
        self.box_weight = box_weight
        self.label_smoothing = label_smoothing

    def losses(self, output: Output, targets: Sequence[Target]) -> dict[str, Tensor]:
        """Sec. 3.4 "CIoU-loss", "using multiple anchors for a single ground truth"; sums over the predictions, by B."""
        truths = self.truths(output, targets)
        ignored = overlapping(output, truths, above=self.ignore_iou, need_class=True)
        box, objectness, classes = [], [], []
        levels = zip(
            output.levels,
            output.by_level(output.boxes),
            self.assign(output, truths, also_above=self.anchor_iou),
            ignored,
            strict=True,
        )
        for level, boxes, at, near in levels:
            where = (truths.image[at.truth], at.anchor, at.row, at.column)
            box.append(self._box_loss(XYXY(boxes[where]), XYXY(truths.boxes[at.truth])))
            positive = torch.zeros_like(level[..., 0])
            positive[where] = 1
            entropy = F.binary_cross_entropy_with_logits(level[..., 4], positive, reduction="none")
            objectness.append((entropy * ((positive > 0) | ~near)).sum())
            used, target = shared_targets(where, truths.labels[at.truth], num_classes=self.num_classes)
            smooth = target * (1 - self.label_smoothing) + self.label_smoothing / 2
            classes.append(F.binary_cross_entropy_with_logits(level[used][:, 5:], smooth, reduction="sum"))
        parts = {"box": box, "objectness": objectness, "class": classes}
        return {name: torch.stack(levels).sum() / len(targets) for name, levels in parts.items()}

    def _box_loss(self, boxes: XYXY, truths: XYXY) -> Tensor:
        """1 - CIoU (arXiv:1911.08287, eq. 10) of predictions (T, 4) for truths (T, 4)."""
        loss: Tensor = complete_box_iou_loss(_solid(boxes), _solid(truths), reduction="sum")
        return loss * (DARKNET_IOU_NORMALIZER if self.loss == "darknet" else self.box_weight)

    def class_scores(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()


def _solid(boxes: XYXY) -> Tensor:
    """Boxes (T, 4) with sides of ``MIN_SIDE_PX`` at least."""
    return torch.cat((boxes[:, :2], torch.maximum(boxes[:, 2:], boxes[:, :2] + MIN_SIDE_PX)), dim=1)
