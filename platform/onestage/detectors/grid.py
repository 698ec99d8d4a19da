"""What YOLOv2, YOLOv3 and YOLOv4 share: for each cell and prior a box, an objectness and class scores.

B images, K classes, A priors a cell, N predictions of all levels; boxes in pixels of the input.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from onestage.anchors.grid import cells
from onestage.assign.best_prior import Assigned, best_prior
from onestage.boxes.formats import clip, to_cxcywh, to_xyxy
from onestage.boxes.iou import highest_iou
from onestage.boxes.nms import suppress
from onestage.detectors.base import DarknetDetector, Truths
from onestage.errors import InputError
from onestage.types import CXCYWH, XYXY, Detections, Target

MAX_LOG_RATIO: Final = 10.0
"""A box is at most e^10 times its prior: more is a young network's nonsense, and soon infinite."""
MIN_RATIO: Final = 1e-3
"""A truth is at least that part of its prior: the logarithm of one without area would drown all others."""
IGNORE_CLASS_SCORE: Final = 0.25
"""AlexeyAB's yolo_layer.c ignores only predictions with a class above this."""


class Output(NamedTuple):
    """Raw values (B, A, h, w, 5 + K) of each level, coarsest first, and all of their boxes (B, N, 4)."""

    levels: list[Tensor]
    boxes: XYXY
    size: tuple[int, int]

    def by_level(self, values: Tensor) -> list[Tensor]:
        """Values (B, N, ...) of all predictions as (B, A, h, w, ...) of each level."""
        shapes = [level.shape[1:4] for level in self.levels]
        parts = values.split([math.prod(shape) for shape in shapes], dim=1)
        return [part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)]


class GridDetector(DarknetDetector):
    """Backbone, neck and head, and the way from the head's maps to boxes.

    ``priors`` are (width, height) in pixels of the input, ``masks`` the numbers of those that each level has, finest
    first as the backbone's maps. ``neck`` and ``head`` are given what comes before them: ``neck(channels)``,
    ``head(channels, out_channels=...)``. ``centre_scale`` stretches each level's bounded centres about the middle of
    their cell (Darknet's ``scale_x_y``), so that they reach the cell's border. ``nms_distance_power``: see
    ``boxes.nms``. ``fit_anchors`` asks who trains to fit the priors to the data, before a detector is built: a detector
    itself refuses it. ``**darknet`` is what every ``DarknetDetector`` takes.
    """

    prior_unit_px: int = 1
    """The pixels in one unit of the config's ``priors``."""

    def __init__(
        self,
        *,
        backbone: nn.Module,
        neck: Callable[..., nn.Module],
        head: Callable[..., nn.Module],
        priors: Sequence[Sequence[float]],
        masks: Sequence[Sequence[int]],
        objectness_prior: float,
        weights: str | None,
        centre_scale: Sequence[float] | None = None,
        nms_distance_power: float | None = None,
        fit_anchors: bool = False,
        **darknet: Any,
    ) -> None:
        super().__init__(**darknet)
        if fit_anchors:
            raise InputError(
                "detector.fit_anchors=true is for `onestage train`, which fits detector.priors before it builds a "
                "detector: leave it out here, and give the priors that `onestage anchors` prints"
            )
        self.nms_distance_power = nms_distance_power
        self.backbone = backbone
        self.stride = max(backbone.strides)  # type: ignore[arg-type]
        self.neck = neck(backbone.channels)
        self.strides: tuple[int, ...] = backbone.strides[-len(self.neck.channels) :]  # type: ignore[arg-type,assignment,index]
        if not all(len(prior) == 2 and min(prior) > 0 for prior in priors):
            raise InputError(f"detector.priors must be pairs of a width and a height above 0, got {list(priors)}")
        self.priors = torch.tensor(priors, dtype=torch.float32)
        self.masks = [list(mask) for mask in masks]
        self.centre_scale = [1.0] * len(masks) if centre_scale is None else list(centre_scale)
        self._check_levels()
        out_channels = [len(mask) * (5 + self.num_classes) for mask in self.masks]
        self.head = head(self.neck.channels, out_channels=out_channels)
        self._start_at(objectness_prior)
        self.check_size(*self.input_size)
        self._start_from(weights)

    def _check_levels(self) -> None:
        for key, values in (("masks", self.masks), ("centre_scale", self.centre_scale)):
            if len(values) != len(self.strides):
                raise InputError(f"detector.{key} names {len(values)} levels, the neck has {len(self.strides)}")
        numbers = [number for mask in self.masks for number in mask]
        if not all(self.masks) or not all(0 <= number < len(self.priors) for number in numbers):
            raise InputError(f"detector.masks names priors {self.masks}, detector.priors has {len(self.priors)}")

    def _start_at(self, objectness: float) -> None:
        """RetinaNet's idea (arXiv:1708.02002, Sec. 3.3): born doubting, so that background does not swamp step one."""
        if not 0 < objectness < 1:
            raise InputError(f"detector.objectness_prior must be between 0 and 1, got {objectness}")
        for mask, out in zip(self.masks, self.head.out, strict=True):  # type: ignore[arg-type]
            bias = out.bias.detach().view(len(mask), -1)
            bias[:, 4] = -math.log((1 - objectness) / objectness)

    def raw_maps(self, images: Tensor) -> list[Tensor]:
        """The head's maps (B, A * (5 + K), h, w) before any activation, coarsest first, channels in Darknet's order."""
        self.check_images(images)
        maps: list[Tensor] = self.head(self.neck(self.backbone(images)))
        return maps[::-1]

    def from_raw_maps(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Output:
        levels, boxes = [], []
        kinds = zip(self.masks, self.strides, self.centre_scale, strict=True)
        for raw, (mask, stride, scale) in zip(maps, reversed(list(kinds)), strict=True):
            level = raw.float().unflatten(1, (len(mask), 5 + self.num_classes)).permute(0, 1, 3, 4, 2)
            levels.append(level)  # (B, A, h, w, 5 + K)
            boxes.append(_decode(level, self.priors[mask].to(raw.device), stride, scale).flatten(1, 3))
        return Output(levels, XYXY(torch.cat(boxes, dim=1)), size)

    def truths(self, output: Output, targets: Sequence[Target]) -> Truths:
        """The targets of the output's images; raises InputError for those that are no truth."""
        return Truths(targets, num_images=len(output.boxes), num_classes=self.num_classes, device=output.boxes.device)

    def assign(self, output: Output, truths: Truths, *, also_above: float = 1.0) -> list[Assigned]:
        """The truths of each level, coarsest first: see ``assign.best_prior``."""
        boxes = to_cxcywh(XYXY(truths.boxes))
        return best_prior(
            boxes[:, :2],
            boxes[:, 2:],
            priors=self.priors.to(boxes),
            masks=self.masks[::-1],
            strides=self.strides[::-1],
            shapes=[(level.shape[2], level.shape[3]) for level in output.levels],
            also_above=also_above,
        )

    def anchor_sizes(self) -> Tensor:
        return self.priors[sorted({number for mask in self.masks for number in mask})]

    def prior_at(self, number: int, anchor: Tensor) -> Tensor:
        """Sizes (T, 2) of the priors ``anchor`` (T,) of level ``number``, counted from the coarsest."""
        return self.priors[self.masks[::-1][number]].to(anchor.device)[anchor]

    @abstractmethod
    def class_scores(self, logits: Tensor) -> Tensor:
        """Probabilities of the classes, (..., K)."""

    @torch.no_grad()
    def detect(self, output: Output) -> list[Detections]:
        """Class score times objectness above the threshold, NMS by class."""
        raw = torch.cat([level.flatten(1, 3) for level in output.levels], dim=1)  # (B, N, 5 + K)
        scores = raw[..., 4:5].sigmoid() * self.class_scores(raw[..., 5:])
        height, width = output.size
        # In Darknet's units, where the image is 1 by 1: distances, unlike overlaps, depend on the image's shape.
        unit = output.boxes.new_tensor([width, height, width, height])
        found = []
        for boxes, values in zip(output.boxes / unit, scores, strict=True):
            one = suppress(
                XYXY(boxes),
                values,
                score_threshold=self.score_threshold,
                nms_iou=self.nms_iou,
                max_detections=self.max_detections,
                distance_power=self.nms_distance_power,
            )
            inside = clip(XYXY(one.boxes * unit), height=height, width=width)
            found.append(Detections(inside, one.scores, one.labels))
        return found

    def darknet_layers(self) -> list[nn.Module]:
        return [*self.backbone.children(), *self.neck.darknet_layers(self.head.darknet_layers())]  # type: ignore[operator]

    def darknet_outputs(self) -> list[tuple[nn.Module, int]]:
        return [(out, len(mask)) for out, mask in zip(self.head.out, self.masks, strict=True)]  # type: ignore[arg-type]


def _decode(level: Tensor, priors: Tensor, stride: int, centre_scale: float) -> XYXY:
    """Boxes (B, A, h, w, 4): centres bounded to their cell, sizes as multiples of the priors (A, 2).

    arXiv:1612.08242, Sec. 2, "Direct location prediction"; the same in YOLOv3 and, stretched, in YOLOv4.
    """
    bounded = level[..., :2].sigmoid() * centre_scale - (centre_scale - 1) / 2
    centres = (bounded + cells(level.shape[2], level.shape[3], device=level.device)) * stride
    sizes = level[..., 2:4].clamp(max=MAX_LOG_RATIO).exp() * priors[:, None, None]
    return to_xyxy(CXCYWH(torch.cat((centres, sizes), dim=-1)))


@torch.no_grad()
def overlapping(output: Output, truths: Truths, *, above: float, need_class: bool) -> list[Tensor]:
    """Which predictions overlap some truth by more than ``above``, as (B, A, h, w) a level.

    With ``need_class`` only those count where some class has a score above ``IGNORE_CLASS_SCORE``.
    """
    if truths.padded.shape[1] == 0:
        return [torch.zeros_like(level[..., 0], dtype=torch.bool) for level in output.levels]
    overlap = output.by_level(highest_iou(output.boxes, XYXY(truths.padded)) > above)
    if not need_class:
        return overlap
    logit = math.log(IGNORE_CLASS_SCORE / (1 - IGNORE_CLASS_SCORE))
    sure = [level[..., 5:].amax(dim=-1) > logit for level in output.levels]
    return [part & any_class for part, any_class in zip(overlap, sure, strict=True)]
