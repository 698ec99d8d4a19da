"""Anchors of several sides and ratios at every cell of a feature pyramid (arXiv:1708.02002, Sec. 4)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from onestage.anchors.grid import cells
from onestage.types import XYXY


class PyramidAnchors:
    """``sides`` are the roots of the anchors' areas in pixels, for each level, ``ratios`` their height over width.

    Corners are rounded to whole pixels and cells start at the image's corner, both as in torchvision. A level's stride
    is the image's size over the map's, rounded down: where a map's size was rounded up, that is not a power of two.
    """

    def __init__(self, *, sides: Sequence[Sequence[float]], ratios: Sequence[float]) -> None:
        if len({len(level) for level in sides}) != 1:
            raise ValueError(f"detector.anchors.sides must have as many on each level, got {sides}")
        self.num_anchors = len(sides[0]) * len(ratios)
        self.shapes = [_around_origin(level, ratios) for level in sides]

    def __call__(
        self, levels: Sequence[tuple[int, int]], size: tuple[int, int], *, device: torch.device | str = "cpu"
    ) -> list[XYXY]:
        """For maps of (h, w) cells over an image of ``size`` (H, W), as (h * w * num_anchors, 4) a level.

        In the order in which a head's map is flattened, (h, w, A): ratio by ratio, side by side within a cell.

        >>> anchors = PyramidAnchors(sides=[[32]], ratios=[0.25, 1.0])([(1, 2)], (16, 32))
        >>> anchors[0].tolist()
        [[-32.0, -8.0, 32.0, 8.0], [-16.0, -16.0, 16.0, 16.0], [-16.0, -8.0, 48.0, 8.0], [0.0, -16.0, 32.0, 16.0]]
        """
        anchors = []
        for (height, width), shapes in zip(levels, self.shapes, strict=True):
            stride = torch.tensor([size[1] // width, size[0] // height], device=device)
            corners = (cells(height, width, device=device) * stride).repeat(1, 1, 2)  # (h, w, 4)
            anchors.append(XYXY((corners[:, :, None] + shapes.to(device)).view(-1, 4)))
        return anchors


def _around_origin(sides: Sequence[float], ratios: Sequence[float]) -> Tensor:
    """One anchor (len(ratios) * len(sides), 4) of each ratio and side, centred at the origin."""
    roots = torch.tensor(ratios, dtype=torch.float32).sqrt()[:, None]
    heights, widths = roots * torch.tensor(sides, dtype=torch.float32), 1 / roots * torch.tensor(sides)
    half = torch.stack((widths, heights), dim=-1).view(-1, 2) / 2
    return torch.cat((-half, half), dim=1).round()
