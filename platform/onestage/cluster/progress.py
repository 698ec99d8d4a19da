"""The training's progress for a person: a bar at a terminal, a line now and then in a file; always on stderr."""

import time
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_EVERY_S = 10.0
MAX_NAMED = 3


class ProgressBar:
    """Called with what ``training.callbacks.Progress`` tells."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.bar = Progress(
            TextColumn("{task.description}"),
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
            return
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
