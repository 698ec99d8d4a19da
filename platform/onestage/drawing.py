"""Boxes on images, for people. Images are (H, W, 3) uint8 RGB arrays."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import cv2
import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

# Okabe and Ito's palette: told apart by colour-blind people too.
COLOURS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167))


def draw(
    image: np.ndarray, boxes: "Tensor", labels: "Tensor", *, classes: Sequence[str], scores: "Tensor | None" = None
) -> np.ndarray:
    """A copy of ``image``, at most 640 pixels a side, with boxes (N, 4) in pixels, class names and scores if given."""
    scale = min(640 / image.shape[1], 640 / image.shape[0])
    scale = scale if scale < 1 else max(1, int(min(scale, 3)))
    canvas = np.ascontiguousarray(cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA))
    for number, (box, label) in enumerate(zip(boxes.tolist(), labels.tolist(), strict=True)):
        left, top, right, bottom = (round(value * scale) for value in box)
        colour = COLOURS[label % len(COLOURS)]
        cv2.rectangle(canvas, (left, top), (right, bottom), colour, 2)
        text = classes[label] if scores is None else f"{classes[label]} {float(scores[number]):.2f}"
        (width, height), base = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.4, 1)
        left = min(max(left, 0), max(canvas.shape[1] - width, 0))
        top = max(top, height + base)
        cv2.rectangle(canvas, (left, top - height - base), (left + width, top), colour, -1)
        cv2.putText(canvas, text, (left, top - base), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
    return canvas


def side_by_side(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Two pictures of one height, with a white line between them."""
    line = np.full((left.shape[0], 4, 3), 255, np.uint8)
    return np.concatenate((left, line, right), axis=1)
