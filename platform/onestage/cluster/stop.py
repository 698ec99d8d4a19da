"""The wish to end a training early, from the keyboard or by SIGTERM, and how it reaches the training."""

import contextlib
import signal
import time
from collections.abc import Iterator
from typing import Final, Literal

ECHO_S: Final = 2.0
POLL_S: Final = 0.25

Why = Literal["interrupted", "preempted", "ended"]


class Preempted(BaseException):
    """SIGTERM: the machine is wanted back."""


class Ended(BaseException):
    """The sweep has no more use for this trial."""


RAISES: Final[dict[Why, type[BaseException]]] = {
    "interrupted": KeyboardInterrupt,
    "preempted": Preempted,
    "ended": Ended,
}


class Stop:
    """``asked`` says why a training should end. Whoever trains looks at it between two steps, saves, and ends.

    While nobody looks, and when asked a second time, the wish is an exception where the program stands.
    """

    def __init__(self) -> None:
        self.asked: Why | None = None
        self._since = 0.0
        self._listened = False

    def ask(self, why: Why) -> None:
        """Raises KeyboardInterrupt or Preempted where nobody would look in time."""
        now = time.monotonic()
        first = self.asked is None
        if first:
            self.asked, self._since = why, now
        # A SIGTERM to a whole group comes to a driver twice, from its sender and from the parent: that is one wish.
        echo = why == "preempted" and now - self._since < ECHO_S
        if not self._listened or not (first or echo):
            self.raise_asked()

    def raise_asked(self) -> None:
        """End here and now, as was asked."""
        assert self.asked is not None
        raise RAISES[self.asked]

    def sleep(self, seconds: float) -> None:
        """Waits so long; raises as ``raise_asked`` does once somebody asks."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if self.asked is not None:
                self.raise_asked()
            time.sleep(min(left, POLL_S))

    @contextlib.contextmanager
    def listened(self) -> Iterator[None]:
        """Within this somebody looks at ``asked``."""
        self._listened = True
        try:
            yield
        finally:
            self._listened = False

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C ask; where signals can be handled at all."""

        def handle(number: int, _: object) -> None:
            self.ask("interrupted" if number == signal.SIGINT else "preempted")

        before = {}
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                before[number] = signal.signal(number, handle)
        except ValueError:  # not in the main thread, as in a notebook's helper
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
