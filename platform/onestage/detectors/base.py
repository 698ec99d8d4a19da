"""What every one-stage detector has, whatever its paper.

B images, K classes, G boxes of one image; boxes in pixels of the network's input.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from onestage.errors import InputError
from onestage.types import Detections, Target


class OneStageDetector(nn.Module, ABC):
    """images -> output -> losses or detections.

    ``input_size`` is [H, W] of the images that data prepares, ``stride`` what both must be multiples of.
    With ``freeze_norm`` batch norm keeps its statistics, in training too: what small batches and fine-tuning want.
    """

    stride: int
    loss_parts: ClassVar[tuple[str, ...]] = ("box", "objectness", "class")
    """The names of what ``losses`` gives."""
    counts_over_ranks: ClassVar[bool] = False
    """Whether ``losses`` calls ``positives_per_image``, for which all ranks of a training meet, once a step."""

    def __init__(
        self,
        *,
        num_classes: int,
        width: float,
        input_size: Sequence[int],
        score_threshold: float,
        nms_iou: float,
        max_detections: int,
        freeze_norm: bool,
    ) -> None:
        super().__init__()
        for key, value in (("num_classes", num_classes), ("max_detections", max_detections)):
            if value < 1:
                raise InputError(f"detector.{key} must be at least 1, got {value}")
        check_shares(score_threshold=score_threshold, nms_iou=nms_iou)
        if width <= 0:
            raise InputError(f"detector.width must be above 0, got {width}")
        if len(input_size) != 2 or not all(isinstance(side, int) for side in input_size):
            raise InputError(f"detector.input_size must be [H, W] in whole pixels, got {list(input_size)}")
        self.num_classes = num_classes
        self.width = width
        self.input_size = list(input_size)
        self.score_threshold = score_threshold
        self.nms_iou = nms_iou
        self.max_detections = max_detections
        self.freeze_norm = freeze_norm
        self.mean_over_ranks: Callable[[Tensor], Tensor] = _identity
        """Averages counts over the ranks of a DDP training, which replaces this by its own."""

    @abstractmethod
    def forward(self, images: Tensor) -> Any:
        """The raw answer for images (B, 3, H, W), float RGB in [0, 1]."""

    @abstractmethod
    def losses(self, output: Any, targets: Sequence[Target]) -> dict[str, Tensor]:
        """The loss by part, scalars averaged over the images; the total is their sum."""

    @abstractmethod
    def detect(self, output: Any) -> list[Detections]:
        """What was found in each image, score falling."""

    def anchor_sizes(self) -> Tensor | None:
        """The different widths and heights (N, 2) of its anchors in pixels; None where it has none."""
        return None

    def check_size(self, height: int, width: int) -> None:
        """Raises InputError where the network cannot take an input of this size."""
        if height % self.stride or width % self.stride or min(height, width) < self.stride:
            raise InputError(
                f"{type(self).__name__} takes inputs whose height and width are multiples of {self.stride}, "
                f"got {height}x{width}: set detector.input_size"
            )

    def check_images(self, images: Tensor) -> None:
        """Raises InputError for anything but images (B, 3, H, W) of a size that the network can take."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise InputError(f"{type(self).__name__} takes RGB images of shape (B, 3, H, W), got {tuple(images.shape)}")
        self.check_size(images.shape[2], images.shape[3])

    def positives_per_image(self, num_positives: Tensor, num_images: int) -> Tensor:
        """Of one micro-batch, over all ranks: what SSD's losses are divided by, with the images of this rank."""
        images = torch.full_like(num_positives, num_images)
        positives, images = self.mean_over_ranks(torch.stack((num_positives, images)).float())
        mean: Tensor = positives.clamp(min=1e-6) / images
        return mean

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.freeze_norm:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self


def check_shares(**values: float) -> None:
    """Raises InputError for a key of the detector's config that is not from 0 to 1."""
    for key, value in values.items():
        if not 0 <= value <= 1:
            raise InputError(f"detector.{key} must be from 0 to 1, got {value}")


def _identity(count: Tensor) -> Tensor:
    return count


class DarknetDetector(OneStageDetector):
    """A detector that Darknet has, too: with its weights, and with its form of the loss beside the paper's.

    ``loss`` is "paper", or "darknet": a form whose gradient with respect to the raw maps is minus Darknet's delta.
    ``seen`` counts the images trained on, over all ranks.
    """

    def __init__(self, *, loss: Literal["paper", "darknet"], **common: Any) -> None:
        super().__init__(**common)
        if loss not in ("paper", "darknet"):
            raise InputError(f"detector.loss must be paper or darknet, got {loss}")
        self.loss = loss
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    @abstractmethod
    def raw_maps(self, images: Tensor) -> list[Tensor]:
        """The last layers' values before any activation, coarsest first, channels in Darknet's order."""

    @abstractmethod
    def from_raw_maps(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Any:
        """The rest of forward, for an input of ``size`` (H, W)."""

    @abstractmethod
    def darknet_layers(self) -> list[nn.Module]:
        """The layers that hold weights, in the order of the cfg and so of a ``.weights`` file."""

    @abstractmethod
    def darknet_outputs(self) -> list[tuple[nn.Module, int]]:
        """The layers that grow with the number of classes, and by how many outputs for each."""

    def forward(self, images: Tensor) -> Any:
        return self.from_raw_maps(self.raw_maps(images), (images.shape[2], images.shape[3]))

    def _start_from(self, weights: str | None) -> None:
        """The last thing at birth, when all layers are there."""
        if weights is not None:
            from onestage.weights import darknet

            darknet.load(self, weights)
        self.train()  # freeze_norm holds from birth


class Truths:
    """The targets of a batch as flat tensors, N boxes in all.

    ``image`` (N,) tells whose each box is; ``padded`` (B, G, 4) holds the boxes image by image, zeros (which overlap
    nothing) where an image has fewer than the batch's most.
    """

    def __init__(self, targets: Sequence[Target], *, num_images: int, num_classes: int, device: torch.device) -> None:
        if len(targets) != num_images:
            raise InputError(f"the output is of {num_images} images, but there are targets for {len(targets)}")
        counts = [len(target.labels) for target in targets]
        self.boxes = torch.cat([target.boxes for target in targets]).to(device, torch.float32)  # (N, 4)
        self.labels = torch.cat([target.labels for target in targets]).to(device, torch.int64)  # (N,)
        self.image = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(device)
        self.padded = self.boxes.new_zeros(len(counts), max(counts, default=0), 4)
        slot = torch.cat([torch.arange(count) for count in counts]).to(device)
        self.padded[self.image, slot] = self.boxes
        self._check(targets, num_classes)

    def _check(self, targets: Sequence[Target], num_classes: int) -> None:
        wrong = ~torch.isfinite(self.boxes).all(dim=1)
        if wrong.any():
            at = int(wrong.nonzero()[0])
            raise InputError(
                f"image {targets[int(self.image[at])].image_id} has a box that is not finite: {self.boxes[at].tolist()}"
            )
        wrong = (self.labels < 0) | (self.labels >= num_classes)
        if wrong.any():
            at = int(wrong.nonzero()[0])
            raise InputError(
                f"image {targets[int(self.image[at])].image_id} has label {int(self.labels[at])}, "
                f"outside 0 to {num_classes - 1}: detector.num_classes is {num_classes}"
            )
