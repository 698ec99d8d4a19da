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

from onestage.cluster import connection
from onestage.cluster.job import Job
from onestage.cluster.resources import TooFewResources
from onestage.cluster.restarts import Restarts
from onestage.cluster.stop import Stop
from onestage.errors import InputError
from onestage.training.endings import Diverged

MESSAGES: Final = "ONESTAGE_DRIVER_MESSAGES"
END_S: Final = 20.0

Show = Callable[[dict[str, Any]], None]
Run = Callable[[Job, Show, Stop], dict[str, Any]]

DRIVER: Final = [sys.executable, "-m", "onestage.cluster.driver"]


class DriverFailed(Exception):
    """The training failed in its driver, whose own words these are."""


class Driver:
    """A driver's process, for the cluster at ``address``. Until it gets a job it imports what it will need."""

    def __init__(self, address: str) -> None:
        self._reading, writing = os.pipe()
        self.process = subprocess.Popen(
            [*DRIVER, address],
            stdin=subprocess.PIPE,
            stdout=sys.stderr.fileno(),  # ours is for the result alone
            env=os.environ | {MESSAGES: str(writing)},
            pass_fds=[writing],
            start_new_session=True,  # Ctrl-C is passed on by us
        )
        os.close(writing)
        assert self.process.stdin is not None
        self._jobs = self.process.stdin

    def take(self, job: Job) -> Iterator[str]:
        """What it says of this job, to its end, with an empty line now and then."""
        with suppress(BrokenPipeError):
            self._jobs.write(json.dumps(job).encode() + b"\n")
            self._jobs.flush()
        return _lines(self._reading)

    def end(self) -> None:
        """Waits for the end of one that has said all, or had nothing to do."""
        os.close(self._reading)
        with suppress(BrokenPipeError):
            self._jobs.close()
        try:
            self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextmanager
def begun(address: str) -> Iterator[Run]:
    """``run``, with a driver that starts now, while the caller gets its job ready.

    Raises InputError where what listens at ``address`` is no head of Ray, or lets us not in.
    """
    drivers = [Driver(address)]
    try:
        connection.check_head(address)
        yield lambda job, show, stop: run(job, show=show, stop=stop, driver=drivers.pop() if drivers else None)
    finally:
        for driver in drivers:
            driver.process.kill()
            driver.end()


def run(job: Job, *, show: Show, stop: Stop, driver: Driver | None = None) -> dict[str, Any]:
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
        ended = _drive(driver or Driver(settings["address"] or "auto"), job, heard, stop)
        driver = None
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
    raised = {"diverged": Diverged, "few": TooFewResources}.get(error["kind"], DriverFailed)(error["message"])
    raised.add_note(error["story"])
    raise raised


def _drive(driver: Driver, job: Job, show: Show, stop: Stop) -> dict[str, Any]:
    """One driver, to its last message: its result or its error."""
    ended: dict[str, Any] | None = None
    with _ended(driver) as process, stop.listened():
        told = False
        for line in driver.take(job):
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
def _ended(driver: Driver) -> Iterator[subprocess.Popen[bytes]]:
    """Its process, which is ended with the block."""
    try:
        yield driver.process
    except BaseException:
        driver.process.kill()
        raise
    finally:
        driver.end()


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
