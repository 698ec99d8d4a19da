"""Multi-scale training: the input's size, drawn again every few batches."""

from collections.abc import Sequence
from typing import Final

import numpy as np

_STREAM: Final = 1
"""Sets these draws apart from the shuffle's, which come from [seed, epoch] as well."""


class InputSizes:
    """The size of a training batch's images: ``size`` [H, W], or a square drawn anew every ``every`` batches (0: not).

    YOLO9000, arXiv:1612.08242 Sec. 2 "Multi-Scale Training". The square's side is one of ``min``, ``min + step``, …
    ``max`` in pixels, a pure function of the seed, the epoch and the batch's number within it: the same on all ranks
    and after a resume.

    >>> sizes = InputSizes(size=[416, 416], min=320, max=608, step=32, every=10)
    >>> sizes(seed=0, epoch=0, batch=3) == sizes(seed=0, epoch=0, batch=9)
    True
    """

    def __init__(self, *, size: Sequence[int], min: int = 320, max: int = 608, step: int = 32, every: int = 0) -> None:
        if not 0 < min <= max:
            raise ValueError(f"need 0 < data.input_sizes.min <= data.input_sizes.max, got {min} and {max}")
        if step < 1 or every < 0:
            raise ValueError(f"need data.input_sizes.step >= 1 and data.input_sizes.every >= 0, got {step} and {every}")
        self.size = tuple(size)
        self.sides = range(min, max + 1, step)
        self.every = every

    def __call__(self, *, seed: int, epoch: int, batch: int) -> tuple[int, ...]:
        """[H, W] of the epoch's batch number ``batch``, counted from 0."""
        if not self.every:
            return self.size
        generator = np.random.default_rng([seed, epoch, batch // self.every, _STREAM])
        side = self.sides[int(generator.integers(len(self.sides)))]
        return side, side
