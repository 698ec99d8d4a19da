"""SSD: Single Shot MultiBox Detector, arXiv:1512.02325.

B images, K classes, A default boxes of all levels, G boxes of an image; boxes in pixels.
Where paper and torchvision's ``ssd300_vgg16`` differ, structure and defaults follow torchvision.
"""

import logging
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, ClassVar, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from onestage.anchors.default_boxes import DefaultBoxes
from onestage.assign.bipartite import bipartite
from onestage.boxes.coders import BoxCoder
from onestage.boxes.formats import clip
from onestage.boxes.iou import pairwise_iou
from onestage.boxes.nms import suppress
from onestage.detectors.base import OneStageDetector, Truths
from onestage.errors import InputError
from onestage.losses.mining import hard_negatives
from onestage.nn.ssd import DefaultBoxHead, ExtraLayers, ScaledL2Norm
from onestage.nn.vgg import VGG16
from onestage.types import XYXY, Deltas, Detections, Target

CONV4_3_SCALE: Final = 20.0  # Sec. 3.1, at the beginning
BACKGROUND: Final = 0  # among the logits, where class k is k + 1

log = logging.getLogger(__name__)


class Output(NamedTuple):
    """Logits (B, A, 1 + K), background first, and deltas (B, A, 4) from the default boxes."""

    logits: Tensor
    deltas: Tensor


class SSD(OneStageDetector):
    """Six levels (SSD300) or seven (SSD512), from conv4_3 to a map of one cell.

    The input has one size, ``input_size``, which the default boxes follow from. ``extra`` and ``head`` are given what
    comes before them: ``extra(channels)``, ``head(channels, per_cell=..., num_classes=...)``. ``box_weights`` are the
    box coder's, ``negatives_per_positive`` counts the background boxes that the class loss has for each positive, and
    ``candidates_per_class`` those of an image that go into NMS.
    """

    loss_parts: ClassVar = ("box", "class")
    counts_over_ranks: ClassVar[bool] = True

    def __init__(
        self,
        *,
        backbone: VGG16,
        extra: Callable[..., ExtraLayers],
        head: Callable[..., DefaultBoxHead],
        anchors: DefaultBoxes,
        num_classes: int,
        width: float,
        input_size: Sequence[int],
        positive_iou: float,
        negatives_per_positive: float,
        box_weights: Sequence[float],
        candidates_per_class: int,
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
        self.positive_iou = positive_iou
        self.negatives_per_positive = negatives_per_positive
        self.candidates_per_class = candidates_per_class
        self.coder = BoxCoder(weights=box_weights)
        self.backbone: nn.Module = backbone
        self.norm = ScaledL2Norm(backbone.channels[0], scale=CONV4_3_SCALE)
        self.extra = extra(backbone.channels[1])
        channels = (*backbone.channels, *self.extra.channels)
        if len(channels) != len(anchors.per_cell):
            raise ValueError(f"detector.anchors has {len(anchors.per_cell)} levels, the network {len(channels)}")
        self.head = head(channels, per_cell=anchors.per_cell, num_classes=1 + num_classes)
        default_boxes = anchors(self._map_shapes(), height=self.input_size[0], width=self.input_size[1])
        self.default_boxes: Tensor
        self.register_buffer("default_boxes", default_boxes, persistent=False)
        if weights is not None:
            from onestage.weights import torchvision

            torchvision.load_file(self, weights)
            if weights == "torchvision://vgg16" and backbone.std.max() < 0.1:
                log.warning(
                    "detector.weights: torchvision://vgg16 was trained with detector.backbone.image_std="
                    "[0.229,0.224,0.225]: torchvision://vgg16_features is for SSD's"
                )
        self.train()  # freeze_norm holds from birth

    def anchor_sizes(self) -> Tensor:
        sides = self.default_boxes[:, 2:] - self.default_boxes[:, :2]
        different: Tensor = (sides * 10).round().unique(dim=0)
        return different / 10

    def _map_shapes(self) -> list[tuple[int, int]]:
        """(h, w) of each level; raises InputError for an input size that the layers are not made for."""
        height, width = self.input_size
        try:
            conv4_3, fc7 = _on_meta(self.backbone, torch.empty(1, 3, height, width, device="meta"))
            maps = [conv4_3, fc7, *_on_meta(self.extra, fc7)]
        except RuntimeError:  # a kernel larger than its map
            maps = []
        shapes = [(x.shape[2], x.shape[3]) for x in maps]
        if shapes[-1:] != [(1, 1)]:
            raise InputError(
                f"SSD's last map must have one cell, which an input of {height}x{width} does not give: set "
                f"detector.input_size to what its layers are made for, [300, 300] for ssd300, [512, 512] for ssd512"
            )
        return shapes

    def check_size(self, height: int, width: int) -> None:
        """Raises InputError for any size but the one that the default boxes were made for."""
        if [height, width] != self.input_size:
            raise InputError(
                f"SSD takes inputs of {self.input_size[0]}x{self.input_size[1]} alone, got {height}x{width}: "
                f"set detector.input_size"
            )

    def forward(self, images: Tensor) -> Output:  # Fig. 2
        return self.from_raw_maps(self.raw_maps(images), (images.shape[2], images.shape[3]))

    def raw_maps(self, images: Tensor) -> list[Tensor]:
        """The head's maps, finest first: of each level the logits, then of each level the deltas."""
        self.check_images(images)
        conv4_3, fc7 = self.backbone(images)
        logits, deltas = self.head([self.norm(conv4_3), fc7, *self.extra(fc7)])
        return [*logits, *deltas]

    def from_raw_maps(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Output:
        """The rest of forward, for an input of ``size`` (H, W)."""
        self.check_size(*size)
        num_levels = len(maps) // 2
        logits = [_by_box(raw, 1 + self.num_classes) for raw in maps[:num_levels]]
        deltas = [_by_box(raw, 4) for raw in maps[num_levels:]]
        return Output(torch.cat(logits, dim=1), torch.cat(deltas, dim=1))

    def losses(self, output: Output, targets: Sequence[Target]) -> dict[str, Tensor]:
        """Sec. 2.2, "Training objective": smooth L1 and softmax over the positives; nothing where there are none."""
        classes, deltas = self._assigned(targets, len(output.logits))
        positive = classes != BACKGROUND
        box = F.smooth_l1_loss(output.deltas, deltas, reduction="none").sum(dim=2)
        entropy = F.cross_entropy(output.logits.flatten(0, 1), classes.flatten(), reduction="none").view_as(box)
        counted = positive | hard_negatives(entropy, positive, ratio=self.negatives_per_positive)
        num_images = len(targets)
        num_positives = self.positives_per_image(positive.sum(), num_images) * num_images
        return {"box": (box * positive).sum() / num_positives, "class": (entropy * counted).sum() / num_positives}

    @torch.no_grad()
    def _assigned(self, targets: Sequence[Target], num_images: int) -> tuple[Tensor, Deltas]:
        """The class (B, A) that each default box answers for, or BACKGROUND, and the deltas (B, A, 4), 0 for that."""
        anchors = self.default_boxes
        truths = Truths(targets, num_images=num_images, num_classes=self.num_classes, device=anchors.device)
        labels = pad_sequence([target.labels for target in targets], batch_first=True).to(anchors.device)  # (B, G)
        match = bipartite(pairwise_iou(XYXY(truths.padded), XYXY(anchors)), positive_iou=self.positive_iou)
        # One truth more, the background, is what all other default boxes answer for.
        match = match.masked_fill(match < 0, labels.shape[1])
        classes = F.pad(labels + 1, (0, 1), value=BACKGROUND).gather(1, match)
        boxes = F.pad(truths.padded, (0, 0, 0, 1)).gather(1, match[..., None].expand(-1, -1, 4))
        boxes = torch.where((classes == BACKGROUND)[..., None], anchors, boxes)
        return classes, self.coder.encode(XYXY(anchors), XYXY(boxes))

    @torch.no_grad()
    def detect(self, output: Output) -> list[Detections]:
        """Sec. 3.7: the best boxes of each class above the threshold, NMS by class."""
        height, width = self.input_size
        decoded = self.coder.decode(XYXY(self.default_boxes), Deltas(output.deltas))
        boxes = clip(decoded, height=height, width=width)
        scores = output.logits.softmax(dim=-1)[..., 1:]
        best = scores.topk(min(self.candidates_per_class, scores.shape[1]), dim=1)
        candidates = torch.zeros_like(scores).scatter(1, best.indices, best.values)
        return [
            suppress(
                XYXY(boxes[image]),
                candidates[image],
                score_threshold=self.score_threshold,
                nms_iou=self.nms_iou,
                max_detections=self.max_detections,
            )
            for image in range(len(boxes))
        ]

    def torchvision_layers(self) -> dict[str, nn.Module | nn.Parameter]:
        """The layers by the prefixes of their tensors in the state dict of torchvision's ``ssd300_vgg16``."""
        parts = {
            "backbone.features": "backbone.to_conv4_3",
            "backbone.extra.0": "backbone.to_conv5_3",
            "backbone.extra.0.7": "backbone.to_fc7",
            **{f"backbone.extra.{n + 1}": f"extra.layers.{n}" for n in range(len(self.extra.layers))},
            "head.classification_head.module_list": "head.classes",
            "head.regression_head.module_list": "head.offsets",
        }
        layers: dict[str, nn.Module | nn.Parameter] = {"backbone.scale_weight": self.norm.scale}
        for theirs, ours in parts.items():
            children = self.get_submodule(ours).named_children()
            layers |= {f"{theirs}.{n}": layer for n, layer in children if isinstance(layer, nn.Conv2d)}
        return layers

    def output_layers(self) -> list[nn.Module]:
        """The layers whose size depends on the number of classes."""
        return list(self.head.classes)


def _by_box(raw: Tensor, num_values: int) -> Tensor:
    """A level's map (B, boxes a cell * num_values, h, w) as (B, h * w * boxes a cell, num_values)."""
    return raw.float().permute(0, 2, 3, 1).reshape(len(raw), -1, num_values)


def _on_meta(module: nn.Module, x: Tensor) -> Any:
    """What ``module`` makes of ``x`` on the meta device: shapes, without the arithmetic."""
    tensors = chain(module.named_parameters(), module.named_buffers())
    return functional_call(module, {name: tensor.to("meta") for name, tensor in tensors}, (x,))
