"""YOLOv3: An Incremental Improvement, arXiv:1804.02767.

B images, K classes, A priors a cell, N predictions of all levels, T truths at a level; boxes in pixels.
Where paper and code differ, structure and constants follow the authors' yolov3.cfg.
"""

import math
from collections.abc import Callable, Sequence
from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onestage.anchors.grid import cells
from onestage.assign.best_prior import Assigned, best_prior
from onestage.boxes.formats import clip, to_cxcywh, to_xyxy
from onestage.boxes.iou import pairwise_iou
from onestage.boxes.nms import suppress
from onestage.detectors.base import OneStageDetector, Truths
from onestage.types import CXCYWH, XYXY, Detections, Target

ALEXEYAB_IOU_NORMALIZER: Final = 0.75  # parser.c's default, which yolov3.cfg leaves as it is
ALEXEYAB_IGNORE_CLASS_SCORE: Final = 0.25  # yolo_layer.c: only predictions with such a class are ever ignored


class Output(NamedTuple):
    """Raw values (B, A, h, w, 5 + K) of each level, coarsest first, and all of their boxes (B, N, 4)."""

    levels: list[Tensor]
    boxes: XYXY
    size: tuple[int, int]


class YOLOv3(OneStageDetector):
    """Three scales (two in yolov3-tiny), priors by shape, logistic objectness and classes.

    ``priors`` are (width, height) in pixels of the input, for each level, finest first, as the backbone's maps.
    ``neck`` and ``head`` are given what comes before them: ``neck(channels)``, ``head(channels, out_channels=...)``.
    ``loss`` is "paper", or "darknet": AlexeyAB's form, whose gradient is minus its delta.
    """

    def __init__(
        self,
        *,
        backbone: nn.Module,
        neck: Callable[..., nn.Module],
        head: Callable[..., nn.Module],
        priors: Sequence[Sequence[Sequence[float]]],
        num_classes: int,
        width: float,
        input_size: Sequence[int],
        ignore_iou: float,
        objectness_prior: float,
        loss: Literal["paper", "darknet"],
        score_threshold: float,
        nms_iou: float,
        max_detections: int,
        freeze_norm: bool,
        weights: str | None = None,
    ) -> None:
        super().__init__(
            num_classes=num_classes,
            input_size=input_size,
            score_threshold=score_threshold,
            nms_iou=nms_iou,
            max_detections=max_detections,
            freeze_norm=freeze_norm,
        )
        self.width = width
        self.ignore_iou = ignore_iou
        self.loss = loss
        self.backbone = backbone
        self.strides: tuple[int, ...] = backbone.strides  # type: ignore[assignment]
        self.stride = max(self.strides)
        if len(priors) != len(self.strides):
            raise ValueError(f"detector.priors names {len(priors)} levels, the backbone has {len(self.strides)}")
        self.priors = [torch.tensor(level, dtype=torch.float32) for level in priors]
        self.neck = neck(backbone.channels)
        out_channels = [len(level) * (5 + num_classes) for level in priors]
        self.head = head(self.neck.channels, out_channels=out_channels)
        self._start_at(objectness_prior)
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.check_size(*self.input_size)
        if weights is not None:
            from onestage.weights import darknet

            darknet.load(self, weights)
        self.train()  # freeze_norm holds from birth

    def _start_at(self, objectness: float) -> None:
        """RetinaNet's idea (arXiv:1708.02002, Sec. 3.3): born doubting, so that background does not swamp step one."""
        for level, out in zip(self.priors, self.head.out, strict=True):  # type: ignore[arg-type]
            bias = out.bias.detach().view(len(level), -1)
            bias[:, 4] = -math.log((1 - objectness) / objectness)

    def forward(self, images: Tensor) -> Output:
        return self.from_raw_maps(self.raw_maps(images), (images.shape[2], images.shape[3]))

    def raw_maps(self, images: Tensor) -> list[Tensor]:
        """The head's maps (B, A * (5 + K), h, w) before any activation, coarsest first, channels in Darknet's order."""
        self.check_images(images)
        maps: list[Tensor] = self.head(self.neck(self.backbone(images)))
        return maps[::-1]

    def from_raw_maps(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Output:
        """The rest of forward, for an input of ``size`` (H, W)."""
        levels, boxes = [], []
        for raw, priors, stride in zip(maps, self.priors[::-1], self.strides[::-1], strict=True):
            level = raw.float().unflatten(1, (len(priors), 5 + self.num_classes)).permute(0, 1, 3, 4, 2)
            levels.append(level)  # (B, A, h, w, 5 + K)
            boxes.append(self._decode(level, priors.to(raw.device), stride).flatten(1, 3))
        return Output(levels, XYXY(torch.cat(boxes, dim=1)), size)

    def _decode(self, level: Tensor, priors: Tensor, stride: int) -> XYXY:
        """Sec. 2.1: the centre is bounded to its cell, the size is a multiple of the prior's."""
        grid = cells(level.shape[2], level.shape[3], device=level.device)
        centres = (level[..., :2].sigmoid() + grid) * stride
        sizes = level[..., 2:4].exp() * priors[:, None, None]
        return to_xyxy(CXCYWH(torch.cat((centres, sizes), dim=-1)))

    def losses(self, output: Output, targets: Sequence[Target]) -> dict[str, Tensor]:
        """Sec. 2.1 and 2.2: squared error of size, cross-entropy of centre, objectness and classes, over B."""
        truths = Truths(targets, num_classes=self.num_classes, device=output.boxes.device)
        boxes = to_cxcywh(XYXY(truths.boxes))
        assigned = best_prior(
            boxes[:, :2],
            boxes[:, 2:],
            [priors.to(boxes) for priors in self.priors[::-1]],
            self.strides[::-1],
            [(level.shape[2], level.shape[3]) for level in output.levels],
        )
        ignored = self._ignored(output, truths)
        box, objectness, classes = [], [], []
        for number, (level, at) in enumerate(zip(output.levels, assigned, strict=True)):
            where = (truths.image[at.truth], at.anchor, at.row, at.column)
            box.append(self._box_loss(level[where], boxes[at.truth], at, number, output.size))
            positive = torch.zeros_like(level[..., 0])
            positive[where] = 1
            counted = (positive > 0) | ~ignored[number]
            entropy = F.binary_cross_entropy_with_logits(level[..., 4], positive, reduction="none")
            objectness.append((entropy * counted).sum())
            classes.append(self._class_loss(level, where, truths.labels[at.truth]))
        num_images = max(len(targets), 1)
        parts = {"box": box, "objectness": objectness, "class": classes}
        return {name: torch.stack(levels).sum() / num_images for name, levels in parts.items()}

    @torch.no_grad()
    def _ignored(self, output: Output, truths: Truths) -> list[Tensor]:
        """Sec. 2.1: predictions that overlap some truth by more than the threshold, as (B, A, h, w) a level."""
        num_images, num_truths = truths.padded.shape[:2]
        if num_truths == 0:
            return [torch.zeros_like(level[..., 0], dtype=torch.bool) for level in output.levels]
        overlap = pairwise_iou(output.boxes, XYXY(truths.padded)).amax(dim=2) > self.ignore_iou  # (B, N)
        shapes = [level.shape[1:4] for level in output.levels]
        split = overlap.split([math.prod(shape) for shape in shapes], dim=1)
        ignored = [part.view(num_images, *shape) for part, shape in zip(split, shapes, strict=True)]
        if self.loss == "darknet":
            sure = [level[..., 5:].sigmoid().amax(dim=-1) > ALEXEYAB_IGNORE_CLASS_SCORE for level in output.levels]
            ignored = [part & any_class for part, any_class in zip(ignored, sure, strict=True)]
        return ignored

    def _box_loss(self, raw: Tensor, boxes: Tensor, at: Assigned, number: int, size: tuple[int, int]) -> Tensor:
        """Of raw predictions (T, 5 + K) for truths (T, 4): small boxes count more, by 2 - w h (yolo_layer.c)."""
        stride, priors = self.strides[::-1][number], self.priors[::-1][number].to(boxes)
        offset = boxes[:, :2] / stride - torch.stack((at.column, at.row), dim=1)
        scale = (boxes[:, 2:] / priors[at.anchor]).clamp(min=1e-9).log()
        centre = F.binary_cross_entropy_with_logits(raw[:, :2], offset.clamp(0, 1), reduction="none")
        extent = 0.5 * (raw[:, 2:4] - scale).square()
        weight = 2 - boxes[:, 2] * boxes[:, 3] / (size[0] * size[1])
        loss = (weight[:, None] * (centre + extent)).sum()
        return ALEXEYAB_IOU_NORMALIZER * loss if self.loss == "darknet" else loss

    def _class_loss(self, level: Tensor, where: tuple[Tensor, ...], labels: Tensor) -> Tensor:
        """Independent logistic classes (Sec. 2.2); truths that share a prior make its target multi-label."""
        target = torch.zeros_like(level[..., 5:])
        target[(*where, labels)] = 1
        used = torch.zeros_like(level[..., 0], dtype=torch.bool)
        used[where] = True
        return F.binary_cross_entropy_with_logits(level[..., 5:][used], target[used], reduction="sum")

    @torch.no_grad()
    def detect(self, output: Output) -> list[Detections]:
        """Class score times objectness above the threshold, NMS by class."""
        raw = torch.cat([level.flatten(1, 3) for level in output.levels], dim=1).sigmoid()  # (B, N, 5 + K)
        scores = raw[..., 4:5] * raw[..., 5:]
        found = []
        for boxes, values in zip(output.boxes, scores, strict=True):
            one = suppress(
                XYXY(boxes),
                values,
                score_threshold=self.score_threshold,
                nms_iou=self.nms_iou,
                max_detections=self.max_detections,
            )
            height, width = output.size
            found.append(Detections(clip(one.boxes, height=height, width=width), one.scores, one.labels))
        return found

    def darknet_layers(self) -> list[nn.Module]:
        """The layers that hold weights, in the order of the cfg and so of a ``.weights`` file."""
        layers: list[nn.Module] = list(self.backbone.children())
        fuse, lateral = list(self.neck.fuse), list(self.neck.lateral)  # type: ignore[arg-type]
        heads = list(zip(self.head.hidden, self.head.out, strict=True))[::-1]  # type: ignore[arg-type]
        for number, (hidden, out) in enumerate(heads):
            layers += [fuse[number], hidden, out, *lateral[number : number + 1]]
        return layers
