"""Learning rate schedules as factors of the base rate, keyed to epochs: batch and world size don't bend them."""

import math
from collections.abc import Sequence
from typing import Protocol

from onestage.errors import InputError


class Schedule(Protocol):
    """The factor after ``epoch`` (a float) of ``num_epochs``."""

    def __call__(self, epoch: float, num_epochs: float) -> float: ...


def warmup(epoch: float, warmup_epochs: float) -> float:
    """Darknet's burn-in: the fourth power of the share done (parser.c, ``power=4``), 1 when it is over."""
    return 1.0 if epoch >= warmup_epochs else (epoch / warmup_epochs) ** 4


class WarmupCosine:
    """Burn-in, then half a cosine from 1 down to ``final``.

    >>> schedule = WarmupCosine(warmup_epochs=1.0, final=0.0)
    >>> [round(schedule(epoch, 5.0), 3) for epoch in (0.5, 1.0, 3.0, 5.0)]
    [0.062, 1.0, 0.5, 0.0]
    """

    def __init__(self, *, warmup_epochs: float, final: float) -> None:
        self.warmup_epochs = warmup_epochs
        self.final = final

    def __call__(self, epoch: float, num_epochs: float) -> float:
        warm = min(self.warmup_epochs, num_epochs / 2)  # a short training still gets to its full rate
        if epoch < warm:
            return warmup(epoch, warm)
        done = min((epoch - warm) / max(num_epochs - warm, 1e-9), 1.0)
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * done)) / 2


class WarmupSteps:
    """Burn-in, then ``factor`` times less at each milestone, which are shares of the training.

    >>> schedule = WarmupSteps(warmup_epochs=0.0, milestones=[0.8, 0.9], factor=0.1)
    >>> [round(schedule(epoch, 10.0), 3) for epoch in (7.9, 8.0, 9.0)]
    [1.0, 0.1, 0.01]
    """

    def __init__(self, *, warmup_epochs: float, milestones: Sequence[float], factor: float) -> None:
        if list(milestones) != sorted(milestones) or any(not 0 < share < 1 for share in milestones):
            raise InputError(f"schedule.milestones must rise between 0 and 1, got {list(milestones)}")
        self.warmup_epochs = warmup_epochs
        self.milestones = milestones
        self.factor = factor

    def __call__(self, epoch: float, num_epochs: float) -> float:
        passed = sum(epoch >= share * num_epochs for share in self.milestones)
        return warmup(epoch, min(self.warmup_epochs, num_epochs / 2)) * self.factor**passed
