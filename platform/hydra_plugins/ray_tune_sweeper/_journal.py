"""What happened in a sweep, as lines of JSON that outlive whatever wrote them: `trials.jsonl` in the sweep's folder."""

import fcntl
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal

from hydra.errors import HydraException

from hydra_plugins.ray_tune_sweeper._space import Point

NAME: Final = "trials.jsonl"
OUT_OF_TIME: Final = ("hours", "trial_hours")  # why a sweep ended that may go on
LOOK_S: Final = 1.0
"""Those who only look whether a sweep is at work hold its lock for a moment."""

State = Literal["unfinished", "done", "stopped", "failed", "lost"]


class Damaged(HydraException):
    """A line that was not the last, and so not cut short by a kill, can't be read."""


@dataclass
class Trial:
    """One trial as the journal knows it. ``stopped``: by the scheduler; ``lost``: its process is gone, run it again."""

    number: int
    point: Point
    overrides: list[str]
    state: State = "unfinished"
    results: list[dict[str, Any]] = field(default_factory=list)
    heard: list[float] = field(default_factory=list)  # when each result was, in seconds since 1970
    starts: int = 0
    losses: int = 0
    started: float | None = None  # seconds since 1970, as is ended_at: of the last start
    ended_at: float | None = None
    spent_s: float = 0.0  # running, as far as it was heard
    heard_at: float | None = None  # while it runs
    value: float | None = None
    returned: Any = None
    working_dir: str | None = None
    reason: str | None = None

    def hear(self, now: float) -> None:
        if self.heard_at is not None:
            self.spent_s, self.heard_at = self.spent_s + now - self.heard_at, now

    @property
    def ended(self) -> bool:
        """For good, so that no resume runs it again."""
        return self.state not in ("unfinished", "lost")


class Journal:
    """The trials of a sweep in memory, and on disk whatever changes them, line by line.

    ``read`` looks at any folder at any time; ``open`` writes too, and one process alone can have it open.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header: dict[str, Any] = {}
        self.trials: dict[int, Trial] = {}
        self.ended_because: str | None = None  # of the sweep: all, hours, interrupted, or an error's words
        self._file: BinaryIO | None = None
        self._good = 0  # bytes that are whole lines
        if path.exists():
            self._load(path.read_bytes())

    @classmethod
    def read(cls, folder: Path) -> "Journal":
        return cls(Path(folder) / NAME)

    @classmethod
    def open(cls, folder: Path) -> "Journal":
        """Raises HydraException where another process has it open."""
        path = Path(folder) / NAME
        path.touch()
        file = path.open("r+b")
        deadline = time.monotonic() + LOOK_S
        while not _locked(file, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                file.close()
                raise HydraException(f"another sweep is at work in {folder}: wait for its end, or stop it")
            time.sleep(0.05)
        journal = cls(path)
        journal._file = file
        file.seek(journal._good)  # a damaged last line is written over
        file.truncate()
        return journal

    def close(self) -> None:
        assert self._file
        self._file.close()

    def add(self, event: str, **fields: Any) -> None:
        """Writes what happened to the disk, then takes it in."""
        assert self._file, "read only"
        line = {"event": event, "time": round(time.time(), 3), **fields}
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._take(line)

    def _load(self, content: bytes) -> None:
        lines = content.splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            try:
                if not line.endswith(b"\n"):
                    raise ValueError("cut short")
                self._take(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                if number < len(lines):
                    raise Damaged(f"{self.path}:{number} is damaged ({error}): remove the line") from None
                return
            self._good += len(line)

    def _take(self, line: dict[str, Any]) -> None:
        event = line["event"]
        if event == "sweep":
            self.header, self.ended_because = line, None
            for trial in self.trials.values():  # those that a killed sweep left behind have ended with it
                trial.heard_at = None
        elif event == "sweep_end":
            self.ended_because = line["reason"]
            for trial in self.trials.values():
                trial.hear(line["time"])
                trial.heard_at = None
        elif event == "trial":
            self.trials[line["trial"]] = Trial(line["trial"], line["point"], line["overrides"])
        else:
            trial = self.trials[line["trial"]]
            if event == "start":
                trial.point, trial.overrides, trial.state = line["point"], line["overrides"], "unfinished"
                trial.starts, trial.started, trial.heard_at = trial.starts + 1, line["time"], line["time"]
            elif event == "result":
                trial.results.append(line["metrics"])
                trial.heard.append(line["time"])
                trial.hear(line["time"])
            elif event == "end":
                trial.hear(line["time"])
                trial.heard_at = None
                trial.ended_at = line["time"]
                for name in ("state", "value", "returned", "working_dir", "reason"):
                    setattr(trial, name, line.get(name))
                trial.losses += trial.state == "lost"

    def spent_s(self, now: float) -> float:
        """Seconds of all trials together, those that run counted until ``now``."""
        running = (now - trial.heard_at for trial in self.trials.values() if trial.heard_at is not None)
        return sum(trial.spent_s for trial in self.trials.values()) + sum(running)

    @property
    def at_work(self) -> bool:
        """Whether a process has it open to write."""
        if not self.path.exists():
            return False
        with self.path.open("rb") as file:
            return not _locked(file, fcntl.LOCK_SH)

    def unfinished(self) -> list[Trial]:
        return [trial for trial in self.trials.values() if not trial.ended]

    def best(self, sign: int) -> Trial | None:
        """The trial with the highest ``sign * value``: of those done, and where none is, of those stopped early."""
        for state in ("done", "stopped"):
            found = [one for one in self.trials.values() if one.state == state and one.value is not None]
            if found:
                return max(found, key=lambda one: sign * (one.value or 0.0))
        return None


def _locked(file: BinaryIO, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
