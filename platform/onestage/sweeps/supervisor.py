"""A sweep on a cluster, watched by a process that no node's loss can end: Ray ends its driver with the node or head.

The sweep itself is a child process; this one does not know Ray.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from onestage.cluster.restarts import Restarts
from onestage.errors import FAILED, INTERRUPTED, PREEMPTED

ENDED: Final = "ONESTAGE_SWEEP_ENDED"
"""In the child's environment: the file descriptor on which it says that its end is its own."""
STDIN: Final = 0
COMMAND: Final = [sys.executable, "-m", "onestage.cli", "sweep"]


def is_watched() -> bool:
    """Whether this process is such a child."""
    return ENDED in os.environ


@contextmanager
def own_end() -> Iterator[None]:
    """In the child: whatever ends this block is not Ray's doing. It ends with the parent."""
    descriptor = int(os.environ[ENDED])
    os.set_inheritable(descriptor, False)  # what this process starts must not hold it open
    threading.Thread(target=_end_with_parent, name="parent-watch", daemon=True).start()
    try:
        yield
    finally:
        os.write(descriptor, b".")


def _end_with_parent() -> None:
    while os.read(STDIN, 2**10):  # not sys.stdin, whose lock an interpreter that ends would want
        pass
    os.kill(os.getpid(), signal.SIGKILL)


def run(
    words: Sequence[str], *, again: Callable[[], Sequence[str]], reached: Callable[[], int], restarts: Restarts
) -> int:
    """``onestage sweep`` with these words, and where it is lost with those that ``again`` gives; its exit code.

    ``reached`` grows with what the sweep has come to, so that only losses without progress count.
    """
    asked: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def forward(number: int, frame: Any) -> None:
        asked.append(number)
        if child is not None:
            child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while True:
            reading, writing = os.pipe()
            child = subprocess.Popen(
                [*COMMAND, *words],
                stdin=subprocess.PIPE,
                env=os.environ | {ENDED: str(writing)},
                pass_fds=[writing],
                start_new_session=True,  # Ctrl-C is passed on by us
            )
            os.close(writing)
            with os.fdopen(reading, "rb") as said, child:
                own = bool(said.read())  # until its end
                code = child.wait()
            child = None
            if own:
                return code
            pause_s = restarts.pause(reached=reached())
            if asked or pause_s is None:
                return _gave_up(asked, restarts.count)
            print(
                f"onestage: the sweep's process was lost with its node or the head of the cluster; going on in "
                f"{pause_s:.0f} s ({restarts.count} of at most {restarts.limit})",
                file=sys.stderr,
            )
            _sleep(pause_s, asked)
            if asked:
                return _gave_up(asked, restarts.count)
            words = again()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _sleep(seconds: float, asked: Sequence[int]) -> None:
    end = time.monotonic() + seconds
    while not asked and (left := end - time.monotonic()) > 0:
        time.sleep(min(left, 0.25))


def _gave_up(asked: Sequence[int], restarts: int) -> int:
    if asked:
        return INTERRUPTED if asked[0] == signal.SIGINT else PREEMPTED
    print(f"onestage: the sweep was lost {restarts + 1} times: onestage sweep status shows it", file=sys.stderr)
    return FAILED
