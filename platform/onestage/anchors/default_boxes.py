"""SSD's default boxes (arXiv:1512.02325, Sec. 2.2, "Choosing scales and aspect ratios for default boxes")."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from onestage.anchors.grid import cells
from onestage.types import XYXY


class DefaultBoxes:
    """Boxes of several shapes around the centre of each cell of each level, finest level first.

    ``scales`` are sides of squares as fractions of the input, one a level and one more: a level has a square of its
    scale, one of the geometric mean with the next scale, and for each of its ``aspect_ratios`` a wide and a tall box
    of its scale's area. ``steps`` are the pixels from cell to cell. No side is longer than the input's.
    """

    def __init__(
        self, *, scales: Sequence[float], aspect_ratios: Sequence[Sequence[float]], steps: Sequence[float]
    ) -> None:
        levels = len(steps)
        if len(aspect_ratios) != levels or len(scales) != levels + 1:
            raise ValueError(
                f"detector.anchors needs for its {levels} steps as many aspect_ratios and one scale more, "
                f"got {len(aspect_ratios)} and {len(scales)}"
            )
        self.steps = tuple(steps)
        self.sides = [
            torch.tensor(_sides(scale, following, ratios)).clamp(max=1)  # (boxes a cell, 2): width, height
            for scale, following, ratios in zip(scales, scales[1:], aspect_ratios, strict=False)
        ]
        self.per_cell = tuple(len(sides) for sides in self.sides)

    def __call__(self, shapes: Sequence[tuple[int, int]], *, height: int, width: int) -> XYXY:
        """The boxes (A, 4) of levels of the given (h, w), in pixels of an input of ``height`` and ``width``.

        They lie row by row, cell by cell, the boxes of a cell side by side; those near the border reach over it.
        """
        size = torch.tensor([width, height])
        levels = []
        for (rows, columns), step, sides in zip(shapes, self.steps, self.sides, strict=True):
            centres = (cells(rows, columns) + 0.5) / torch.tensor([width / step, height / step])
            centres = centres.view(-1, 1, 2)  # (cells, 1, 2)
            corners = torch.cat(((centres - 0.5 * sides) * size, (centres + 0.5 * sides) * size), dim=-1)
            levels.append(corners.flatten(0, 1))
        boxes: Tensor = torch.cat(levels)
        return XYXY(boxes)


def _sides(scale: float, following: float, ratios: Sequence[float]) -> list[list[float]]:
    between = math.sqrt(scale * following)
    sides = [[scale, scale], [between, between]]
    for ratio in ratios:
        long, short = scale * math.sqrt(ratio), scale / math.sqrt(ratio)
        sides += [[long, short], [short, long]]
    return sides
