"""One point a second of what a training logs at every step: which lines of a journal become one, and what they say.

A line with a ``train/`` metric is a step's. Steps within the same window of time, with no other line between them,
make one point of each key: the mean of losses and speeds, the last value of what is a state, at the key's last step.
Any other line, such as a validation's, stays as it was logged.

So each step counts in exactly one point, and a point has the steps since its key's point before. That depends on the
journal alone: a training that is killed and resumed leaves the same steps in it, with the same values, as one that was
left alone. Only at which steps the windows end is the clock's doing.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Final, NamedTuple

from onestage.tracking.delivery import Point

STEP: Final = "train/"
MEANS: Final = (STEP, "perf/")
STATES: Final = frozenset({"train/lr"})
"""Of the names under ``MEANS``, those whose mean says nothing."""
TOLD_AFTER_S: Final = 10.0


class Line(NamedTuple):
    """What one call logged; ``end`` is the offset behind it in its journal, ``time_ms`` counts from the epoch."""

    end: int
    step: int
    time_ms: int
    metrics: Mapping[str, float]


def grouped(lines: Iterable[Line], every_s: float) -> Iterator[list[Line]]:
    """The lines in their order, those together that become one point of each key."""
    for number, group in groupby(lines, key=lambda line: _window(line, every_s)):
        if number is None:
            yield from ([line] for line in group)
        else:
            yield list(group)


def is_open(group: Sequence[Line], every_s: float) -> bool:
    """Whether more steps may still come to the last of the groups: its window is the present one."""
    number = _window(group[-1], every_s)
    return number is not None and number == _number(time.time() * 1000, every_s)


def _window(line: Line, every_s: float) -> int | None:
    """The number of the window of time that a step's line lies in; None for a line that stays by itself."""
    if every_s <= 0 or not any(key.startswith(STEP) for key in line.metrics):
        return None
    return _number(line.time_ms, every_s)


def _number(time_ms: float, every_s: float) -> int:
    return int(time_ms // (1000 * every_s))


def points_of(group: Sequence[Line], held: Mapping[str, int]) -> list[Point]:
    """One point a key, without what the store has: steps up to those that it ``held`` of the key."""
    found: dict[str, list[tuple[Line, float]]] = {}
    for line in group:
        for key, value in line.metrics.items():
            if line.step > held.get(key, line.step - 1):
                found.setdefault(key, []).append((line, value))
    return [_point(key, every) for key, every in found.items()]


def _point(key: str, every: Sequence[tuple[Line, float]]) -> Point:
    last, value = every[-1]
    if len(every) > 1 and key.startswith(MEANS) and key not in STATES:
        value = _mean([one for _, one in every])
    return Point(key, value, last.time_ms, last.step)


def _mean(values: Sequence[float]) -> float:
    try:
        return math.fsum(values) / len(values)
    except (OverflowError, ValueError):  # inf and -inf, which fsum refuses to add
        return sum(values) / len(values)


class FullRate:
    """Counts what a training at the full rate sends, and says once what that costs: ten seconds in, or at its end."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say: Callable[[str], None] | None = say
        self._began: float | None = None
        self._points = 0
        self._spent_s = 0.0
        self._keys: set[str] = set()

    def add(self, metrics: Mapping[str, float], took_s: float) -> None:
        """One call, and how long it kept the training."""
        if self._say is None:
            return
        now = time.monotonic()
        self._began = now - took_s if self._began is None else self._began
        self._points += len(metrics)
        self._spent_s += took_s
        self._keys |= metrics.keys()
        if now - self._began >= TOLD_AFTER_S:
            self.tell()

    def tell(self) -> None:
        if self._say is None or self._began is None:
            return
        say, self._say = self._say, None
        seconds = max(time.monotonic() - self._began, 1e-3)
        say(
            f"every step is logged (tracking.every_seconds=0): {self._points / seconds:.0f} points a second go to the "
            f"tracking store, at most {len(self._keys)} at one a second; logging takes "
            f"{100 * self._spent_s / seconds:.2f} % of the training's time"
        )
