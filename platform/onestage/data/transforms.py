"""Image and boxes together, from a decoded sample to the network's input.

The pixel work is OpenCV's, on the image's HWC view; transforms of torchvision v2 fit between ours. Every choice is
drawn from torch's global generator, which ``Augment`` seeds for each sample, so that a sample looks the same on
whatever rank or loader worker it is read, and after a resume. What a sample is mixed with alone is of the rank's batch.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from copy import copy
from itertools import pairwise
from typing import Final, NamedTuple, NotRequired, Self, TypedDict, cast

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torchvision import tv_tensors

from onestage.data.images import Pixels
from onestage.types import Placement

MIN_SIDE_PX: Final = 2.0
"""What is left of a cut box is no longer worth learning below this width or height."""


BoxArray = NDArray[np.float32]
"""Boxes (G, 4), pixels XYXY."""


class Sample(TypedDict):
    """One decoded image with its G boxes; ``image`` is a uint8 ``tv_tensors.Image`` (3, H, W), RGB.

    ``boxes`` are ``tv_tensors.BoundingBoxes`` (G, 4), pixels XYXY of the image as it is now; the others are (G,).
    ``colour`` (3,) is a change of colour that is drawn, but left to the training device (see ``HSVJitter``).
    """

    key: str
    image_id: int
    image: Tensor
    boxes: Tensor
    labels: Tensor
    crowd: Tensor
    difficult: Tensor
    placement: Placement
    colour: NotRequired[Tensor]


class OnCanvas:
    """A transform whose result has one ``size`` [H, W]."""

    size: tuple[int, ...]

    def at(self, size: Sequence[int]) -> Self:
        """The same transform for another canvas."""
        other = copy(self)
        other.size = tuple(size)
        return other


class Mixing(ABC):
    """A transform that composes a sample with ``others`` of its batch, which are as they were decoded."""

    @abstractmethod
    def mix(self, sample: Sample, others: Sequence[Sample], *, epoch: int) -> Sample:
        """The composed sample."""


Transform = Callable[[Sample], Sample] | Mixing


def mixing_ends(*, num_epochs: int, plain_epochs: int) -> float:
    """The first of the last ``plain_epochs`` of ``num_epochs`` (-1: not known), in which nothing is mixed any more.

    >>> mixing_ends(num_epochs=300, plain_epochs=15), mixing_ends(num_epochs=-1, plain_epochs=0)
    (285, inf)
    """
    if plain_epochs < 0:
        raise ValueError(f"need plain_epochs >= 0, got {plain_epochs}")
    if plain_epochs > 0 > num_epochs:
        raise ValueError(f"plain_epochs={plain_epochs} needs an end to count from: set trainer.max_epochs")
    return num_epochs - plain_epochs if num_epochs > 0 else math.inf


def image_of(pixels: Pixels) -> Tensor:
    """``pixels`` as a ``tv_tensors.Image`` (3, H, W) over the same memory."""
    return cast(Tensor, tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1)))


def pixels_of(image: Tensor) -> Pixels:
    """An image (3, H, W) as OpenCV wants it, without a copy where it came from ``image_of``."""
    return np.ascontiguousarray(image.as_subclass(Tensor).permute(1, 2, 0).numpy())


def boxes_of(boxes: Tensor | BoxArray, *, size: Sequence[int]) -> Tensor:
    """Boxes (G, 4) XYXY as ``tv_tensors.BoundingBoxes`` on a canvas of ``size`` [H, W]."""
    canvas, xyxy = (size[0], size[1]), tv_tensors.BoundingBoxFormat.XYXY
    return cast(Tensor, tv_tensors.BoundingBoxes(torch.as_tensor(boxes), format=xyxy, canvas_size=canvas))


def array_of(boxes: Tensor) -> BoxArray:
    """Boxes (G, 4) for arithmetic: between two images torch's calls are out of the caches, and take far longer."""
    return cast(BoxArray, boxes.as_subclass(Tensor).numpy())


def placed(boxes: BoxArray, placement: Placement) -> BoxArray:
    """Boxes (G, 4) of an original image as they lie on the canvas."""
    return boxes * np.array(placement.scale * 2, np.float32) + np.array(placement.offset * 2, np.float32)


def resized(pixels: Pixels, *, size: Sequence[int]) -> Pixels:
    """``pixels`` at ``size`` [H, W]: the same for training, evaluation and prediction.

    Down to half the size plain bilinear reads every pixel; below it would skip some, so there it is antialiased.
    """
    if pixels.shape[0] > 2 * size[0] or pixels.shape[1] > 2 * size[1]:
        batch = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        # OpenCV's own, INTER_AREA, takes four times as long.
        (planes,) = functional.interpolate(batch, size=tuple(size), mode="bilinear", antialias=True).numpy()
        return cast(Pixels, cv2.merge(list(planes)))
    return cast(Pixels, cv2.resize(pixels, (size[1], size[0]), interpolation=cv2.INTER_LINEAR))


def letterboxed(height: float, width: float, *, size: Sequence[int]) -> tuple[int, int]:
    """Height and width, in whole pixels, of an image that is fitted to ``size`` [H, W] with its aspect kept.

    >>> letterboxed(100, 200, size=[416, 416])
    (208, 416)
    """
    fit = min(size[0] / height, size[1] / width)
    return max(1, round(height * fit)), max(1, round(width * fit))


def letterbox(pixels: Pixels, *, size: Sequence[int], fill: float = 0.5) -> tuple[Pixels, Placement]:
    """``pixels`` resized to fit ``size`` [H, W] with their aspect kept, centred on grey ``fill`` (0 to 1).

    >>> image, placement = letterbox(np.zeros((100, 200, 3), np.uint8), size=[100, 100])
    >>> image.shape, placement
    ((100, 100, 3), Placement(scale=(0.5, 0.5), offset=(0.0, 25.0)))
    """
    height, width = pixels.shape[:2]
    new_height, new_width = letterboxed(height, width, size=size)
    left, top = (size[1] - new_width) // 2, (size[0] - new_height) // 2
    canvas = np.full((size[0], size[1], 3), grey(fill), np.uint8)
    canvas[top : top + new_height, left : left + new_width] = resized(pixels, size=(new_height, new_width))
    return canvas, Placement(scale=(new_width / width, new_height / height), offset=(float(left), float(top)))


def stretch(pixels: Pixels, *, size: Sequence[int]) -> tuple[Pixels, Placement]:
    """``pixels`` resized to ``size`` [H, W], whatever that does to their aspect.

    >>> stretch(np.zeros((100, 200, 3), np.uint8), size=[100, 100])[1]
    Placement(scale=(0.5, 1.0), offset=(0.0, 0.0))
    """
    height, width = pixels.shape[:2]
    return resized(pixels, size=size), Placement(scale=(size[1] / width, size[0] / height))


class Letterbox(OnCanvas):
    """``letterbox`` of a sample: nothing random, no box is lost, and its ``placement`` says where it lies."""

    def __init__(self, *, size: Sequence[int], fill: float = 0.5) -> None:
        self.size = tuple(size)
        self.fill = fill

    def __call__(self, sample: Sample) -> Sample:
        return _fitted(sample, *letterbox(pixels_of(sample["image"]), size=self.size, fill=self.fill))


class Resize(OnCanvas):
    """``stretch`` of a sample: nothing random, no box is lost, and its ``placement`` says how it was stretched."""

    def __init__(self, *, size: Sequence[int]) -> None:
        self.size = tuple(size)

    def __call__(self, sample: Sample) -> Sample:
        return _fitted(sample, *stretch(pixels_of(sample["image"]), size=self.size))


class Fit(NamedTuple):
    """One way to bring whole images to one size: of pixels alone, and of samples."""

    place: Callable[..., tuple[Pixels, Placement]]
    transform: Callable[..., Letterbox | Resize]


_FITS: Final = {"letterbox": Fit(letterbox, Letterbox), "stretch": Fit(stretch, Resize)}


def fit_of(name: str) -> Fit:
    """``data.fit``: "letterbox" keeps the aspect and leaves bars, "stretch" fills all of the input."""
    if name not in _FITS:
        raise ValueError(f"need data.fit to be one of {', '.join(_FITS)}, got {name!r}")
    return _FITS[name]


class RandomPlacement(OnCanvas):
    """Put the image on the canvas at a random scale, aspect and place (``painted`` says which boxes stay).

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
        return painted(sample, placement, size=self.size, min_visible=self.min_visible, fill=self.fill)

    def _draw(self, height: int, width: int) -> Placement:
        canvas_height, canvas_width = self.size
        scale = min(canvas_height / height, canvas_width / width) * factor(*self.scale)
        stretch = math.sqrt(factor(1 / self.aspect, self.aspect))
        scale_x, scale_y = scale * stretch, scale / stretch
        left = (canvas_width - width * scale_x) / 2 + uniform(-self.translate, self.translate) * canvas_width
        top = (canvas_height - height * scale_y) / 2 + uniform(-self.translate, self.translate) * canvas_height
        return Placement(scale=(scale_x, scale_y), offset=(left, top))


class HorizontalFlip:
    """Mirror left and right with probability ``p``: as torchvision's, in a third of the time."""

    def __init__(self, *, p: float = 0.5) -> None:
        self.p = p

    def __call__(self, sample: Sample) -> Sample:
        if uniform(0, 1) >= self.p:
            return sample
        pixels = cast(Pixels, cv2.flip(pixels_of(sample["image"]), 1))
        height, width = pixels.shape[:2]
        boxes = array_of(sample["boxes"]).copy()
        boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
        return {**sample, "image": image_of(pixels), "boxes": boxes_of(boxes, size=(height, width))}


class HSVJitter:
    """Shift the hue by up to ``hue`` of the circle, multiply saturation and value by up to their factor or its inverse.

    The convention of Darknet's ``hue=.1 saturation=1.5 exposure=1.5``; 0, 1 and 1 change nothing. With ``on_device``
    the factors are drawn here, from the same numbers, but left as ``colour`` for the device that trains, which changes
    the whole batch at once (``onestage.data.colour.recoloured_batch``): it must be the last transform then.
    """

    def __init__(
        self, *, hue: float = 0.1, saturation: float = 1.5, value: float = 1.5, on_device: bool = False
    ) -> None:
        if saturation < 1 or value < 1:
            raise ValueError(f"need saturation >= 1 and value >= 1, got {saturation} and {value}")
        self.hue = hue
        self.saturation = saturation
        self.value = value
        self.on_device = on_device

    def __call__(self, sample: Sample) -> Sample:
        hue = uniform(-self.hue, self.hue)
        saturation = factor(1 / self.saturation, self.saturation)
        value = factor(1 / self.value, self.value)
        if self.on_device:
            return {**sample, "colour": torch.tensor([hue, saturation, value])}
        pixels = recoloured(pixels_of(sample["image"]), hue=hue, saturation=saturation, value=value)
        return {**sample, "image": image_of(pixels)}


class Augment:
    """Transforms one after the other, drawn from a seed of the sample's own; torch's generator is left as it was."""

    def __init__(self, *, transforms: Sequence[Transform]) -> None:
        self.transforms = list(transforms)
        for one, after in pairwise(self.transforms):
            if getattr(one, "on_device", False):
                name, other = type(one).__name__, type(after).__name__
                raise ValueError(f"need {name} with on_device=true to be the last transform, got {other} after it")

    @property
    def mixes(self) -> bool:
        """Whether it needs the batch's other samples."""
        return any(isinstance(one, Mixing) for one in self.transforms)

    def at(self, size: Sequence[int]) -> "Augment":
        """The same transforms for the canvas ``size`` [H, W]."""
        return Augment(transforms=[one.at(size) if isinstance(one, OnCanvas) else one for one in self.transforms])

    def __call__(self, sample: Sample, *, seed: int, epoch: int = 0, others: Sequence[Sample] = ()) -> Sample:
        # torch.manual_seed would seed the GPUs' generators as well, which nothing here puts back.
        generator = torch.default_generator
        before = generator.get_state()
        generator.manual_seed(seed)
        try:
            for transform in self.transforms:
                if isinstance(transform, Mixing):
                    sample = transform.mix(sample, others, epoch=epoch)
                else:
                    sample = transform(sample)
        finally:
            generator.set_state(before)
        return sample


def painted(sample: Sample, placement: Placement, *, size: Sequence[int], min_visible: float, fill: float) -> Sample:
    """``sample`` where ``placement`` says, to a pixel, on a canvas of ``size`` [H, W]; elsewhere is ``fill`` (0 to 1).

    Whole pixels of the image come to lie on whole pixels of the canvas: to resize takes a third of the time that a warp
    takes. Boxes are exact all the same, and cut as ``cut`` says.
    """
    pixels = pixels_of(sample["image"])
    height, width = pixels.shape[:2]
    canvas = np.full((size[0], size[1], 3), grey(fill), np.uint8)
    across = _seen(placement.scale[0], placement.offset[0], length=width, canvas=size[1])
    down = _seen(placement.scale[1], placement.offset[1], length=height, canvas=size[0])
    if across and down:
        (left, right, to_left, to_right), (top, bottom, to_top, to_bottom) = across, down
        seen = resized(pixels[top:bottom, left:right], size=(to_bottom - to_top, to_right - to_left))
        canvas[to_top:to_bottom, to_left:to_right] = seen
        scale = (to_right - to_left) / (right - left), (to_bottom - to_top) / (bottom - top)
        placement = Placement(scale=scale, offset=(to_left - left * scale[0], to_top - top * scale[1]))
    boxes = placed(array_of(sample["boxes"]), placement)
    return {**cut(sample, boxes, size=size, min_visible=min_visible), "image": image_of(canvas)}


def cut(sample: Sample, boxes: BoxArray, *, size: Sequence[int], min_visible: float) -> Sample:
    """``sample`` with ``boxes`` (G, 4), which may lie beyond the canvas of ``size`` [H, W], in place of its own.

    They are clipped; those of which less than ``min_visible`` of the area or ``MIN_SIDE_PX`` of a side is left are
    dropped, with their labels.
    """
    limit = np.array([size[1], size[0], size[1], size[0]], np.float32)
    clipped = np.minimum(np.maximum(boxes, 0), limit)
    width, height = (clipped[:, 2:] - clipped[:, :2]).T
    full_width, full_height = (boxes[:, 2:] - boxes[:, :2]).T
    visible = (width >= MIN_SIDE_PX) & (height >= MIN_SIDE_PX)
    visible &= width * height >= min_visible * full_width * full_height
    sample = {**sample, "boxes": boxes_of(clipped[visible], size=size)}
    return sample if visible.all() else chosen(sample, torch.from_numpy(visible))


def chosen(sample: Sample, which: Tensor) -> Sample:
    """``sample`` with the labels and flags of some boxes only; ``which`` (G,) is a mask."""
    return {
        **sample,
        "labels": sample["labels"][which],
        "crowd": sample["crowd"][which],
        "difficult": sample["difficult"][which],
    }


def recoloured(pixels: Pixels, *, hue: float, saturation: float, value: float) -> Pixels:
    """``pixels`` with the hue turned by a share of the circle, and saturation and value multiplied."""
    planes = cv2.split(cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV_FULL))
    planes[0][:] += np.uint8(round(hue * 256) % 256)  # 256 levels are the circle: what overflows begins it anew
    for plane, by in zip(planes[1:], (saturation, value), strict=True):
        cv2.convertScaleAbs(plane, dst=plane, alpha=by)  # faster than a table
    return cast(Pixels, cv2.cvtColor(cv2.merge(planes), cv2.COLOR_HSV2RGB_FULL))


def _fitted(sample: Sample, pixels: Pixels, placement: Placement) -> Sample:
    boxes = boxes_of(placed(array_of(sample["boxes"]), placement), size=pixels.shape[:2])
    return {**sample, "image": image_of(pixels), "boxes": boxes, "placement": placement}


def _seen(scale: float, offset: float, *, length: int, canvas: int) -> tuple[int, int, int, int] | None:
    """From where to where an image is seen along one side, in whole pixels of its own, and where on the canvas.

    None where that is less than half a pixel of the canvas.
    """
    first, last = max(0, round(offset)), min(canvas, round(offset + length * scale))
    if first >= last:
        return None
    # The image's own edges are kept: only where the canvas cuts it, the cut moves to the nearest pixel.
    start = 0 if offset >= 0 else min(round(-offset / scale), length - 1)
    end = length if offset + length * scale <= canvas else round((canvas - offset) / scale)
    return start, min(max(end, start + 1), length), first, last


def uniform(low: float, high: float) -> float:
    """A number drawn evenly between ``low`` and ``high``."""
    return low + (high - low) * torch.rand(()).item()


def factor(low: float, high: float) -> float:
    """A number drawn evenly in its logarithm between ``low`` and ``high``."""
    return math.exp(uniform(math.log(low), math.log(high)))


def grey(fill: float) -> int:
    """The level of 0 to 255 nearest to ``fill`` of 0 to 1."""
    return round(fill * 255)
