"""The run's log: what happened to a training, when, and what it cost; for people a line, for programs a JSON line."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NamedTuple, TypedDict

from onestage.cluster.board import Start
from onestage.cluster.storage import write_json

REACHED_FILE: Final = "reached.json"
"""Beside the history: the last step that was heard of, for the next process."""
REACHED_EVERY_S: Final = 1.0


class _Reached(NamedTuple):
    """The last step that was heard of, the images by then, and when that was, in monotonic seconds."""

    step: int
    images: int
    at: float


class Summary(TypedDict):
    """``restarts`` after anything but the end; ``recovery_s`` from the last step before each to the first one after."""

    restarts: int
    lost_steps: int
    lost_images: int
    recovery_s: list[float]


class History:
    """Writes ``file``, one JSON object a line, from the messages of ``cluster.board``, and says each to ``say``.

    A file that is there is gone on with: what was reached by then is compared with where the training starts now.
    Steps are told at most twice a second, so that up to half a second of them may be lost unseen. Never raises for a
    disk: a history that cannot be written is said once.

    ``clock`` gives monotonic seconds; ``now`` the time of day, which alone bridges two processes.
    """

    def __init__(
        self,
        file: Path,
        *,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._file = file
        self._say = say
        self._clock = clock
        self._now = now
        self._failed = False
        self._summary = Summary(restarts=0, lost_steps=0, lost_images=0, recovery_s=[])
        self._workers: int | None = None
        self._over = False  # whether the last that is written is the end of a finished training
        self._read()
        self._reached = self._read_reached()
        self._kept_at = -REACHED_EVERY_S
        self._arrived: dict[int, Start] = {}  # of a group that is starting
        self._hosts: dict[int, str] = {}  # of the last that has
        self._first: Start | None = None
        self._resumed_from: Start | None = None  # until the first step of the group

    def summary(self) -> Summary:
        """Of the whole run so far, over all its processes."""
        return {**self._summary, "recovery_s": list(self._summary["recovery_s"])}

    def hear(self, message: Mapping[str, Any]) -> None:
        """Any message of a worker or of the driver; those that tell of no event are passed over."""
        if "started" in message:
            self._start(message["started"])
        elif "step" in message:
            self._step(message["step"], message.get("images"))
        elif "lost" in message:
            self._lose(message)
        elif "hang" in message:
            self._write("hang", f"hang: {message['hang']}", why=message["hang"])
        elif "checkpoint" in message:
            self._write("checkpoint", message["checkpoint"], what=message["checkpoint"])
        elif "note" in message:
            self._write("note", None, what=message["note"])

    def end(self, how: str, reason: str | None = None) -> None:
        """The training's end: ``finished``, ``failed``, ``preempted``, ``interrupted``; ``reason`` in one line."""
        reached = self._reached
        self._keep_reached()
        # For people the command itself says it.
        self._write(how, None, reason=reason, step=reached.step if reached else None, **self._summary)

    def _start(self, start: Start) -> None:
        """Each rank tells; the group has started when all have."""
        if start["rank"] in self._arrived:  # of a group that never was complete
            self._arrived = {}
        self._arrived[start["rank"]] = start
        if len(self._arrived) < start["world_size"]:
            return
        self._hosts = {rank: one["host"] for rank, one in self._arrived.items()}
        self._arrived = {}
        step, workers = start["step"], start["world_size"]
        hosts = sorted(set(self._hosts.values()))
        again = self._reached is not None and not self._over
        self._write(
            "started",
            f"started: {_count(workers, 'worker')} on {', '.join(hosts)}, {start['global_batch']} images a step, "
            f"from step {step}",
            workers=workers,
            hosts=hosts,
            global_batch=start["global_batch"],
            step=step,
            images=start["images"],
            again=again,
        )
        if self._workers is not None and self._workers != workers:
            text = f"resized from {_count(self._workers, 'worker')} to {workers}"
            self._write("resized", text, before=self._workers, workers=workers, step=step)
        self._workers = workers
        self._first = start
        self._resumed_from = start if again else None
        self._summary["restarts"] += again
        self._over = False

    def _step(self, step: int, images: int | None) -> None:
        now, start = self._clock(), self._resumed_from
        if start is not None and step <= start["step"]:  # a validation before the first step
            return
        if images is None:
            first = self._first
            images = first["images"] + (step - first["step"]) * first["global_batch"] if first else 0
        before, self._reached = self._reached, _Reached(step, images, now)
        if start is not None and before is not None:
            self._resumed_from = None
            self._resume(before, start, now)
        if now - self._kept_at >= REACHED_EVERY_S:
            self._keep_reached()

    def _resume(self, before: _Reached, start: Start, now: float) -> None:
        """The first step of a group that goes on from a checkpoint: now it is known what the loss cost."""
        steps = max(before.step - start["step"], 0)
        images = max(before.images - start["images"], 0)
        seconds = round(max(now - before.at, 0.0), 1)
        self._summary["lost_steps"] += steps
        self._summary["lost_images"] += images
        self._summary["recovery_s"].append(seconds)
        self._write(
            "resumed",
            f"resumed at step {start['step']} after having reached step {before.step}: lost {_count(steps, 'step')} "
            f"({_count(images, 'image')}), {seconds:g} s from the last step before to the first step after",
            step=start["step"],
            reached=before.step,
            lost_steps=steps,
            lost_images=images,
            recovery_s=seconds,
        )

    def _lose(self, message: Mapping[str, Any]) -> None:
        hosts = {rank: self._hosts[rank] for rank in message.get("ranks", []) if rank in self._hosts}
        named = "".join(f" (worker {rank} on {host})" for rank, host in hosts.items())
        step = self._reached.step if self._reached else None
        self._keep_reached()
        at = "before the first step" if step is None else f"at step {step}"
        why = message["lost"]
        self._write("lost", f"lost {at}: {why}{named}", why=why, step=step, hosts={str(r): h for r, h in hosts.items()})
        pause_s, restart, limit = message["pause_s"], message["restart"], message["limit"]
        self._write(
            "restart",
            f"starting again in {pause_s:g} s ({restart} of at most {limit} without progress)",
            restart=restart,
            limit=limit,
            pause_s=pause_s,
        )
        self._arrived = {}

    def _write(self, event: str, text: str | None, **facts: Any) -> None:
        """One line in the file, and ``text`` for people."""
        if text is not None:
            self._say(text)
        record = {"at": f"{self._now():%Y-%m-%dT%H:%M:%S.%f}Z", "event": event, **facts}
        self._to_disk(lambda: self._append(json.dumps(record) + "\n"))

    def _append(self, line: str) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a+b") as file:
            if file.tell() > 0:  # a line that was cut by a full disk or a kill stays alone
                file.seek(-1, 2)
                line = line if file.read(1) == b"\n" else "\n" + line
            file.write(line.encode())

    def _keep_reached(self) -> None:
        if self._reached is None:
            return
        self._kept_at = self._clock()
        path = self._file.with_name(REACHED_FILE)
        ago = self._kept_at - self._reached.at
        kept = {"step": self._reached.step, "images": self._reached.images, "at": self._now().timestamp() - ago}
        self._to_disk(lambda: write_json(path, kept))

    def _to_disk(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            if not self._failed:
                self._failed = True
                self._say(f"the history cannot be written ({error}); the training goes on without it")

    def _read(self) -> None:
        """Sums up what earlier processes wrote."""
        for record in _records(self._file):
            event = record.get("event")
            if event == "started":
                self._workers = record["workers"]
                self._summary["restarts"] += record["again"]
            elif event == "resumed":
                self._summary["lost_steps"] += record["lost_steps"]
                self._summary["lost_images"] += record["lost_images"]
                self._summary["recovery_s"].append(record["recovery_s"])
            self._over = event == "finished" or (self._over and event == "note")

    def _read_reached(self) -> _Reached | None:
        try:
            kept = json.loads(self._file.with_name(REACHED_FILE).read_text())
            ago = self._now().timestamp() - kept["at"]
            return _Reached(kept["step"], kept["images"], self._clock() - max(ago, 0.0))
        except (OSError, ValueError, KeyError, TypeError):
            return None


def _records(file: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a history; there may be none yet, or one that was cut."""
    try:
        lines = file.read_bytes().splitlines()
    except OSError:
        return
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            continue


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
