"""Between the workers and the driver, wherever each runs: what the workers say, and what they are to do.

The messages are plain dictionaries, each known by one of its keys; all of them are here.
"""

import os
import signal
import socket
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, NotRequired, TypedDict

from onestage.cluster.connection import on_node

Command = Literal["stop", "stacks", "die"]
"""End with a checkpoint; send the stacks of all threads; end at once."""

ANSWER_S: Final = 10.0
"""A worker's longest wait for one answer of the board; it tries again."""
DRIVER_ANSWER_S: Final = 60.0
"""The driver's, on the board's own node: longer is a fault."""
MAX_MESSAGES: Final = 1000


class Beat(TypedDict):
    """A worker's sign of life, every two seconds. ``number`` counts them, ``marks`` the signs of progress.

    ``place`` compares ranks, which all go through the same places: see ``training.pulse``. ``idle_s`` is since the
    last mark, ``warm`` after the first step of this process. ``done``: the training there has ended.
    """

    rank: int
    host: str
    node: str
    pid: int
    number: int
    step: int
    place: tuple[int, int]
    doing: str
    marks: int
    idle_s: float
    warm: bool
    done: bool
    stacks: NotRequired["Stacks"]


class Stacks(TypedDict):
    """All threads' stacks of one process; ``where`` are the innermost frames of the training's own thread.

    ``in_collective``: that thread waits for the other ranks.
    """

    where: str
    in_collective: bool
    text: str


class Start(TypedDict):
    """A worker at the start of its training: ``step`` and ``images`` are those of the checkpoint it goes on from."""

    rank: int
    host: str
    world_size: int
    global_batch: int
    step: int
    images: int


class StartedMessage(TypedDict):
    """From every worker, once."""

    started: Start


class StepMessage(TypedDict):
    """From rank 0, after a step, at most twice a second; with whatever metrics the bar shows.

    ``images`` trained on by then, over all ranks; where it isn't said, steps times the global batch count.
    """

    epoch: int
    num_epochs: int
    step: int
    num_steps: int
    images: NotRequired[int]


class Validated(TypedDict):
    """What the validation behind ``epoch``, from 1, and after ``step`` steps came to."""

    epoch: int
    step: int
    metrics: dict[str, float]


class ValidatedMessage(TypedDict):
    """From rank 0, once after each validation."""

    validated: Validated


class WrittenMessage(TypedDict):
    """From rank 0: the checkpoint of this step is where the run's are kept."""

    written: int


class Place(TypedDict):
    """Where a worker is: ``node`` as Ray calls it; ``oom_kills`` that machine's count at the worker's start."""

    rank: int
    host: str
    node: str
    oom_kills: int


class PlacedMessage(TypedDict):
    """From every worker, first of all."""

    placed: Place


class Leaving(TypedDict):
    """A worker that has to go, and why."""

    rank: int
    why: str


class LeavingMessage(TypedDict):
    """From a worker whose process or node will soon be ended; all of them are about to stop with a checkpoint."""

    leaving: Leaving


class SkippedMessage(TypedDict):
    """From rank 0: images that could not be read, and the file that names them all."""

    skipped: list[str]
    file: str


class RefusedMessage(TypedDict):
    """From any worker: input that is for the user to mend."""

    refused: str


class CheckpointMessage(TypedDict):
    """From rank 0, where saving or reading a checkpoint did not go as it should: what happened, in one line."""

    checkpoint: str


class LostMessage(TypedDict):
    """From the driver: why a worker group ended, and when the next of at most ``limit`` starts; ``ranks`` were lost."""

    lost: str
    pause_s: float
    restart: int
    limit: int
    ranks: NotRequired[list[int]]


class HangMessage(TypedDict):
    """From the driver: the watchdog's verdict in one line."""

    hang: str


class NoteMessage(TypedDict):
    """From the driver or rank 0: one line that a person should read."""

    note: str


class WaitingMessage(TypedDict):
    """From the driver, again and again while it waits: for what, and how long still."""

    waiting: str


class Board:
    """Keeps what was said until the driver takes it; never more than ``MAX_MESSAGES``, and of steps only the last."""

    def __init__(self) -> None:
        self.messages: deque[Mapping[str, Any]] = deque(maxlen=MAX_MESSAGES)
        self.outcome: dict[str, Any] | None = None
        self.commands: list[Command] = []
        self.beats: dict[int, Beat] = {}

    def put(self, message: Mapping[str, Any]) -> None:
        if "step" in message:
            self.messages = deque((one for one in self.messages if "step" not in one), maxlen=MAX_MESSAGES)
        self.messages.append(message)

    def take(self) -> list[Mapping[str, Any]]:
        taken = list(self.messages)
        self.messages.clear()
        return taken

    def finish(self, outcome: dict[str, Any]) -> None:
        self.outcome = outcome

    def result(self) -> dict[str, Any] | None:
        return self.outcome

    def beat(self, beat: Beat) -> list[Command]:
        """Keeps the rank's last beat. Returns all commands so far: an answer may be lost on its way."""
        self.beats[beat["rank"]] = beat
        return self.commands

    def latest(self) -> dict[int, Beat]:
        """The last beat of every rank that was heard."""
        return self.beats

    def order(self, command: Command) -> None:
        """To all workers; a second time it changes nothing."""
        if command not in self.commands:
            self.commands.append(command)


def start_board() -> Any:
    """A board on this node: the driver reads it as long as the driver itself is there."""
    import ray

    return ray.remote(max_restarts=0, **on_node(ray.get_runtime_context().get_node_id()))(Board).remote()


def this_host() -> str:
    """This machine's name and address, as the cluster knows it."""
    import ray

    return f"{socket.gethostname()} ({ray.util.get_node_ip_address()})"


def send_beat(board: Any, beat: Beat) -> list[Command]:
    """A worker's beat and its answer. Raises a RayError where the board is gone, or silent for ``ANSWER_S``."""
    import ray

    commands: list[Command] = ray.get(board.beat.remote(beat), timeout=ANSWER_S)
    return commands


def latest_beats(board: Any) -> dict[int, Beat]:
    """What the driver's watchdog looks at. Raises a RayError where the board is gone, or silent for a minute."""
    import ray

    beats: dict[int, Beat] = ray.get(board.latest.remote(), timeout=DRIVER_ANSWER_S)
    return beats


def kill_process(beat: Beat) -> None:
    """Has the worker's process killed on its own node, for one that no longer hears; does not wait for it."""
    import ray

    ray.remote(max_retries=0, **on_node(beat["node"]))(_kill_worker).remote(beat["pid"])


def _kill_worker(pid: int) -> None:
    command = Path(f"/proc/{pid}/cmdline")
    if command.is_file() and command.read_bytes().startswith(b"ray::"):  # the number may have been given anew
        os.kill(pid, signal.SIGKILL)
