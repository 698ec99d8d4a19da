"""Non-maximum suppression, class by class."""

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from onestage.boxes.formats import to_cxcywh
from onestage.boxes.iou import pairwise_iou
from onestage.types import XYXY, Detections

MAX_CANDIDATES = 4096  # of one image, by score: bounds the quadratic cost while a young detector fires everywhere
FAR_PX = 1e6  # beyond this, from far outside an image, a box's edge makes no difference


def suppress(
    boxes: XYXY,
    scores: Tensor,
    *,
    score_threshold: float,
    nms_iou: float,
    max_detections: int,
    distance_power: float | None = None,
) -> Detections:
    """Detections of one image from boxes (A, 4) and class scores (A, K).

    Every class whose score at a box is above ``score_threshold`` counts there; of two boxes of one class that overlap
    by more than ``nms_iou`` the lower scored goes; the ``max_detections`` best are returned, score falling. With a
    ``distance_power`` the overlap is IoU minus that power of d^2 / c^2, the squared distance of the centres over the
    squared diagonal of the box around both: 1 is DIoU-NMS (arXiv:1911.08287, Sec. 3.4), 0.6 Darknet's ``greedynms``.
    """
    anchors, labels = (scores > score_threshold).nonzero(as_tuple=True)
    values = scores[anchors, labels]
    if len(values) > MAX_CANDIDATES:
        values, best = values.topk(MAX_CANDIDATES)
        anchors, labels = anchors[best], labels[best]
    candidates = boxes[anchors]
    # batched_nms moves the classes apart by the largest coordinate: in float32 one enormous box would blur all others,
    # and it takes coordinates to be positive.
    moved = XYXY(candidates.double().clamp(-FAR_PX, FAR_PX) + FAR_PX)
    if distance_power is None:
        kept = batched_nms(moved, values.double(), labels, nms_iou)[:max_detections]
    else:
        kept = _by_distance(moved, values, labels, nms_iou, max_detections, distance_power)
    return Detections(XYXY(candidates[kept]), values[kept], labels[kept])


def _by_distance(
    boxes: XYXY, scores: Tensor, labels: Tensor, nms_iou: float, max_detections: int, power: float
) -> Tensor:
    """The places of those that stay, best first: one pass over the boxes for each of them."""
    left = scores.argsort(descending=True, stable=True)
    kept: list[Tensor] = []
    while len(left) and len(kept) < max_detections:
        best, left = left[0], left[1:]
        kept.append(best)
        one, others = XYXY(boxes[best][None]), XYXY(boxes[left])
        overlap = pairwise_iou(one, others)[0] - _centre_distance(one, others).pow(power)
        left = left[(overlap <= nms_iou) | (labels[left] != labels[best])]
    return torch.stack(kept) if kept else left[:0]


def _centre_distance(a: XYXY, b: XYXY) -> Tensor:
    """The penalty of DIoU (arXiv:1911.08287, eq. 6): d^2 / c^2 of the boxes beside each other, (N, 4) to (N,)."""
    between = to_cxcywh(a)[..., :2] - to_cxcywh(b)[..., :2]
    around = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    return between.square().sum(dim=-1) / around.square().sum(dim=-1).clamp(min=torch.finfo(a.dtype).tiny)


def no_detections(device: torch.device | str = "cpu") -> Detections:
    """The answer for an image in which nothing was found."""
    return Detections(
        XYXY(torch.zeros(0, 4, device=device)),
        torch.zeros(0, device=device),
        torch.zeros(0, dtype=torch.int64, device=device),
    )
