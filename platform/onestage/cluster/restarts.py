"""How often a training that was lost is started again, and after which pause."""

from typing import Final

MAX_PAUSE_S: Final = 120.0


class Restarts:
    """At most ``limit`` in a row; one that got further than any before starts the count anew.

    >>> restarts = Restarts(limit=2, backoff_s=5.0)
    >>> [restarts.pause(reached=step) for step in (10, 10, 10)], restarts.count
    ([5.0, 10.0, None], 2)
    """

    def __init__(self, *, limit: int, backoff_s: float) -> None:
        self.limit = limit
        self.backoff_s = backoff_s
        self.count = 0
        self._furthest = -1

    def pause(self, *, reached: int) -> float | None:
        """Seconds to wait before the next start, twice as long each time; None: not again.

        ``reached`` is the last step of the training that was lost.
        """
        if reached > self._furthest:
            self._furthest, self.count = reached, 0
        if self.count >= self.limit:
            return None
        self.count += 1
        return min(self.backoff_s * 2.0 ** (self.count - 1), MAX_PAUSE_S)
