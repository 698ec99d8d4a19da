"""The metrics of a run on disk: a line per call, and how far the store has them."""

import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from onestage.tracking.averaging import Line, grouped, is_open, points_of
from onestage.tracking.delivery import POINTS_PER_CALL, Point, allowed_names


class Journal:
    """``metrics.jsonl``, lines of ``{"step", "time" in ms, "metrics"}``, and ``metrics.sent``, how many bytes arrived.

    One thread appends while another reads and marks. A line cut by a crash is taken off when the journal opens.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "metrics.jsonl"
        self._sent_path = folder / "metrics.sent"
        self._last_step: dict[str, int] = {}
        self.written = self._recover()
        self.sent = min(int(self._sent_path.read_text()), self.written) if self._sent_path.exists() else 0
        self._file = self._path.open("ab", buffering=0)

    def _recover(self) -> int:
        """Read every key's last step; the bytes of whole lines, which is what the file is cut to."""
        self._path.touch()
        whole = 0
        with self._path.open("rb+") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                whole += len(line)
                read = _line(line, whole)
                for key in read.metrics:
                    self._last_step[key] = max(read.step, self._last_step.get(key, read.step))
            file.truncate(whole)
        return whole

    def append(self, metrics: Mapping[str, float], step: int) -> None:
        """Add a line of the points that are new, one write. Raises OSError when the disk takes no more."""
        step = int(step)
        names = allowed_names(metrics)
        values = {names[key]: float(value) for key, value in metrics.items()}
        new = {key: value for key, value in values.items() if step > self._last_step.get(key, step - 1)}
        if not new:
            return
        line = json.dumps({"step": step, "time": int(time.time() * 1000), "metrics": new}).encode() + b"\n"
        if self._file.write(line) != len(line):
            os.ftruncate(self._file.fileno(), self.written)
            raise OSError(f"no space left for {self._path}")
        self.written += len(line)
        self._last_step.update(dict.fromkeys(new, step))

    def unsent(
        self, *, held: Mapping[str, int] = {}, every_s: float = 0.0, last: bool = True
    ) -> tuple[list[Point], int]:
        """The oldest points that wait, about one call's worth, and the offset to `mark_sent` once they arrived.

        Steps within ``every_s`` seconds are one point (`onestage.tracking.averaging`); without ``last`` those of the
        present moment still wait for more of their kind. What the store ``held`` up to a key's step is left out.
        """
        points: list[Point] = []
        end, written = self.sent, self.written
        for group in grouped(self._waiting(written), every_s):
            if not last and group[-1].end == written and is_open(group, every_s):
                break
            points += points_of(group, held)
            end = group[-1].end
            if len(points) >= POINTS_PER_CALL:
                break
        return points, end

    def _waiting(self, written: int) -> Iterator[Line]:
        end = self.sent
        with self._path.open("rb") as file:
            file.seek(end)
            while end < written:
                line = file.readline()
                end += len(line)
                yield _line(line, end)

    def mark_sent(self, offset: int) -> None:
        """Note, in one step that a crash can't halve, that the store has the first ``offset`` bytes."""
        draft = self._sent_path.with_suffix(".sent.part")
        draft.write_text(str(offset))
        os.replace(draft, self._sent_path)
        self.sent = offset

    def close(self) -> None:
        """Take no more lines; what waits can still be read."""
        self._file.close()


def _line(line: bytes, end: int) -> Line:
    try:
        record = json.loads(line)
    except ValueError:  # A power cut can leave a line of zeros.
        return Line(end, 0, 0, {})
    return Line(end, record["step"], record["time"], record["metrics"])
