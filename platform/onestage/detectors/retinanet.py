"""RetinaNet: Focal Loss for Dense Object Detection, arXiv:1708.02002.

B images, K classes, A anchors of all levels, P positives of the batch; boxes in pixels.
Where paper and code differ, structure and constants follow torchvision's.
"""

from collections.abc import Callable, Sequence
from typing import ClassVar, Final, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import batched_nms, generalized_box_iou_loss

from onestage.anchors.pyramid import PyramidAnchors
from onestage.assign.match import IGNORED
from onestage.assign.max_iou import MaxIoUAssigner
from onestage.boxes.coders import BoxCoder
from onestage.boxes.formats import clip
from onestage.detectors.base import OneStageDetector, Truths
from onestage.errors import InputError
from onestage.losses.focal import FocalLoss
from onestage.types import XYXY, Deltas, Detections, Target

IMAGENET_MEAN: Final = (0.485, 0.456, 0.406)  # RGB, in [0, 1]
IMAGENET_STD: Final = (0.229, 0.224, 0.225)


class Output(NamedTuple):
    """Class logits (B, A, K), box deltas (B, A, 4) and the anchors (A, 4), level by level, finest first."""

    logits: Tensor
    deltas: Deltas
    anchors: XYXY
    num_anchors: list[int]
    size: tuple[int, int]


class RetinaNet(OneStageDetector):
    """A feature pyramid with two towers on every level, trained on all anchors at once.

    ``neck`` and ``head`` are given what comes before them: ``neck(channels)``, ``head(channels, num_anchors=...,
    num_classes=...)``. Inputs are of any height and width that are multiples of 32. ``smooth_l1_beta`` is where the
    smooth L1 loss turns from a square into a line.
    """

    loss_parts: ClassVar = ("box", "class")

    def __init__(
        self,
        *,
        backbone: nn.Module,
        neck: Callable[..., nn.Module],
        head: Callable[..., nn.Module],
        anchors: PyramidAnchors,
        assigner: MaxIoUAssigner,
        class_loss: FocalLoss,
        box_loss: Literal["l1", "smooth_l1", "giou"],
        smooth_l1_beta: float,
        num_classes: int,
        width: float,
        input_size: Sequence[int],
        candidates_per_level: int,
        score_threshold: float,
        nms_iou: float,
        max_detections: int,
        freeze_norm: bool,
        weights: str | None = None,
    ) -> None:
        super().__init__(
            num_classes=num_classes,
            width=width,
            input_size=input_size,
            score_threshold=score_threshold,
            nms_iou=nms_iou,
            max_detections=max_detections,
            freeze_norm=freeze_norm,
        )
        if box_loss not in ("l1", "smooth_l1", "giou"):
            raise InputError(f"detector.box_loss must be l1, smooth_l1 or giou, got {box_loss}")
        if not smooth_l1_beta > 0:
            raise InputError(f"detector.smooth_l1_beta must be above 0, got {smooth_l1_beta}")
        self.backbone = backbone
        self.stride = max(backbone.strides)  # type: ignore[arg-type]
        self.neck = neck(backbone.channels)
        self.head = head(self.neck.channels, num_anchors=anchors.num_anchors, num_classes=num_classes)
        self.anchors = anchors
        self.assigner = assigner
        self.coder = BoxCoder()
        self.class_loss = class_loss
        self.box_loss = box_loss
        self.smooth_l1_beta = smooth_l1_beta
        self.candidates_per_level = candidates_per_level
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None], persistent=False)
        self.check_size(*self.input_size)
        if weights is not None:
            from onestage.weights import torchvision

            torchvision.load_file(self, weights)
        self.train()  # freeze_norm holds from birth

    def anchor_sizes(self) -> Tensor:
        shapes = torch.cat(self.anchors.shapes)
        return shapes[:, 2:] - shapes[:, :2]

    def forward(self, images: Tensor) -> Output:  # Fig. 3
        return self.from_raw_maps(self.raw_maps(images), (images.shape[2], images.shape[3]))

    def raw_maps(self, images: Tensor) -> list[Tensor]:
        """The head's maps, finest first: of each level the class logits, then of each level the box deltas."""
        self.check_images(images)
        levels = self.neck(self.backbone((images - self.mean) / self.std))
        logits, deltas = self.head(levels)
        return [*logits, *deltas]

    def from_raw_maps(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Output:
        """The rest of forward, for an input of ``size`` (H, W)."""
        num_levels = len(maps) // 2
        cells = [(raw.shape[2], raw.shape[3]) for raw in maps[:num_levels]]
        anchors = self.anchors(cells, size, device=maps[0].device)
        return Output(
            logits=torch.cat([_by_anchor(raw, self.num_classes) for raw in maps[:num_levels]], dim=1),
            deltas=Deltas(torch.cat([_by_anchor(raw, 4) for raw in maps[num_levels:]], dim=1)),
            anchors=XYXY(torch.cat(tuple(anchors))),
            num_anchors=[len(level) for level in anchors],
            size=size,
        )

    def losses(self, output: Output, targets: Sequence[Target]) -> dict[str, Tensor]:
        """Sec. 4, "Focal Loss": all anchors but the ignored ones, over the image's positives, then over B."""
        truths = Truths(
            targets, num_images=len(output.logits), num_classes=self.num_classes, device=output.anchors.device
        )
        matched = self.assigner(output.anchors, XYXY(truths.padded))  # (B, A)
        num_positives = (matched >= 0).sum(dim=1).clamp(min=1)
        image, anchor = (matched >= 0).nonzero(as_tuple=True)  # (P,)
        first = torch.searchsorted(truths.image, torch.arange(len(matched), device=matched.device))
        truth = first[image] + matched[image, anchor]

        positive = torch.zeros_like(output.logits, dtype=torch.bool)
        positive[image, anchor, truths.labels[truth]] = True
        focal = self.class_loss(output.logits, positive).sum(dim=2).masked_fill(matched == IGNORED, 0)
        box = self._box_loss(
            XYXY(output.anchors[anchor]), Deltas(output.deltas[image, anchor]), XYXY(truths.boxes[truth])
        )
        num_images = len(targets)
        return {
            "class": (focal.sum(dim=1) / num_positives).sum() / num_images,
            "box": (box / num_positives[image]).sum() / num_images,
        }

    def _box_loss(self, anchors: XYXY, deltas: Deltas, boxes: XYXY) -> Tensor:
        """Of each positive (P,)."""
        loss: Tensor
        if self.box_loss == "giou":
            loss = generalized_box_iou_loss(self.coder.decode(anchors, deltas), boxes)
            return loss
        wanted = self.coder.encode(anchors, boxes)
        if self.box_loss == "smooth_l1":
            loss = F.smooth_l1_loss(deltas, wanted, beta=self.smooth_l1_beta, reduction="none")
        else:
            loss = F.l1_loss(deltas, wanted, reduction="none")
        return loss.sum(dim=1)

    @torch.no_grad()
    def detect(self, output: Output) -> list[Detections]:
        """Sec. 4.1, "Inference": the best of each level above the threshold, then NMS by class over all levels."""
        scores, anchors, labels = self._candidates(output)
        deltas = output.deltas.take_along_dim(anchors[..., None], dim=1)
        boxes = self.coder.decode(XYXY(output.anchors[anchors]), Deltas(deltas))
        boxes = clip(boxes, height=output.size[0], width=output.size[1])
        found = []
        for box, score, label in zip(boxes, scores, labels, strict=True):
            above = score > self.score_threshold
            box, score, label = box[above], score[above], label[above]
            kept = batched_nms(box, score, label, self.nms_iou)[: self.max_detections]
            found.append(Detections(XYXY(box[kept]), score[kept], label[kept]))
        return found

    def _candidates(self, output: Output) -> tuple[Tensor, Tensor, Tensor]:
        """Scores, anchors and labels, each (B, at most ``candidates_per_level`` of every level)."""
        scores, anchors, labels, first = [], [], [], 0
        for level in output.logits.split(output.num_anchors, dim=1):
            best = level.sigmoid().flatten(1)
            best, at = best.topk(min(self.candidates_per_level, best.shape[1]))
            scores.append(best)
            anchors.append(first + at // self.num_classes)
            labels.append(at % self.num_classes)
            first += level.shape[1]
        return torch.cat(scores, dim=1), torch.cat(anchors, dim=1), torch.cat(labels, dim=1)

    def torchvision_layers(self) -> dict[str, nn.Module | nn.Parameter]:
        """By their names in the state dict of torchvision's ``retinanet_resnet50_fpn`` (``_v2``)."""
        parts = {"backbone.body": self.backbone, "backbone.fpn": self.neck, "head": self.head}
        return {
            f"{prefix}.{name}": layer
            for prefix, part in parts.items()
            for name, layer in part.torchvision_layers().items()  # type: ignore[operator]
        }

    def output_layers(self) -> list[nn.Module]:
        """The layers whose size depends on the number of classes."""
        return [self.head.class_out]  # type: ignore[list-item]


def _by_anchor(raw: Tensor, num_values: int) -> Tensor:
    """A head's map (B, A * num_values, h, w) as (B, h * w * A, num_values)."""
    values: Tensor = raw.float().unflatten(1, (-1, num_values))  # (B, A, num_values, h, w)
    return values.permute(0, 3, 4, 1, 2).flatten(1, 3)
