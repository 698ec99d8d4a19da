"""What every format is read into, before it is packed."""

from dataclasses import dataclass
from pathlib import Path

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels, (0, 0) being the image's outer corner."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something in the data that was mended or left out: of which ``kind``, ``where`` (a file), and ``what`` it was."""

    kind: str
    where: str
    what: str


@dataclass(frozen=True, slots=True)
class Record:
    """One annotated image: ``width`` and ``height`` in pixels, the four lists with one entry per box.

    ``source`` names the image within the folder it was read from.
    """

    path: Path
    width: int
    height: int
    boxes: list[Box]
    labels: list[int]
    difficult: list[bool]
    crowd: list[bool]
    source: str


@dataclass(frozen=True, slots=True)
class Source:
    """A dataset as it was read: ``labels`` of its records index ``classes``."""

    name: str
    classes: tuple[str, ...]
    splits: dict[str, list[Record]]
    findings: list[Finding]
