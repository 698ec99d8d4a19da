"""What the verbs show at a terminal: progress, and text that a stranger wrote."""

import argparse
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def plain(text: str) -> str:
    r"""``text`` without what would move a terminal's cursor, change its colours or break a line.

    >>> plain("a\x1b[2Jb\nc")
    'a?[2Jb?c'
    """
    return "".join(character if character.isprintable() else "?" for character in text)


def size(text: str) -> list[int]:
    """An option's [H, W], in pixels.

    >>> size("416"), size("320x640")
    ([416, 416], [320, 640])
    """
    sides = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if sides is None:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a side, as 416, nor height and width, as 320x640")
    return [int(sides[1]), int(sides[2] or sides[1])]


@contextmanager
def steps() -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    """``step(name)`` starts a bar on stderr, with its rate, and returns what moves it: ``tell(done, total)``.

    Nothing is left of it afterwards, and nothing is shown where stderr is no terminal.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
    from rich.progress import TimeRemainingColumn as Left
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:,.0f} images/s" if task.speed else "")

    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(), Left())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:

        def step(name: str) -> Callable[[int, int], None]:
            for task in bar.tasks:
                bar.update(task.id, visible=False)
            started = bar.add_task(name, total=None)
            return lambda done, total: bar.update(started, completed=done, total=total)

        yield step
