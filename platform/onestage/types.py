"""The values that pass between the rooms.

B images, G boxes of one image, D detections of one image. Boxes are pixels XYXY, labels 0 to K-1, no background.
"""

import typing
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, NamedTuple, NewType

import torch
from torch import Tensor

if not TYPE_CHECKING:

    class NewType(typing.NewType):
        """torch.compile cannot trace the call of the library's own, which is written in C."""

        def __call__(self, boxes: Tensor) -> Tensor:
            return boxes


MAX_LOGGED_CLASSES: Final = 20
"""Up to so many classes each has a metric of its own in MLflow; the tables of an evaluation have them all."""

XYXY = NewType("XYXY", Tensor)
"""Boxes (..., 4) as left, top, right, bottom."""
CXCYWH = NewType("CXCYWH", Tensor)
"""Boxes (..., 4) as centre x, centre y, width, height."""
Deltas = NewType("Deltas", Tensor)
"""Boxes (..., 4) as a coder writes them, relative to their anchors."""


class Placement(NamedTuple):
    """Where an image lies in the network's input: ``input = original * scale + offset``, for x and y, in pixels."""

    scale: tuple[float, float] = (1.0, 1.0)
    offset: tuple[float, float] = (0.0, 0.0)

    def to_original(self, boxes: XYXY) -> XYXY:
        """Boxes (N, 4) in input pixels as boxes in the original image's pixels.

        >>> Placement(scale=(0.5, 0.5), offset=(10.0, 0.0)).to_original(XYXY(torch.tensor([[10.0, 0, 20, 5]]))).tolist()
        [[0.0, 0.0, 20.0, 10.0]]
        """
        scale = boxes.new_tensor([*self.scale, *self.scale])
        offset = boxes.new_tensor([*self.offset, *self.offset])
        return XYXY((boxes - offset) / scale)


AS_IT_IS = Placement()


@dataclass(frozen=True, slots=True)
class Target:
    """The truth about one image.

    ``boxes`` (G, 4) in input pixels, ``labels`` (G,) int64, ``crowd`` and ``difficult`` (G,) bool (no box by default).
    """

    boxes: XYXY
    labels: Tensor
    image_id: int
    placement: Placement = AS_IT_IS
    crowd: Tensor | None = None
    difficult: Tensor | None = None

    def to(self, device: torch.device | str) -> "Target":
        """The same target with its tensors on ``device``."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return replace(
            self,
            boxes=XYXY(moved(self.boxes)),
            labels=moved(self.labels),
            crowd=None if self.crowd is None else moved(self.crowd),
            difficult=None if self.difficult is None else moved(self.difficult),
        )


@dataclass(frozen=True, slots=True)
class Detections:
    """Found in one image: ``boxes`` (D, 4) in input pixels, ``scores`` (D,) falling, ``labels`` (D,)."""

    boxes: XYXY
    scores: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.scores)


class Skipped(NamedTuple):
    """An image that could not be had, and why: its step went on without it."""

    key: str
    why: str


class Part(NamedTuple):
    """Which of a step's micro-batches a batch is, from 0, and ``of`` how many: gradients add up until the last."""

    number: int = 0
    of: int = 1


WHOLE = Part()


@dataclass(frozen=True, slots=True)
class Batch:
    """One rank's share of a step, or ``part`` of that share, a micro-batch.

    ``images`` (B, 3, H, W), uint8 or float in [0, 1], RGB; ``global_images`` counts the images of the whole step over
    all ranks, so that a short last batch is weighted by what it holds (0: this batch is the whole step). ``skipped``
    images are counted there, but not among this rank's B. ``colour`` (B, 3), where it is there, are the changes of
    colour that are left to the training device. Every rank takes as many parts of a step; any may be empty.
    """

    images: Tensor
    targets: Sequence[Target]
    keys: Sequence[str]
    global_images: int = field(default=0)
    skipped: Sequence[Skipped] = ()
    colour: Tensor | None = None
    part: Part = WHOLE

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def ends_step(self) -> bool:
        """Whether the optimizer steps behind this one."""
        return self.part.number + 1 == self.part.of

    def step_images(self, world_size: int) -> int:
        """The images of the whole step, over all ranks."""
        return self.global_images or len(self) * world_size

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with its tensors on ``device``; Lightning moves batches with this."""
        images = self.images.to(device, non_blocking=True)
        colour = None if self.colour is None else self.colour.to(device, non_blocking=True)
        return replace(self, images=images, colour=colour, targets=[target.to(device) for target in self.targets])

    def pin_memory(self) -> "Batch":
        """The same batch in memory that a GPU copies from while it computes; DataLoader asks for it by this name."""
        colour = None if self.colour is None else self.colour.pin_memory()
        return replace(self, images=self.images.pin_memory(), colour=colour)
