"""You Only Look Once: Unified, Real-Time Object Detection, arXiv:1506.02640.

B images, K classes, S cells of a grid, P boxes that a cell predicts; boxes in pixels. A cell is 64 pixels a side.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onestage.anchors.grid import cells
from onestage.assign.responsible import first_in_cell, responsible
from onestage.boxes.formats import clip, to_cxcywh, to_xyxy
from onestage.boxes.nms import suppress
from onestage.detectors.base import DarknetDetector, Truths
from onestage.errors import InputError
from onestage.nn.blocks import ACTIVATIONS, LEAKY_SLOPE, scaled
from onestage.nn.local import LocallyConnected
from onestage.types import CXCYWH, XYXY, Detections, Target


class Output(NamedTuple):
    """Raw ``classes`` (B, S, K), ``objectness`` (B, S, P), ``coordinates`` (B, S, P, 4), and ``boxes`` (B, S, P, 4).

    Coordinates are x and y in the cell, in cells, and the square roots of width and height, in inputs.
    """

    classes: Tensor
    objectness: Tensor
    coordinates: Tensor
    boxes: XYXY
    size: tuple[int, int]


class YOLOv1(DarknetDetector):
    """A grid of cells, each with its classes and a few boxes, out of one connected layer.

    ``hidden`` is given what comes before it: ``hidden(channels, grid)``, and says how many ``features`` it ends in.
    ``**darknet`` is what every ``DarknetDetector`` takes; its ``loss`` "darknet" is half of the paper's.
    """

    def __init__(
        self,
        *,
        backbone: nn.Module,
        hidden: Callable[..., nn.Module],
        boxes_per_cell: int,
        lambda_coord: float,
        lambda_noobj: float,
        weights: str | None,
        **darknet: Any,
    ) -> None:
        super().__init__(**darknet)
        if boxes_per_cell < 1:
            raise InputError(f"detector.boxes_per_cell must be at least 1, got {boxes_per_cell}")
        self.boxes_per_cell = boxes_per_cell
        self.lambda_coord = lambda_coord
        self.lambda_noobj = lambda_noobj
        self.backbone = backbone
        self.stride: int = backbone.stride  # type: ignore[assignment]
        super().check_size(*self.input_size)
        self.grid = (self.input_size[0] // self.stride, self.input_size[1] // self.stride)
        self.num_cells = self.grid[0] * self.grid[1]
        self.hidden = hidden(backbone.channels, self.grid)
        self.out = nn.Linear(self.hidden.features, self.num_cells * (self.num_classes + boxes_per_cell * 5))  # type: ignore[arg-type]
        self._start_apart()
        self._start_from(weights)

    def _start_apart(self) -> None:
        """Boxes are born in the middle of their cell, of sizes apart: which answers is then no matter of chance.

        Sec. 2.2 wants specialised predictors. Those born alike come to predict the same, and take turns in being told
        that they are objects and background.
        """
        boxes = self.out.bias.detach()[-self.num_cells * self.boxes_per_cell * 4 :]
        sides = torch.arange(1, self.boxes_per_cell + 1) / (self.boxes_per_cell + 1)  # of the input's
        boxes = boxes.view(self.num_cells, self.boxes_per_cell, 4)
        boxes[..., :2] = 0.5
        boxes[..., 2:] = sides[:, None].sqrt()

    def check_size(self, height: int, width: int) -> None:
        """Connected layers have a weight for each place, so one size alone fits."""
        if [height, width] != self.input_size:
            raise InputError(
                f"{type(self).__name__} has connected layers for inputs of {self.input_size[0]}x{self.input_size[1]} "
                f"alone, got {height}x{width}: set detector.input_size"
            )

    def raw_maps(self, images: Tensor) -> list[Tensor]:
        """The last layer's values (B, S * (K + 5 * P)) in Darknet's order: all classes, all objectness, all boxes."""
        self.check_images(images)
        return [self.out(self.hidden(self.backbone(images)))]

    def from_raw_maps(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Output:
        (raw,) = maps
        per_cell = (self.num_classes, self.boxes_per_cell, 4 * self.boxes_per_cell)
        parts = raw.float().split([self.num_cells * values for values in per_cell], dim=1)
        classes, objectness, coordinates = (part.unflatten(1, (self.num_cells, -1)) for part in parts)
        coordinates = coordinates.unflatten(2, (self.boxes_per_cell, 4))
        return Output(classes, objectness, coordinates, self._decode(coordinates, size), size)

    def _decode(self, coordinates: Tensor, size: tuple[int, int]) -> XYXY:
        """Sec. 2: the centre is relative to its cell, the size to the image; Sec. 2.2: as square roots."""
        unit = coordinates.new_tensor(size[::-1])
        centres = (coordinates[..., :2] + self._corners(coordinates)[:, None]) * self.stride
        return to_xyxy(CXCYWH(torch.cat((centres, coordinates[..., 2:].square() * unit), dim=-1)))

    def _corners(self, like: Tensor) -> Tensor:
        """Column and row of each cell, (S, 2)."""
        return cells(*self.grid, device=like.device).flatten(0, 1)

    def losses(self, output: Output, targets: Sequence[Target]) -> dict[str, Tensor]:
        """Eq. 3, over B: squared errors of the responsible boxes, of every objectness, and of the classes of cells."""
        truths = Truths(targets, num_images=len(output.boxes), num_classes=self.num_classes, device=output.boxes.device)
        truth = first_in_cell(
            XYXY(truths.boxes), truths.image, num_images=len(targets), size=output.size, grid=self.grid
        )
        boxes = XYXY(F.pad(truths.boxes, (0, 0, 0, 1))[truth])  # (B, S, 4); NEGATIVE, -1, is the last row: no box
        labels = F.pad(truths.labels, (0, 1))[truth]
        with torch.no_grad():
            at = responsible(output.boxes, boxes, size=output.size)
        occupied = (truth >= 0)[..., None]
        answers = occupied & (at.predictor[..., None] == torch.arange(self.boxes_per_cell, device=truth.device))

        box = (output.coordinates - self._wanted(boxes, output.size)[:, :, None]).square().sum(dim=3) * answers
        confidence = (output.objectness - at.iou * answers).square()  # Sec. 2: Pr(object) * IOU
        confidence = torch.where(answers, confidence, self.lambda_noobj * confidence)
        one_hot = labels[..., None] == torch.arange(self.num_classes, device=labels.device)
        classes = (output.classes - one_hot.float()).square() * occupied
        half = 0.5 if self.loss == "darknet" else 1.0
        scale = half / len(targets)
        return {
            "box": scale * self.lambda_coord * box.sum(),
            "objectness": scale * confidence.sum(),
            "class": scale * classes.sum(),
        }

    def _wanted(self, boxes: XYXY, size: tuple[int, int]) -> Tensor:
        """The coordinates (B, S, 4) that decode to ``boxes`` (B, S, 4)."""
        truth = to_cxcywh(boxes)
        centres = truth[..., :2] / self.stride - self._corners(boxes)
        return torch.cat((centres, (truth[..., 2:].clamp(min=0) / truth.new_tensor(size[::-1])).sqrt()), dim=-1)

    @torch.no_grad()
    def detect(self, output: Output) -> list[Detections]:
        """Class times objectness above the threshold (eq. 1), NMS by class (Sec. 2.3). Nothing bounds raw scores."""
        scores = (output.objectness[..., None] * output.classes[:, :, None]).flatten(1, 2)  # (B, S * P, K)
        height, width = output.size
        found = []
        for boxes, values in zip(output.boxes.flatten(1, 2), scores, strict=True):
            one = suppress(
                XYXY(boxes),
                values,
                score_threshold=self.score_threshold,
                nms_iou=self.nms_iou,
                max_detections=self.max_detections,
            )
            clipped = clip(one.boxes, height=height, width=width)
            found.append(Detections(clipped, one.scores.clamp(0, 1), one.labels))
        return found

    def darknet_layers(self) -> list[nn.Module]:
        return [*self.backbone.children(), self.hidden, self.out]

    def darknet_outputs(self) -> list[tuple[nn.Module, int]]:
        return [(self.out, self.num_cells)]


class ConnectedHidden(nn.Sequential):
    """The paper's first connected layer (Sec. 2.1) and its dropout (Sec. 2.2)."""

    def __init__(
        self, channels: int, grid: tuple[int, int], *, features: int, dropout: float, width: float = 1.0
    ) -> None:
        linear = nn.Linear(channels * grid[0] * grid[1], scaled(features, width))
        nn.init.kaiming_normal_(linear.weight, a=LEAKY_SLOPE)
        nn.init.zeros_(linear.bias)
        super().__init__(nn.Flatten(), linear, ACTIVATIONS["leaky"](), nn.Dropout(dropout))
        self.features = linear.out_features


class LocalHidden(nn.Sequential):
    """What Darknet's yolov1.cfg has in its place: 3x3 without shared weights."""

    def __init__(
        self, channels: int, grid: tuple[int, int], *, features: int, dropout: float, width: float = 1.0
    ) -> None:
        outputs = scaled(features, width)
        local = LocallyConnected(channels, outputs, kernel=3, size=grid)
        super().__init__(local, ACTIVATIONS["leaky"](), nn.Dropout(dropout), nn.Flatten())
        self.features = outputs * grid[0] * grid[1]


class NoHidden(nn.Flatten):
    """The map as it is, as in Darknet's yolov1-tiny.cfg."""

    def __init__(self, channels: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.features = channels * grid[0] * grid[1]
