"""Four images in one: YOLOv4's mosaic."""

from collections.abc import Sequence

import numpy as np
import torch

from onestage.data.transforms import (
    Mixing,
    OnCanvas,
    Sample,
    boxes_of,
    factor,
    image_of,
    mixing_ends,
    painted,
    pixels_of,
    uniform,
)
from onestage.types import Placement


class Mosaic(OnCanvas, Mixing):
    """YOLOv4, arXiv:2004.10934 Sec. 3.3: with ``probability``, the sample and three others of its batch as four tiles.

    The tiles meet at a random point that leaves each at least ``min_share`` of the canvas's width and height. A tile
    shows a random window of its image, which covers it with its aspect kept, at up to ``zoom`` times the least scale
    for that. Boxes are cut to their tile, and stay with ``min_visible`` of their area. A batch of fewer than four
    images repeats them. Off in the last ``plain_epochs`` of ``num_epochs``, which must be known for that (-1: not).
    """

    def __init__(
        self,
        *,
        size: Sequence[int],
        probability: float = 0.5,
        min_share: float = 0.2,
        zoom: float = 1.5,
        min_visible: float = 0.2,
        num_epochs: int = -1,
        plain_epochs: int = 0,
    ) -> None:
        if not 0 < min_share <= 0.5:
            raise ValueError(f"need 0 < min_share <= 0.5, got {min_share}")
        if zoom < 1:
            raise ValueError(f"need zoom >= 1, got {zoom}")
        self.size = tuple(size)
        self.probability = probability
        self.min_share = min_share
        self.zoom = zoom
        self.min_visible = min_visible
        self.end = mixing_ends(num_epochs=num_epochs, plain_epochs=plain_epochs)

    def mix(self, sample: Sample, others: Sequence[Sample], *, epoch: int) -> Sample:
        if epoch >= self.end or uniform(0, 1) >= self.probability:
            return sample
        return self._composed(sample, self._four(sample, others))

    def _four(self, sample: Sample, others: Sequence[Sample]) -> list[Sample]:
        """The sample and three others in random places, none twice as long as there are enough."""
        order = torch.randperm(len(others)).tolist() or [0]
        four = [sample, *((others or [sample])[order[place % len(order)]] for place in range(3))]
        return [four[place] for place in torch.randperm(4).tolist()]

    def _composed(self, sample: Sample, four: Sequence[Sample]) -> Sample:
        height, width = self.size
        cut_y, cut_x = (round(uniform(self.min_share, 1 - self.min_share) * side) for side in self.size)
        corners = [(left, top) for top in (0, cut_y) for left in (0, cut_x)]
        sizes = [(h, w) for h in (cut_y, height - cut_y) for w in (cut_x, width - cut_x)]
        tiles = [self._tile(one, size=size) for one, size in zip(four, sizes, strict=True)]
        canvas = np.empty((height, width, 3), np.uint8)
        boxes = []
        for tile, (h, w), (left, top) in zip(tiles, sizes, corners, strict=True):
            canvas[top : top + h, left : left + w] = pixels_of(tile["image"])
            boxes.append(tile["boxes"].as_subclass(torch.Tensor) + torch.tensor([left, top, left, top]))
        return {
            **sample,
            "image": image_of(canvas),
            "boxes": boxes_of(torch.cat(boxes), size=self.size),
            "labels": torch.cat([tile["labels"] for tile in tiles]),
            "crowd": torch.cat([tile["crowd"] for tile in tiles]),
            "difficult": torch.cat([tile["difficult"] for tile in tiles]),
        }

    def _tile(self, sample: Sample, *, size: tuple[int, int]) -> Sample:
        """A window of ``sample`` that fills ``size`` [H, W]."""
        height, width = sample["image"].shape[-2:]
        scale = max(size[0] / height, size[1] / width) * factor(1, self.zoom)
        offset = (uniform(size[1] - width * scale, 0), uniform(size[0] - height * scale, 0))
        placement = Placement(scale=(scale, scale), offset=offset)
        return painted(sample, placement, size=size, min_visible=self.min_visible, fill=0.5)
