"""Image and boxes together, from a decoded sample to the network's input.

The pixel work is OpenCV's, on the image's HWC view; transforms of torchvision v2 fit between ours. Every choice is
drawn from torch's global generator, which ``Augment`` seeds for each sample, so that a sample looks the same on
whatever rank or loader worker it is read, and after a resume. A mosaic's other images alone are of the rank's batch.
"""

import math
from collections.abc import Callable, Sequence
from copy import copy
from typing import Final, Protocol, Self, TypedDict, cast, runtime_checkable

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision import tv_tensors

from onestage.types import Placement

MIN_SIDE_PX: Final = 2.0
"""What is left of a cut box is no longer worth learning below this width or height."""

Pixels = NDArray[np.uint8]
"""An image (H, W, 3), RGB."""


class Sample(TypedDict):
    """One decoded image with its G boxes; ``image`` is a uint8 ``tv_tensors.Image`` (3, H, W), RGB.

    ``boxes`` are ``tv_tensors.BoundingBoxes`` (G, 4), pixels XYXY of the image as it is now; the others are (G,).
    """

    key: str
    image_id: int
    image: Tensor
    boxes: Tensor
    labels: Tensor
    crowd: Tensor
    difficult: Tensor
    placement: Placement


class OnCanvas:
    """A transform whose result has one ``size`` [H, W]."""

    size: tuple[int, ...]

    def at(self, size: Sequence[int]) -> Self:
        """The same transform for another canvas."""
        other = copy(self)
        other.size = tuple(size)
        return other


@runtime_checkable
class Mixing(Protocol):
    """A transform that composes a sample with ``others`` of its batch, which are as they were decoded."""

    def mix(self, sample: Sample, others: Sequence[Sample], *, epoch: int) -> Sample: ...


Transform = Callable[[Sample], Sample] | Mixing


def image_of(pixels: Pixels) -> Tensor:
    """``pixels`` as a ``tv_tensors.Image`` (3, H, W) over the same memory."""
    return cast(Tensor, tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1)))


def pixels_of(image: Tensor) -> Pixels:
    """An image (3, H, W) as OpenCV wants it, without a copy where it came from ``image_of``."""
    return np.ascontiguousarray(image.permute(1, 2, 0).numpy())


def boxes_of(boxes: Tensor, *, size: Sequence[int]) -> Tensor:
    """Boxes (G, 4) XYXY as ``tv_tensors.BoundingBoxes`` on a canvas of ``size`` [H, W]."""
    canvas = (size[0], size[1])
    wrapped = tv_tensors.BoundingBoxes(boxes, format=tv_tensors.BoundingBoxFormat.XYXY, canvas_size=canvas)
    return cast(Tensor, wrapped)


def placed(boxes: Tensor, placement: Placement, *, size: Sequence[int]) -> Tensor:
    """Boxes (G, 4) of an original image as they lie on the canvas of ``size`` [H, W]."""
    scale, offset = torch.tensor([placement.scale * 2, placement.offset * 2])
    return boxes_of(boxes.as_subclass(Tensor) * scale + offset, size=size)


def letterbox(pixels: Pixels, *, size: Sequence[int], fill: float = 0.5) -> tuple[Pixels, Placement]:
    """``pixels`` resized to fit ``size`` [H, W] with their aspect kept, centred on grey ``fill`` (0 to 1).

    >>> image, placement = letterbox(np.zeros((100, 200, 3), np.uint8), size=[100, 100])
    >>> image.shape, placement
    ((100, 100, 3), Placement(scale=(0.5, 0.5), offset=(0.0, 25.0)))
    """
    height, width = pixels.shape[:2]
    fit = min(size[0] / height, size[1] / width)
    new_width, new_height = max(1, round(width * fit)), max(1, round(height * fit))
    left, top = (size[1] - new_width) // 2, (size[0] - new_height) // 2
    canvas = np.full((size[0], size[1], 3), grey(fill), np.uint8)
    # Averaging over an area doesn't alias when shrinking, but leaves blocks when growing.
    how = cv2.INTER_AREA if fit < 1 else cv2.INTER_LINEAR
    canvas[top : top + new_height, left : left + new_width] = cv2.resize(
        pixels, (new_width, new_height), interpolation=how
    )
    return canvas, Placement(scale=(new_width / width, new_height / height), offset=(float(left), float(top)))


class Letterbox(OnCanvas):
    """``letterbox`` of a sample: nothing random, no box is lost, and its ``placement`` says where it lies."""

    def __init__(self, *, size: Sequence[int], fill: float = 0.5) -> None:
        self.size = tuple(size)
        self.fill = fill

    def __call__(self, sample: Sample) -> Sample:
        pixels, placement = letterbox(pixels_of(sample["image"]), size=self.size, fill=self.fill)
        boxes = placed(sample["boxes"], placement, size=self.size)
        return {**sample, "image": image_of(pixels), "boxes": boxes, "placement": placement}


class RandomPlacement(OnCanvas):
    """Put the image on the canvas at a random scale, aspect and place, in one warp (``warped`` says which boxes stay).

    ``size`` is the canvas [H, W]; ``scale`` bounds the factor on the letterbox fit, ``aspect`` that on width over
    height (1.25: from 0.8 to 1.25; 1: none), ``translate`` the shift from the centre as a share of the canvas. Factors
    are drawn evenly in their logarithm.
    """

    def __init__(
        self,
        *,
        size: Sequence[int],
        scale: Sequence[float] = (0.75, 1.33),
        aspect: float = 1.25,
        translate: float = 0.1,
        min_visible: float = 0.2,
        fill: float = 0.5,
    ) -> None:
        if not 0 < scale[0] <= scale[1]:
            raise ValueError(f"need 0 < scale[0] <= scale[1], got {list(scale)}")
        if aspect < 1:
            raise ValueError(f"need aspect >= 1, got {aspect}")
        self.size = tuple(size)
        self.scale = tuple(scale)
        self.aspect = aspect
        self.translate = translate
        self.min_visible = min_visible
        self.fill = fill

    def __call__(self, sample: Sample) -> Sample:
        placement = self._draw(*sample["image"].shape[-2:])
        return warped(sample, placement, size=self.size, min_visible=self.min_visible, fill=self.fill)

    def _draw(self, height: int, width: int) -> Placement:
        canvas_height, canvas_width = self.size
        scale = min(canvas_height / height, canvas_width / width) * factor(*self.scale)
        stretch = math.sqrt(factor(1 / self.aspect, self.aspect))
        scale_x, scale_y = scale * stretch, scale / stretch
        left = (canvas_width - width * scale_x) / 2 + uniform(-self.translate, self.translate) * canvas_width
        top = (canvas_height - height * scale_y) / 2 + uniform(-self.translate, self.translate) * canvas_height
        return Placement(scale=(scale_x, scale_y), offset=(left, top))


class HSVJitter:
    """Shift the hue by up to ``hue`` of the circle, multiply saturation and value by up to their factor or its inverse.

    The convention of Darknet's ``hue=.1 saturation=1.5 exposure=1.5``; 0, 1 and 1 change nothing.
    """

    def __init__(self, *, hue: float = 0.1, saturation: float = 1.5, value: float = 1.5) -> None:
        if saturation < 1 or value < 1:
            raise ValueError(f"need saturation >= 1 and value >= 1, got {saturation} and {value}")
        self.hue = hue
        self.saturation = saturation
        self.value = value

    def __call__(self, sample: Sample) -> Sample:
        pixels = recoloured(
            pixels_of(sample["image"]),
            hue=uniform(-self.hue, self.hue),
            saturation=factor(1 / self.saturation, self.saturation),
            value=factor(1 / self.value, self.value),
        )
        return {**sample, "image": image_of(pixels)}


class Augment:
    """Transforms one after the other, drawn from a seed of the sample's own; torch's generator is left as it was."""

    def __init__(self, *, transforms: Sequence[Transform]) -> None:
        self.transforms = list(transforms)

    def at(self, size: Sequence[int]) -> "Augment":
        """The same transforms for the canvas ``size`` [H, W]."""
        return Augment(transforms=[one.at(size) if isinstance(one, OnCanvas) else one for one in self.transforms])

    def __call__(self, sample: Sample, *, seed: int, epoch: int = 0, others: Sequence[Sample] = ()) -> Sample:
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would seed the GPUs' generators as well, which nothing here puts back.
            torch.default_generator.manual_seed(seed)
            for transform in self.transforms:
                if isinstance(transform, Mixing):
                    sample = transform.mix(sample, others, epoch=epoch)
                else:
                    sample = transform(sample)
        return sample


def warped(sample: Sample, placement: Placement, *, size: Sequence[int], min_visible: float, fill: float) -> Sample:
    """``sample`` drawn where ``placement`` says, on a canvas of ``size`` [H, W] that is ``fill`` (0 to 1) elsewhere.

    Boxes are clipped; those of which less than ``min_visible`` of the area or ``MIN_SIDE_PX`` of a side is left are
    dropped, with their labels.
    """
    pixels = _warp(pixels_of(sample["image"]), placement, size=size, fill=fill)
    boxes, visible = _clip(placed(sample["boxes"], placement, size=size), size=size, min_visible=min_visible)
    return {
        **sample,
        "image": image_of(pixels),
        "boxes": boxes_of(boxes[visible], size=size),
        "labels": sample["labels"][visible],
        "crowd": sample["crowd"][visible],
        "difficult": sample["difficult"][visible],
    }


def recoloured(pixels: Pixels, *, hue: float, saturation: float, value: float) -> Pixels:
    """``pixels`` with the hue turned by a share of the circle, and saturation and value multiplied."""
    levels = np.arange(256)
    table = np.stack(
        [
            # OpenCV's 8-bit hue runs from 0 to 179, in steps of two degrees.
            (levels + round(hue * 180)) % 180,
            np.clip(levels * saturation, 0, 255),
            np.clip(levels * value, 0, 255),
        ],
        axis=-1,
    ).astype(np.uint8)[None]
    return cast(Pixels, cv2.cvtColor(cv2.LUT(cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV), table), cv2.COLOR_HSV2RGB))


def _warp(pixels: Pixels, placement: Placement, *, size: Sequence[int], fill: float) -> Pixels:
    """``pixels`` drawn where ``placement`` says, on a canvas of ``size`` [H, W]."""
    (scale_x, scale_y), (left, top) = placement
    height, width = pixels.shape[:2]
    # warpAffine reads four pixels for each one it writes: shrink by whole factors first, or fine structure aliases.
    shrink = int(1 / max(scale_x, scale_y))
    if shrink > 1:
        less = max(1, width // shrink), max(1, height // shrink)
        pixels = cast(Pixels, cv2.resize(pixels, less, interpolation=cv2.INTER_AREA))
        scale_x, scale_y = scale_x * width / less[0], scale_y * height / less[1]
    # OpenCV counts from the centre of the first pixel, boxes from its corner: half a pixel apart, before and after.
    matrix = np.array([[scale_x, 0, left + (scale_x - 1) / 2], [0, scale_y, top + (scale_y - 1) / 2]])
    border = (grey(fill),) * 3
    return cast(Pixels, cv2.warpAffine(pixels, matrix, (size[1], size[0]), flags=cv2.INTER_LINEAR, borderValue=border))


def _clip(boxes: Tensor, *, size: Sequence[int], min_visible: float) -> tuple[Tensor, Tensor]:
    """Boxes (G, 4) clipped to the canvas, and which of them (G,) still show enough to be kept."""
    limit = torch.tensor([size[1], size[0], size[1], size[0]], dtype=torch.float32)
    whole = boxes.as_subclass(Tensor)
    clipped = whole.clamp(min=torch.zeros(4), max=limit)
    sides = clipped[:, 2:] - clipped[:, :2]
    area = (whole[:, 2:] - whole[:, :2]).prod(dim=1)
    return clipped, (sides >= MIN_SIDE_PX).all(dim=1) & (sides.prod(dim=1) >= min_visible * area)


def uniform(low: float, high: float) -> float:
    """A number drawn evenly between ``low`` and ``high``."""
    return low + (high - low) * torch.rand(()).item()


def factor(low: float, high: float) -> float:
    """A number drawn evenly in its logarithm between ``low`` and ``high``."""
    return math.exp(uniform(math.log(low), math.log(high)))


def grey(fill: float) -> int:
    """The level of 0 to 255 nearest to ``fill`` of 0 to 1."""
    return round(fill * 255)
