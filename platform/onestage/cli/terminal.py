"""What verbs share at a terminal: options, progress, and text that a stranger wrote."""

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from onestage.errors import InputError

FORMATS: Final = ("voc", "coco", "yolo")
"""How labelled images come in and go out."""


def plain(text: str) -> str:
    r"""``text`` without what would move a terminal's cursor, change its colours or break a line.

    >>> plain("a\x1b[2Jb\nc")
    'a?[2Jb?c'
    """
    return "".join(character if character.isprintable() else "?" for character in text)


def count(text: str) -> int:
    """An option's whole number from 1 on."""
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def size(text: str) -> list[int]:
    """An option's [H, W], in pixels.

    >>> size("416"), size("320x640")
    ([416, 416], [320, 640])
    """
    sides = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if sides is None:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a side, as 416, nor height and width, as 320x640")
    return [int(sides[1]), int(sides[2] or sides[1])]


def names(text: str) -> list[str]:
    """An option's list of classes.

    >>> names("cat, dog")
    ['cat', 'dog']
    """
    listed = [name.strip() for name in text.split(",")]
    if not all(listed) or len(set(listed)) < len(listed):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of different names, as cat,dog")
    return listed


def take(key: str, overrides: Sequence[str]) -> tuple[str | None, list[str]]:
    """The last value of an evaluation's own ``key``, and the rest, which are the config's."""
    for one in overrides:
        if "=" not in one:
            raise InputError(f"{one!r} is no override: write KEY=VALUE, as split=test")
    value = next((one.partition("=")[2] for one in reversed(overrides) if one.startswith(f"{key}=")), None)
    return value, [one for one in overrides if not one.startswith(f"{key}=")]


def age(seconds: float) -> str:
    """In the largest unit that fits.

    >>> age(59), age(3600), age(200_000)
    ('59 s', '60 min', '55 h')
    """
    for unit, length, until in (("s", 1, 60), ("min", 60, 7200), ("h", 3600, 259_200)):
        if seconds < until:
            return f"{int(seconds // length)} {unit}"
    return f"{int(seconds // 86_400)} days"


@contextmanager
def writing(out: Path | None) -> Iterator[None]:
    """A place that can't be written to is no fault of the program: one line says which and why."""
    try:
        yield
    except OSError as error:
        what = f"{error.filename or out} can't be written to ({error.strerror or error})"
        raise InputError(f"{what}: choose another place, or make room there") from error


@contextmanager
def steps(unit: str = "images") -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    """``step(name)`` starts a bar on stderr, with its rate, and returns what moves it: ``tell(done, total)``.

    Nothing is left of it afterwards, and nothing is shown where stderr is no terminal.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
    from rich.progress import TimeRemainingColumn as Left
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:,.0f} {unit}/s" if task.speed else "")

    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(), Left())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:

        def step(name: str) -> Callable[[int, int], None]:
            for task in bar.tasks:
                bar.update(task.id, visible=False)
            started = bar.add_task(name, total=None)
            return lambda done, total: bar.update(started, completed=done, total=total)

        yield step
