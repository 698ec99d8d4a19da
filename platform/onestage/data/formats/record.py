"""What every format is read into: first as it was annotated, then, mended, as it is packed.

A reader says what the files say (``Labelled``); ``onestage.data.clean`` looks at the images and makes of it what can be
learnt from (``Source``), with a finding for each thing that it had to mend or leave out.
"""

from dataclasses import dataclass, field
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
class Annotation:
    """One box as it was drawn, maybe beyond the image or without area; ``name`` is its class."""

    name: str
    box: Box
    difficult: bool = False
    crowd: bool = False


@dataclass(frozen=True, slots=True)
class Annotated:
    """One image and what its annotation says.

    ``source`` names the image within its set (a relative path), ``where`` the file that annotates it. Boxes are in
    pixels, or where ``relative`` in shares of the image's sides. ``declared_size`` is the width and height that the
    annotation claims, which may be wrong, or those before an EXIF rotation.
    """

    path: Path
    source: str
    where: str
    annotations: list[Annotation]
    relative: bool = False
    declared_size: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Labelled:
    """A set as its files describe it. ``classes`` is None where the format has no list of them: then those found."""

    name: str
    classes: tuple[str, ...] | None
    splits: dict[str, list[Annotated]]
    findings: list[Finding] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Record:
    """One image that can be learnt from: the four lists have one entry per box, which lies inside and has area.

    ``width`` and ``height`` in pixels and the boxes are those of the upright picture: ``orientation`` (EXIF's, 1 to 8)
    says how to turn the stored one. ``source`` names the image within the set it was read from.
    """

    path: Path
    width: int
    height: int
    boxes: list[Box]
    labels: list[int]
    difficult: list[bool]
    crowd: list[bool]
    source: str
    orientation: int = 1


@dataclass(frozen=True, slots=True)
class Source:
    """A dataset that can be packed: ``labels`` of its records index ``classes``."""

    name: str
    classes: tuple[str, ...]
    splits: dict[str, list[Record]]
    findings: list[Finding]
