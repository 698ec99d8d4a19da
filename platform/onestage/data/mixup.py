"""Two images blended into one."""

from collections.abc import Sequence
from typing import cast

import cv2
import torch
from torch import Tensor

from onestage.data.images import Pixels
from onestage.data.transforms import (
    Letterbox,
    Mixing,
    OnCanvas,
    Sample,
    boxes_of,
    image_of,
    mixing_ends,
    pixels_of,
    uniform,
)


class MixUp(OnCanvas, Mixing):
    """mixup, arXiv:1710.09412, for detection: with ``probability``, blends the sample with another of its batch.

    As in arXiv:1902.04103 Sec. 3.1 images are not warped to match, and the boxes of both are kept: each is letterboxed
    to ``size`` [H, W] first, if it is not of that size yet. The sample's share is drawn from
    Beta(``alpha``, ``alpha``), the wider around a half the smaller ``alpha`` is. A target has no weight here, so that
    an object counts in full however faint it is: ``alpha`` is best well above the paper's 1.5. A sample alone in its
    batch is not mixed. Off in the last ``plain_epochs`` of ``num_epochs``, which must be known for that (-1: not).
    """

    def __init__(
        self,
        *,
        size: Sequence[int],
        probability: float = 0.5,
        alpha: float = 8.0,
        num_epochs: int = -1,
        plain_epochs: int = 0,
    ) -> None:
        if alpha <= 0:
            raise ValueError(f"need alpha > 0, got {alpha}")
        self.size = tuple(size)
        self.probability = probability
        self.alpha = alpha
        self.end = mixing_ends(num_epochs=num_epochs, plain_epochs=plain_epochs)

    def mix(self, sample: Sample, others: Sequence[Sample], *, epoch: int) -> Sample:
        if not others or epoch >= self.end or uniform(0, 1) >= self.probability:
            return sample
        other = self._on_canvas(others[int(torch.randint(len(others), ()))])
        sample = self._on_canvas(sample)
        share = float(torch.distributions.Beta(self.alpha, self.alpha).sample())
        blend = cv2.addWeighted(pixels_of(sample["image"]), share, pixels_of(other["image"]), 1 - share, 0)
        boxes = torch.cat([one["boxes"].as_subclass(Tensor) for one in (sample, other)])
        return {
            **sample,
            "image": image_of(cast(Pixels, blend)),
            "boxes": boxes_of(boxes, size=self.size),
            "labels": torch.cat([sample["labels"], other["labels"]]),
            "crowd": torch.cat([sample["crowd"], other["crowd"]]),
            "difficult": torch.cat([sample["difficult"], other["difficult"]]),
        }

    def _on_canvas(self, sample: Sample) -> Sample:
        return sample if tuple(sample["image"].shape[-2:]) == self.size else Letterbox(size=self.size)(sample)
