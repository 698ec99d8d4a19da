"""Non-maximum suppression, class by class."""

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from onestage.types import XYXY, Detections

MAX_CANDIDATES = 4096  # of one image, by score: bounds the quadratic cost while a young detector fires everywhere
FAR_PX = 1e6  # beyond this, from far outside an image, a box's edge makes no difference


def suppress(boxes: XYXY, scores: Tensor, *, score_threshold: float, nms_iou: float, max_detections: int) -> Detections:
    """Detections of one image from boxes (A, 4) and class scores (A, K).

    Every class whose score at a box is above ``score_threshold`` counts there; of two boxes of one class that overlap
    by more than ``nms_iou`` the lower scored goes; the ``max_detections`` best are returned, score falling.
    """
    anchors, labels = (scores > score_threshold).nonzero(as_tuple=True)
    values = scores[anchors, labels]
    if len(values) > MAX_CANDIDATES:
        values, best = values.topk(MAX_CANDIDATES)
        anchors, labels = anchors[best], labels[best]
    candidates = boxes[anchors]
    # batched_nms moves the classes apart by the largest coordinate: in float32 one enormous box would blur all others,
    # and it takes coordinates to be positive.
    moved = candidates.double().clamp(-FAR_PX, FAR_PX) + FAR_PX
    kept = batched_nms(moved, values.double(), labels, nms_iou)[:max_detections]
    return Detections(XYXY(candidates[kept]), values[kept], labels[kept])


def no_detections(device: torch.device | str = "cpu") -> Detections:
    """The answer for an image in which nothing was found."""
    return Detections(
        XYXY(torch.zeros(0, 4, device=device)),
        torch.zeros(0, device=device),
        torch.zeros(0, dtype=torch.int64, device=device),
    )
