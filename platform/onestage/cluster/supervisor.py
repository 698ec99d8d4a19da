"""A training on a cluster, watched by a process that no node's loss can end: it starts the driver again.

The driver (``onestage.cluster.driver``) is a child process; this one does not know Ray.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

from onestage.cluster.job import Job
from onestage.cluster.restarts import Restarts
from onestage.cluster.stop import Stop
from onestage.errors import InputError
from onestage.training.endings import Diverged

MESSAGES: Final = "ONESTAGE_DRIVER_MESSAGES"
END_S: Final = 20.0
DRIVER: Final = [sys.executable, "-m", "onestage.cluster.driver"]


class DriverFailed(Exception):
    """The training failed in its driver, whose own words these are."""


def run(job: Job, *, show: Callable[[dict[str, Any]], None], stop: Stop) -> dict[str, Any]:
    """Trains on the cluster at ``cluster.address``; where the driver is lost, again from the last checkpoint.

    ``show`` gets the training's progress. Raises what ended the training.
    """
    settings = job["config"]["cluster"]
    restarts = Restarts(limit=settings["max_failures"], backoff_s=settings["backoff_s"])
    reached = 0

    def heard(message: dict[str, Any]) -> None:
        nonlocal reached
        reached = max(reached, message.get("step", 0))
        show(message)

    while True:
        ended = _drive(job, heard, stop)
        if "result" in ended:
            result: dict[str, Any] = ended["result"]
            return result
        error = ended["error"]
        if error["kind"] != "lost":
            _raise(error, stop)
        pause_s = restarts.pause(reached=reached)
        if pause_s is None:
            _raise(error, stop)
        else:
            why = next(iter(error["message"].splitlines()), "")
            show(
                {
                    "lost": f"the driver: {why}",
                    "pause_s": pause_s,
                    "restart": restarts.count,
                    "limit": restarts.limit,
                }
            )
            stop.sleep(pause_s)


def _raise(error: dict[str, str], stop: Stop) -> None:
    if error["kind"] in ("interrupted", "preempted"):
        stop.asked = stop.asked or ("interrupted" if error["kind"] == "interrupted" else "preempted")
        stop.raise_asked()
    if error["kind"] == "input":
        raise InputError(error["message"])
    kind = Diverged if error["kind"] == "diverged" else DriverFailed
    raised = kind(error["message"])
    raised.add_note(error["story"])
    raise raised


def _drive(job: Job, show: Callable[[dict[str, Any]], None], stop: Stop) -> dict[str, Any]:
    """One driver, from its start to its last message: its result or its error."""
    ended: dict[str, Any] | None = None
    with _driver(job) as (process, messages), stop.listened():
        told = False
        for line in messages:
            if stop.asked is not None and not told:
                told = True
                process.send_signal(signal.SIGINT if stop.asked == "interrupted" else signal.SIGTERM)
            if not line:
                continue
            message = json.loads(line)
            if "result" in message or "error" in message:
                ended = message
            else:
                show(message)
    if ended is None:
        text = f"the driver process ended without a word (exit code {process.returncode})"
        ended = {"error": {"kind": "lost", "message": text, "story": text}}
    return ended


@contextmanager
def _driver(job: Job) -> Iterator[tuple[subprocess.Popen[bytes], Iterator[str]]]:
    """The process and what it says, with an empty line now and then; it is ended with the block."""
    reading, writing = os.pipe()
    process = subprocess.Popen(
        DRIVER,
        stdin=subprocess.PIPE,
        stdout=sys.stderr.fileno(),  # ours is for the result alone
        env=os.environ | {MESSAGES: str(writing)},
        pass_fds=[writing],
        start_new_session=True,  # Ctrl-C is passed on by us
    )
    os.close(writing)
    assert process.stdin is not None
    try:
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps(job).encode() + b"\n")
            process.stdin.flush()
        yield process, _lines(reading)
    except BaseException:
        process.kill()
        raise
    finally:
        os.close(reading)
        with suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _lines(descriptor: int) -> Iterator[str]:
    """Whole lines as they come, and "" each quarter of a second without one, until the other end is closed."""
    os.set_blocking(descriptor, False)
    rest = b""
    while True:
        try:
            read = os.read(descriptor, 2**16)
        except BlockingIOError:
            time.sleep(0.25)
            yield ""
            continue
        if not read:
            return
        *lines, rest = (rest + read).split(b"\n")
        yield from (line.decode() for line in lines if line)
