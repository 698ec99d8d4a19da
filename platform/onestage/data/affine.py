"""Images turned, sheared, scaled and moved in one warp."""

import math
from collections.abc import Sequence
from typing import cast

import cv2
import numpy as np
from numpy.typing import NDArray

from onestage.data.images import Pixels
from onestage.data.transforms import (
    BoxArray,
    OnCanvas,
    Sample,
    array_of,
    cut,
    factor,
    grey,
    image_of,
    pixels_of,
    uniform,
)

Matrix = NDArray[np.float64]
"""(2, 3): what it makes of (x, y, 1) in pixels is the place on the canvas."""


class RandomAffine(OnCanvas):
    """Turn by up to ``degrees`` either way and shear by up to ``shear`` degrees, in x and y, about the middle.

    The image is then scaled by a factor between the bounds of ``scale`` on its letterbox fit (drawn evenly in its
    logarithm) and moved from the middle of the canvas ``size`` [H, W] by up to ``translate`` of its sides. Elsewhere is
    ``fill`` (0 to 1). A box becomes the upright bounds of its four turned corners, so a large turn makes it loose;
    ``cut`` says which boxes stay, by the area of these bounds.
    """

    def __init__(
        self,
        *,
        size: Sequence[int],
        degrees: float = 10.0,
        shear: float = 2.0,
        scale: Sequence[float] = (0.5, 1.5),
        translate: float = 0.1,
        min_visible: float = 0.2,
        fill: float = 0.5,
    ) -> None:
        if not 0 < scale[0] <= scale[1]:
            raise ValueError(f"need 0 < scale[0] <= scale[1], got {list(scale)}")
        if not 0 <= shear < 45:
            raise ValueError(f"need 0 <= shear < 45 degrees, or both shears could lay an image flat, got {shear}")
        self.size = tuple(size)
        self.degrees = degrees
        self.shear = shear
        self.scale = tuple(scale)
        self.translate = translate
        self.min_visible = min_visible
        self.fill = fill

    def __call__(self, sample: Sample) -> Sample:
        pixels = pixels_of(sample["image"])
        matrix = self._draw(*pixels.shape[:2])
        image = image_of(warped(pixels, matrix, size=self.size, fill=self.fill))
        boxes = turned(array_of(sample["boxes"]), matrix)
        return {**cut(sample, boxes, size=self.size, min_visible=self.min_visible), "image": image}

    def _draw(self, height: int, width: int) -> Matrix:
        canvas_height, canvas_width = self.size
        shear = uniform(-self.shear, self.shear), uniform(-self.shear, self.shear)
        linear = turn_and_shear(degrees=uniform(-self.degrees, self.degrees), shear=shear)
        linear *= min(canvas_height / height, canvas_width / width) * factor(*self.scale)
        shift = uniform(-self.translate, self.translate), uniform(-self.translate, self.translate)
        middle = np.array([(0.5 + shift[0]) * canvas_width, (0.5 + shift[1]) * canvas_height])
        offset = middle - linear @ (width / 2, height / 2)
        return np.column_stack([linear, offset])


def turn_and_shear(*, degrees: float, shear: tuple[float, float]) -> Matrix:
    """(2, 2): shears in x, then in y, by ``shear`` degrees, then turns clockwise; in torchvision's order and signs."""
    angle, shear_x, shear_y = (math.radians(one) for one in (degrees, *shear))
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return turn @ [[1, 0], [-math.tan(shear_y), 1]] @ [[1, -math.tan(shear_x)], [0, 1]]


def turned(boxes: BoxArray, matrix: Matrix) -> BoxArray:
    """The upright bounds (G, 4) of what ``matrix`` makes of ``boxes`` (G, 4).

    >>> quarter = np.array([[0.0, -1.0, 10.0], [1.0, 0.0, 0.0]])
    >>> turned(np.array([[1.0, 2.0, 3.0, 8.0]], np.float32), quarter).tolist()
    [[2.0, 1.0, 8.0, 3.0]]
    """
    corners = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 4, 2) @ matrix[:, :2].T + matrix[:, 2]
    return np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1).astype(np.float32)


def warped(pixels: Pixels, matrix: Matrix, *, size: Sequence[int], fill: float) -> Pixels:
    """``pixels`` where ``matrix`` lays them on a canvas of ``size`` [H, W]."""
    # warpAffine reads four pixels for each one it writes: shrink by a whole factor first, or fine structure aliases.
    shrink = int(1 / np.linalg.norm(matrix[:, :2], axis=0).max())
    if shrink > 1:
        height, width = pixels.shape[:2]
        less = max(1, width // shrink), max(1, height // shrink)
        pixels = cast(Pixels, cv2.resize(pixels, less, interpolation=cv2.INTER_AREA))
        matrix = matrix @ np.diag([width / less[0], height / less[1], 1])
    # OpenCV counts from the centre of the first pixel, boxes from its corner: half a pixel apart, before and after.
    centred = matrix.copy()
    centred[:, 2] += matrix[:, :2] @ (0.5, 0.5) - 0.5
    border = (grey(fill),) * 3
    return cast(Pixels, cv2.warpAffine(pixels, centred, (size[1], size[0]), flags=cv2.INTER_LINEAR, borderValue=border))
