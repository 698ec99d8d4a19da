"""Boxes on images, for people. Images are (H, W, 3) uint8 RGB arrays."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import cv2
import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Colour = tuple[int, int, int]
"""RGB."""

# Okabe and Ito's palette: told apart by colour-blind people too.
COLOURS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167))


def draw(
    image: np.ndarray, boxes: "Tensor", labels: "Tensor", *, classes: Sequence[str], scores: "Tensor | None" = None
) -> np.ndarray:
    """A copy of ``image``, at most 640 pixels a side, with boxes (N, 4) in pixels, class names and scores if given."""
    names = [classes[label] for label in labels.tolist()]
    if scores is not None:
        names = [f"{name} {score:.2f}" for name, score in zip(names, scores.tolist(), strict=True)]
    colours = [COLOURS[label % len(COLOURS)] for label in labels.tolist()]
    return annotate(image, boxes.tolist(), texts=names, colours=colours)


def annotate(
    image: np.ndarray, boxes: Sequence[Sequence[float]], *, texts: Sequence[str], colours: Sequence[Colour]
) -> np.ndarray:
    """A copy of ``image``, at most 640 pixels a side, with boxes (N, 4) in pixels, each with its text (maybe none)."""
    scale = min(640 / image.shape[1], 640 / image.shape[0])
    scale = scale if scale < 1 else max(1, int(min(scale, 3)))
    canvas = np.ascontiguousarray(cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA))
    corners = [[round(value * scale) for value in box] for box in boxes]
    for (left, top, right, bottom), colour in zip(corners, colours, strict=True):
        cv2.rectangle(canvas, (left, top), (right, bottom), colour, 2)
    for (left, top, _, _), text, colour in zip(corners, texts, colours, strict=True):  # over every edge
        if not text:
            continue
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
