"""No worker hangs unseen: their hearts beat to the board, and the driver's watchdog names the one that stands still."""

import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

from onestage.cluster.board import Beat, Command, Stacks

if TYPE_CHECKING:  # the driver needs no Lightning
    from onestage.training.pulse import Pulse

BEAT_S: Final = 2.0
GONE_S: Final = 30.0
"""A worker that the board left unanswered for so long ends itself; with its last try, after 42 s at most."""
FIRST_STEP_S: Final = 300.0
"""Until its first step a worker group may stand still for so long: set-up, compilation, the choice of kernels."""
SILENT_S: Final = 60.0
LEAST_SILENT_S: Final = 5 * BEAT_S
STACKS_S: Final = 10.0
"""The longest wait for the stacks of all ranks."""
KILL_S: Final = 20.0
"""So long after "die" a process may still be there; Ray itself ends a stopped one 8 s after another has gone."""
LOOK_S: Final = 15.0
"""A watch that did not look for longer than this begins anew."""
NUM_FRAMES: Final = 4
MAX_STACKS: Final = 64_000
"""Characters of one process's stacks."""


class Heart(threading.Thread):
    """Sends a worker's beats from a thread of its own, and does what the answers ask for.

    ``send`` gives a beat to the board and returns the commands so far; it raises where the board does not answer.
    ``stop_asked`` is for the training to look at. On "die", and where no answer came for ``GONE_S``, ``end`` gets the
    reason and ends the process. ``host`` and ``node`` are how people and Ray call this machine; the
    name that it gives itself where ``host`` is None.
    """

    def __init__(
        self,
        pulse: "Pulse",
        send: Callable[[Beat], list[Command]],
        *,
        rank: int,
        host: str | None = None,
        node: str = "",
        every_s: float = BEAT_S,
        gone_s: float = GONE_S,
        end: Callable[[str], None] | None = None,
    ) -> None:
        super().__init__(name="heart", daemon=True)
        self.stop_asked = False
        self._pulse = pulse
        self._send = send
        self._rank = rank
        self._host = host or socket.gethostname()
        self._node = node
        self._every_s = every_s
        self._gone_s = gone_s
        self._end = end or _end_process
        self._number = 0
        self._stacks: Stacks | None = None
        self._answered = time.monotonic()
        self._closing = threading.Event()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """The training has ended here: says so, and beats no more."""
        self._closing.set()
        self.join(self._every_s)

    def run(self) -> None:
        while not self._closing.is_set():
            soon = self._beat()
            if not soon:
                self._closing.wait(self._every_s)
        self._beat()

    def _beat(self) -> bool:
        """One beat; True where the next one is due at once."""
        try:
            commands = self._send(self._say())
        except Exception as error:  # whatever Ray raises
            waited = time.monotonic() - self._answered
            if waited > self._gone_s and not self._closing.is_set():
                self._end(f"the driver did not answer for {waited:.0f} s ({type(error).__name__})")
            return False
        self._answered = time.monotonic()
        self.stop_asked = self.stop_asked or "stop" in commands
        if "die" in commands and not self._closing.is_set():
            self._end("the driver's watchdog ended this worker group")
        if "stacks" in commands and self._stacks is None:
            self._stacks = stacks(self._pulse.thread)
            return True
        return False

    def _say(self) -> Beat:
        now = self._pulse.now()
        self._number += 1
        beat = Beat(
            rank=self._rank,
            host=self._host,
            node=self._node,
            pid=os.getpid(),
            number=self._number,
            step=now["step"],
            place=now["place"],
            doing=now["doing"],
            marks=now["marks"],
            idle_s=time.monotonic() - now["since"],
            warm=now["warm"],
            done=self._closing.is_set(),
        )
        if self._stacks is not None:
            beat["stacks"] = self._stacks
        return beat


def _end_process(why: str) -> None:
    print(f"onestage: {why}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)


def stacks(training: int) -> Stacks:
    """The stacks of all threads of this process but the calling one, that of the thread ``training`` first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sys._current_frames()
    frames.pop(threading.get_ident(), None)
    order = sorted(frames, key=lambda ident: (ident != training, names.get(ident, "")))
    text = "\n".join(
        f"thread {names.get(ident, ident)}{' (training)' if ident == training else ''}:\n"
        + "".join(traceback.format_stack(frames[ident]))
        for ident in order
    )
    # Innermost first. Without a frame walk_stack would walk our own.
    walked = traceback.walk_stack(frames[training]) if training in frames else ()
    own = [(frame.f_code, line) for frame, line in walked]
    where = [f"{code.co_name} ({'/'.join(Path(code.co_filename).parts[-2:])}:{line})" for code, line in own]
    return Stacks(
        where=" < ".join(where[:NUM_FRAMES]),
        in_collective=any("torch/distributed/" in code.co_filename for code, _ in own),
        text=text[:MAX_STACKS],
    )


class Verdict(NamedTuple):
    """``rank`` has stood still for ``seconds``, and so have those ``alike``; ``silent``: without any beat."""

    rank: int
    silent: bool
    seconds: float
    alike: tuple[int, ...] = ()


class Watch:
    """Finds the rank that a worker group waits for; knows only beats and the time (seconds, of any clock).

    A rank is silent after a minute without a new beat, or after ``hang_s``, where that is shorter; at least
    ``LEAST_SILENT_S``. A group hangs where no rank made a mark for ``hang_s``, before its first step for
    ``FIRST_STEP_S`` at least. ``hang_s`` 0 finds nothing.
    """

    def __init__(self, *, hang_s: float, num_workers: int) -> None:
        self.hang_s = hang_s
        self.num_workers = num_workers
        self._looked: float | None = None
        self._heard: dict[int, tuple[int, float]] = {}  # by rank: the last beat's number, and when it was new
        self._moved: dict[int, tuple[int, float]] = {}  # by rank: the marks, and when they were new

    def look(self, beats: Mapping[int, Beat], now: float) -> Verdict | None:
        """What the last beats of the ranks say; to be called every few seconds at least."""
        if not self.hang_s:
            return None
        if self._looked is not None and now - self._looked > LOOK_S:
            # This process itself was stopped: nobody else is to blame for the time.
            self._heard = {rank: (number, now) for rank, (number, _) in self._heard.items()}
            self._moved = {rank: (marks, now) for rank, (marks, _) in self._moved.items()}
        self._looked = now
        for rank, beat in beats.items():
            _note(self._heard, rank, beat["number"], now)
            _note(self._moved, rank, beat["marks"], now)
        working = {rank: beat for rank, beat in beats.items() if not beat["done"]}
        return self._silence(working, now) or self._hang(working, now)

    def _silence(self, working: Mapping[int, Beat], now: float) -> Verdict | None:
        limit_s = max(min(SILENT_S, self.hang_s), LEAST_SILENT_S)
        silent = [rank for rank in sorted(working) if now - self._heard[rank][1] > limit_s]
        if not silent:
            return None
        return Verdict(silent[0], True, now - self._heard[silent[0]][1], tuple(silent[1:]))

    def _hang(self, working: Mapping[int, Beat], now: float) -> Verdict | None:
        if not working:
            return None
        still_s = now - max(self._moved[rank][1] for rank in working)
        warm = len(self._heard) >= self.num_workers and all(beat["warm"] for beat in working.values())
        if still_s <= (self.hang_s if warm else max(self.hang_s, FIRST_STEP_S)):
            return None
        last = min(tuple(beat["place"]) for beat in working.values())
        behind = [rank for rank in sorted(working) if tuple(working[rank]["place"]) == last]
        return Verdict(behind[0], False, still_s, tuple(behind[1:]))


def _note(seen: dict[int, tuple[int, float]], rank: int, count: int, now: float) -> None:
    if rank not in seen or seen[rank][0] != count:
        seen[rank] = (count, now)


class Watchdog:
    """Looks at a worker group's beats, and ends the group where it hangs, with the stacks of all ranks in ``folder``.

    ``beats`` gives the last beat of each rank, ``order`` tells all workers what to do, ``kill`` ends the process of a
    worker that does not hear. ``verdict`` says in one line what was found.
    """

    def __init__(
        self,
        *,
        hang_s: float,
        num_workers: int,
        folder: Path,
        beats: Callable[[], Mapping[int, Beat]],
        order: Callable[[Command], None],
        kill: Callable[[Beat], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.verdict: str | None = None
        self._watch = Watch(hang_s=hang_s, num_workers=num_workers)
        self._folder = folder
        self._beats = beats
        self._order = order
        self._kill = kill
        self._clock = clock
        self._found: tuple[Verdict, float] | None = None
        self._ended: float | None = None
        self._looked = -BEAT_S

    def look(self) -> str | None:
        """To be called again and again: the verdict, once, when the workers have been told to end.

        Workers whose processes are still there ``KILL_S`` later are killed.
        """
        now = self._clock()
        if now - self._looked < BEAT_S / 2:
            return None
        self._looked = now
        beats = self._beats()
        if self.verdict is not None:
            self._kill_left(beats, now)
            return None
        if self._found is None:
            verdict = self._watch.look(beats, now)
            if verdict is None:
                return None
            self._found = (verdict, now)
            self._order("stacks")
        verdict, since = self._found
        if now - since < STACKS_S and not self._all_sent(beats, verdict):
            return None
        self._order("die")
        self._ended = now
        self.verdict = f"{self._say(beats, verdict)}; {self._write(beats)}"
        return self.verdict

    def _all_sent(self, beats: Mapping[int, Beat], verdict: Verdict) -> bool:
        silent = {verdict.rank, *verdict.alike} if verdict.silent else set()
        return all("stacks" in beat for rank, beat in beats.items() if rank not in silent and not beat["done"])

    def _say(self, beats: Mapping[int, Beat], verdict: Verdict) -> str:
        rank = self._culprit(beats, verdict)
        beat = beats[rank]
        who = f"worker {rank} on {beat['host']}"
        alike = [str(other) for other in sorted({verdict.rank, *verdict.alike} - {rank})]
        others = f" (like {', '.join(alike)})" if alike else ""
        if verdict.silent:
            return (
                f"{who} is silent{others} for {verdict.seconds:.0f} s: its process is stopped or blocked, or its host "
                f"is away; its last word was step {beat['step']}, {beat['doing']}"
            )
        where = f", in {beat['stacks']['where']}" if "stacks" in beat else ""
        return (
            f"{who} stands still{others} for {verdict.seconds:.0f} s (cluster.hang) after step {beat['step']}, "
            f"{beat['doing']}{where}"
        )

    @staticmethod
    def _culprit(beats: Mapping[int, Beat], verdict: Verdict) -> int:
        """Of ranks that stand alike, one that does not merely wait for the others."""
        for rank in (verdict.rank, *verdict.alike):
            if "stacks" in beats[rank] and not beats[rank]["stacks"]["in_collective"]:
                return rank
        return verdict.rank

    def _write(self, beats: Mapping[int, Beat]) -> str:
        """Writes what all ranks did; says where."""
        now = datetime.now(UTC)
        path = self._folder / f"hang-{now:%Y%m%dT%H%M%SZ}.txt"
        parts = [
            f"worker {rank} on {beat['host']}, process {beat['pid']}: step {beat['step']}, {beat['doing']}, "
            f"last progress {beat['idle_s']:.0f} s before its last beat\n\n"
            + (beat["stacks"]["text"] if "stacks" in beat else "no stack: it did not answer\n")
            for rank, beat in sorted(beats.items())
        ]
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{now:%Y-%m-%d %H:%M:%S} UTC\n\n" + "\n\n".join(parts), encoding="utf-8")
        except OSError as error:
            return f"the stacks could not be written ({error})"
        return f"all stacks are in {path}"

    def _kill_left(self, beats: Mapping[int, Beat], now: float) -> None:
        if self._ended is not None and now - self._ended > KILL_S:
            self._ended = None
            for beat in beats.values():
                self._kill(beat)


def heart_of(pulse: "Pulse", board: Any, *, rank: int) -> Heart:
    """The heart of this worker of Ray, which beats to ``board``, an actor of ``cluster.board``."""
    import ray

    from onestage.cluster.board import send_beat, this_host

    node = ray.get_runtime_context().get_node_id()
    return Heart(pulse, lambda beat: send_beat(board, beat), rank=rank, host=this_host(), node=node)


def watchdog_of(board: Any, *, hang_s: float, num_workers: int, folder: Path) -> Watchdog:
    """The watchdog over the workers that beat to ``board``, an actor of ``cluster.board``."""
    from onestage.cluster.board import kill_process, latest_beats

    return Watchdog(
        hang_s=hang_s,
        num_workers=num_workers,
        folder=folder,
        beats=lambda: latest_beats(board),
        order=lambda command: board.order.remote(command),
        kill=kill_process,
    )
