"""Learning rate schedules as factors of the base rate, keyed to epochs: batch and world size don't bend them."""

import math
from collections.abc import Sequence
from typing import Protocol

from onestage.errors import InputError


class Schedule(Protocol):
    """The factor after ``epoch`` (a float) of ``num_epochs``."""

    def __call__(self, epoch: float, num_epochs: float) -> float: ...


def warmup(epoch: float, warmup_epochs: float, *, start: float, power: float) -> float:
    """From ``start`` up to 1 with the share done, to the ``power``; 1 when it is over.

    Darknet's burn-in is the fourth power from 0 (parser.c, ``power=4``), Detectron's warm-up linear from a third.

    >>> [warmup(epoch, 2.0, start=0.25, power=1.0) for epoch in (0.0, 1.0, 2.0)]
    [0.25, 0.625, 1.0]
    """
    return 1.0 if epoch >= warmup_epochs else start + (1 - start) * (epoch / warmup_epochs) ** power


class WarmupCosine:
    """Warm-up, then half a cosine from 1 down to ``final``.

    >>> schedule = WarmupCosine(warmup_epochs=1.0, final=0.0)
    >>> [round(schedule(epoch, 5.0), 3) for epoch in (0.5, 1.0, 3.0, 5.0)]
    [0.062, 1.0, 0.5, 0.0]
    """

    def __init__(
        self, *, warmup_epochs: float, final: float, warmup_start: float = 0.0, warmup_power: float = 4.0
    ) -> None:
        _check_warmup(warmup_epochs=warmup_epochs, warmup_start=warmup_start, warmup_power=warmup_power)
        self.warmup_epochs = warmup_epochs
        self.final = final
        self.warmup_start = warmup_start
        self.warmup_power = warmup_power

    def __call__(self, epoch: float, num_epochs: float) -> float:
        warm = min(self.warmup_epochs, num_epochs / 2)  # a short training still gets to its full rate
        if epoch < warm:
            return warmup(epoch, warm, start=self.warmup_start, power=self.warmup_power)
        done = min((epoch - warm) / max(num_epochs - warm, 1e-9), 1.0)
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * done)) / 2


class WarmupSteps:
    """Warm-up, then ``factor`` times less at each milestone.

    Milestones are shares of the training where they lie between 0 and 1, or epochs where they are 1 and more.

    >>> schedule = WarmupSteps(warmup_epochs=0.0, milestones=[0.8, 0.9], factor=0.1)
    >>> [round(schedule(epoch, 10.0), 3) for epoch in (7.9, 8.0, 9.0)]
    [1.0, 0.1, 0.01]
    """

    def __init__(
        self,
        *,
        warmup_epochs: float,
        milestones: Sequence[float],
        factor: float,
        warmup_start: float = 0.0,
        warmup_power: float = 4.0,
    ) -> None:
        _check_warmup(warmup_epochs=warmup_epochs, warmup_start=warmup_start, warmup_power=warmup_power)
        self.are_shares = all(0 < one < 1 for one in milestones)
        if list(milestones) != sorted(milestones) or not (self.are_shares or all(one >= 1 for one in milestones)):
            raise InputError(
                "schedule.milestones must rise, either between 0 and 1 (shares of the training) or from 1 on (epochs), "
                f"got {list(milestones)}"
            )
        self.warmup_epochs = warmup_epochs
        self.milestones = milestones
        self.factor = factor
        self.warmup_start = warmup_start
        self.warmup_power = warmup_power

    def __call__(self, epoch: float, num_epochs: float) -> float:
        passed = sum(epoch >= one * (num_epochs if self.are_shares else 1) for one in self.milestones)
        warm = min(self.warmup_epochs, num_epochs / 2)
        return warmup(epoch, warm, start=self.warmup_start, power=self.warmup_power) * self.factor**passed


def _check_warmup(*, warmup_epochs: float, warmup_start: float, warmup_power: float) -> None:
    if warmup_epochs < 0 or not 0 <= warmup_start <= 1 or warmup_power <= 0:
        raise InputError(
            "need schedule.warmup_epochs >= 0, 0 <= schedule.warmup_start <= 1 and schedule.warmup_power > 0, "
            f"got {warmup_epochs}, {warmup_start} and {warmup_power}"
        )
