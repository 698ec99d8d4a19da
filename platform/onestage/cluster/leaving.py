"""A worker that has to leave soon: its process got SIGTERM, or its node is being drained."""

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

_terminated = threading.Event()  # of this process


class Notice:
    """What this Ray Train worker is told of its own end; ``say`` gets the reason, once.

    The first SIGTERM is only noted from now on. A second one ends the process, as Ray would with the first.
    """

    def __init__(self, *, rank: int, say: Callable[[str], None]) -> None:
        import ray

        self._rank = rank
        self._say = say
        self._told = False
        # Handlers belong to the main thread, which serves the actor's calls; the training is in another.
        ray.get_runtime_context().current_actor.__ray_call__.remote(_note_sigterm)

    def given(self) -> bool:
        """Whether the worker has to leave; looks at memory alone, and may be asked at every step."""
        if not self._told and (why := self._why()) is not None:
            self._told = True
            self._say(why)
        return self._told

    def _why(self) -> str | None:
        if _terminated.is_set():
            return "its process got SIGTERM"
        # Ray's own get_preemption_info asks all workers, in a round trip of each.
        from ray.train.v2._internal.execution.context import get_train_context

        info = get_train_context().preemption_context.preemption_info
        if info is None or self._rank not in info.preempted_ranks:
            return None
        if info.deadline_ms is None:
            return "its node is being drained"
        return f"its node is being drained, to be gone in {max(info.deadline_ms / 1000 - time.time(), 0):.0f} s"


def _note_sigterm(_: Any) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def note(number: int, frame: FrameType | None) -> None:
        if _terminated.is_set() and callable(before):
            before(number, frame)
        _terminated.set()

    signal.signal(signal.SIGTERM, note)
