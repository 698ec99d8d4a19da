"""What a format's writer is given: the images of a dataset folder, one after the other."""

from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Protocol

from onestage.data.formats.record import Box


@dataclass(frozen=True, slots=True)
class Stored:
    """An image's file as it is stored, and its boxes in pixels of the upright picture of ``width`` x ``height``.

    ``name`` is its file's, with the suffix; no two images of a dataset have the same stem.
    """

    name: str
    content: bytes
    width: int
    height: int
    boxes: list[Box]
    labels: list[int]
    difficult: list[bool]
    crowd: list[bool]

    @property
    def stem(self) -> str:
        return PurePath(self.name).stem


class Writer(Protocol):
    """Writes a dataset into an empty folder in a format's layout."""

    def __init__(self, folder: Path, *, name: str, classes: tuple[str, ...]) -> None: ...

    def add(self, split: str, image: Stored) -> int:
        """Write one more image of ``split``; how many of its boxes the format could take."""

    def close(self) -> list[str]:
        """Write what is about the whole set; what the format could not keep, a sentence each."""
