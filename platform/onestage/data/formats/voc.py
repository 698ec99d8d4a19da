"""Pascal VOC: Annotations/*.xml beside JPEGImages, splits in ImageSets/Main (VOC2012 development kit, sec. 3)."""

import math
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from onestage.data.formats.record import Box, Finding, Record, Source
from onestage.errors import InputError

IMAGE_SUFFIXES: Final = (".jpg", ".jpeg", ".png")
CONVENTION_PX: Final = 1.0
"""Corners are 1-based and inclusive; annotation tools that count from 0 are off by this much, which is no finding."""


@dataclass(frozen=True, slots=True)
class _Object:
    name: str
    corners: Box
    difficult: bool


def read(folder: Path | str, *, classes: Iterable[str] | None = None, name: str | None = None) -> Source:
    """Read a VOC folder.

    Classes are sorted by name unless ``classes`` gives them, and then any other is an ``InputError``; so is a missing
    image or annotation. ``trainval`` counts as "train" only where neither train nor val is listed; without ImageSets
    everything is "train". The dataset's ``name`` is the folder's unless given.
    """
    folder = Path(folder)
    if not any((folder / "Annotations").glob("*.xml")):
        raise InputError(f"{folder} is not a Pascal VOC folder (no Annotations/*.xml): give the folder that holds them")
    images = _images(folder / "JPEGImages")
    stems = _splits(folder)
    parsed = {stem: _parse(_annotation(folder, stem)) for split in stems.values() for stem in split}
    found = sorted({item.name for _, items in parsed.values() for item in items})
    labels = {label: index for index, label in enumerate(found if classes is None else classes)}
    if unknown := [label for label in found if label not in labels]:
        beside = f"{', '.join(unknown)} beside {', '.join(labels)}"
        raise InputError(f"{folder} has classes {beside}: name them all in classes")

    findings = _unlisted(folder, parsed) + _repeated(stems)
    splits: dict[str, list[Record]] = {}
    for split, members in stems.items():
        splits[split] = []
        for stem in members:
            file_name, items = parsed[stem]
            path = images.get(stem) or images.get(Path(file_name).stem)
            where = f"Annotations/{stem}.xml"
            if path is None:
                raise InputError(f"{folder / where} has no image: put {stem}.jpg or .png into {folder / 'JPEGImages'}")
            splits[split].append(_record(path, items, labels=labels, where=where, findings=findings))
    return Source(name=name or folder.resolve().name, classes=tuple(labels), splits=splits, findings=findings)


def _images(folder: Path) -> dict[str, Path]:
    """Stem to image file; where a stem has several, the first of ``IMAGE_SUFFIXES`` is taken."""
    files = [path for path in folder.glob("*") if path.suffix.lower() in IMAGE_SUFFIXES]
    files.sort(key=lambda path: IMAGE_SUFFIXES.index(path.suffix.lower()), reverse=True)
    return {path.stem: path for path in files}


def _splits(folder: Path) -> dict[str, list[str]]:
    """The stems of each split."""
    lists = {split: folder / "ImageSets" / "Main" / f"{split}.txt" for split in ("train", "val", "test", "trainval")}
    listed = {
        split: [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        for split, path in lists.items()
        if path.is_file()
    }
    trainval = listed.pop("trainval", None)
    if trainval is not None and not {"train", "val"} & set(listed):
        listed = {"train": trainval, **listed}
    return listed or {"train": sorted(path.stem for path in (folder / "Annotations").glob("*.xml"))}


def _annotation(folder: Path, stem: str) -> Path:
    path = folder / "Annotations" / f"{stem}.xml"
    if not path.is_file():
        raise InputError(f"{folder / 'ImageSets'} lists {stem!r} but there is no {path}: add it or take the line out")
    return path


class _PlainXml(ET.TreeBuilder):
    def doctype(self, name: str, pubid: str, system: str) -> None:
        # Entities, which can swell a small file to gigabytes, can only be declared in a DOCTYPE.
        raise ValueError("it has a DOCTYPE, which annotations do not need")


def _parse(path: Path) -> tuple[str, list[_Object]]:
    """An annotation's <filename> and objects; ``InputError`` names the file that cannot be read."""
    try:
        root = ET.fromstring(path.read_bytes(), parser=ET.XMLParser(target=_PlainXml()))
        return root.findtext("filename", ""), [_object(node) for node in root.findall("object")]
    except (ET.ParseError, ValueError) as error:
        raise InputError(f"{path} is no Pascal VOC annotation ({error}): mend or remove it") from error


def _object(node: ET.Element) -> _Object:
    name = node.findtext("name", "").strip()
    if not name:
        raise ValueError("an object without a name")
    corners = tuple(float(node.findtext(f"bndbox/{side}", "nan")) for side in ("xmin", "ymin", "xmax", "ymax"))
    if not all(math.isfinite(corner) for corner in corners):
        raise ValueError(f"a {name} without all of xmin, ymin, xmax and ymax")
    left, top, right, bottom = corners
    return _Object(name, (left, top, right, bottom), node.findtext("difficult", "0").strip() == "1")


def _record(path: Path, items: list[_Object], *, labels: dict[str, int], where: str, findings: list[Finding]) -> Record:
    """The record of one image; what had to be left out or clipped is added to ``findings``."""
    width, height = _size(path)
    kept: list[tuple[Box, _Object]] = []
    for item in items:
        left, top, right, bottom = item.corners
        corners = f"xmin {left:g}, ymin {top:g}, xmax {right:g}, ymax {bottom:g}"
        what = f"{item.name} with {corners} in an image of {width}x{height}"
        if right <= left or bottom <= top:
            findings.append(Finding("box without area", where, what))
            continue
        box = (left - 1, top - 1, right, bottom)
        clipped = (max(box[0], 0.0), max(box[1], 0.0), min(right, float(width)), min(bottom, float(height)))
        if clipped[2] <= clipped[0] or clipped[3] <= clipped[1]:
            findings.append(Finding("box outside the image", where, what))
            continue
        if max(abs(a - b) for a, b in zip(box, clipped, strict=True)) > CONVENTION_PX:
            findings.append(Finding("box clipped to the image", where, what))
        kept.append((clipped, item))
    return Record(
        path=path,
        width=width,
        height=height,
        boxes=[box for box, _ in kept],
        labels=[labels[item.name] for _, item in kept],
        difficult=[item.difficult for _, item in kept],
        crowd=[False for _ in kept],
        source=f"{path.parent.name}/{path.name}",
    )


def _size(path: Path) -> tuple[int, int]:
    """Width and height from the image's header: the xml's <size> is often wrong."""
    from PIL import Image

    try:
        with Image.open(path, formats=("JPEG", "PNG")) as image:
            return image.size
    except OSError as error:
        raise InputError(f"{path} is no JPEG or PNG image that can be read: mend or remove it") from error


def _unlisted(folder: Path, listed: Iterable[str]) -> list[Finding]:
    known = set(listed)
    others = sorted(path.stem for path in (folder / "Annotations").glob("*.xml") if path.stem not in known)
    return [Finding("image in no split", f"Annotations/{stem}.xml", "left out") for stem in others]


def _repeated(stems: dict[str, list[str]]) -> list[Finding]:
    seen: dict[str, str] = {}
    findings = []
    for split, members in stems.items():
        for stem in members:
            if stem in seen:
                where = f"ImageSets/Main/{split}.txt"
                findings.append(Finding("image listed twice", where, f"{stem}, also in {seen[stem]}"))
            seen[stem] = split
    return findings
