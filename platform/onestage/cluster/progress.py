"""The training's progress for a person: a bar at a terminal, a line now and then in a file; always on stderr."""

import time
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_EVERY_S = 10.0
MAX_NAMED = 3


class ProgressBar:
    """Called with the messages of ``cluster.board``; those that it has nothing to show of are passed over."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("starting", total=None, numbers="")
        self.printed = 0.0
        self.waited = -LINE_EVERY_S

    def __enter__(self) -> Self:
        self.bar.start()
        if not self.console.is_terminal:
            self.console.print("starting")
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def __call__(self, message: dict[str, Any]) -> None:
        if "skipped" in message:
            self._name(message["skipped"], message["file"])
        elif "note" in message:
            self._line(message["note"])
        elif "waiting" in message:
            self._wait(message["waiting"])
        elif "lost" in message:
            self.bar.update(self.task, description=f"starting again in {message['pause_s']:g} s")
        elif "step" in message:
            self._step(message)

    def _line(self, text: str) -> None:
        """One line above the bar."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _wait(self, text: str) -> None:
        """What is waited for, in the bar's place; where there is no bar, a line now and then."""
        self.bar.update(self.task, description=f"waiting: {text}")
        if not self.console.is_terminal and time.monotonic() - self.waited >= LINE_EVERY_S:
            self.waited = time.monotonic()
            self._line(f"waiting: {text}")

    def _step(self, message: dict[str, Any]) -> None:
        epoch = f"epoch {min(message['epoch'] + 1, message['num_epochs'])}/{message['num_epochs']}"
        numbers = " ".join(
            f"{label} {message[name]:{form}}"
            for name, label, form in (
                ("train/loss", "loss", ".2f"),
                ("val/map_50", "mAP@0.5", ".3f"),
                ("perf/images_per_s", "images/s", ".1f"),
            )
            if name in message
        )
        self.bar.update(
            self.task, description=epoch, total=message["num_steps"], completed=message["step"], numbers=numbers
        )
        if not self.console.is_terminal and time.monotonic() - self.printed > LINE_EVERY_S:
            self.printed = time.monotonic()
            self.console.print(f"{epoch} step {message['step']}/{message['num_steps']} {numbers}", highlight=False)

    def _name(self, skipped: list[str], file: str) -> None:
        """A few of the images that the training goes on without; the others are in ``file``."""
        for one in skipped[:MAX_NAMED]:
            self.console.print(f"skipped {one}", style="yellow", highlight=False, markup=False, soft_wrap=True)
        if (more := len(skipped) - MAX_NAMED) > 0:
            self.console.print(f"skipped {more} more: see {file}", style="yellow", highlight=False, soft_wrap=True)
