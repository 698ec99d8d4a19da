"""The files of a set: which are pictures, and how they are named."""

from pathlib import PurePath
from typing import Final

from onestage.data.images import SUFFIXES

PICTURES: Final = (*SUFFIXES, ".jfif", ".bmp", ".gif", ".heic", ".tif", ".tiff", ".webp")
"""Suffixes of pictures, likely ones first: those that no import can take are to be told of, not passed over."""


def within(path: PurePath, root: PurePath) -> str:
    """The path from ``root`` on, with forward slashes; the file's name where it lies elsewhere."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
