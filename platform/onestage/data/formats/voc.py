"""Pascal VOC: Annotations/*.xml beside JPEGImages, splits in ImageSets/Main (VOC2012 development kit, sec. 3).

Without ImageSets everything is "train". Where there is no Annotations folder, the xml files may lie beside their
images, all in one folder or in one for each split, as labelImg and Roboflow leave them.
"""

import math
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator
from pathlib import Path, PureWindowsPath
from typing import Final

from onestage.data.formats import findings as kinds
from onestage.data.formats.files import PICTURES, within
from onestage.data.formats.record import Annotated, Annotation, Finding, Labelled
from onestage.data.formats.stored import Stored
from onestage.errors import InputError

ANNOTATIONS: Final = ("Annotations", "annotations")
LISTS: Final = ("train", "val", "test", "trainval")
SPLIT_FOLDERS: Final = {"train": "train", "val": "val", "valid": "val", "test": "test"}
EXACT: Final = "onestage"
"""The <source><annotation> of our own files, whose corners are exact: a box may be narrower than a pixel."""


def read(source: Path | str, *, classes: Iterable[str] | None = None, name: str | None = None) -> Labelled:
    """What the annotations of a VOC folder say.

    An annotation belongs to the image of its own stem; only where there is none do its <filename> and <path> count.
    ``trainval`` counts as "train" only where neither train nor val is listed. ``classes`` says which there are and in
    what order; otherwise they are those found. The dataset's ``name`` is the folder's unless given.
    """
    folder = Path(source)
    findings: list[Finding] = []
    splits: dict[str, list[Annotated]] = {}
    parts: dict[Path, _Part] = {}
    for split, part, stems in _parts(folder, findings):
        splits.setdefault(split, []).extend(_annotated(part, stems, folder=folder, findings=findings))
        parts[part.annotations] = part
    for part in parts.values():
        _find_unannotated(part, folder, findings)
    return Labelled(
        name=name or folder.resolve().name,
        classes=None if classes is None else tuple(classes),
        splits=splits,
        findings=findings,
    )


class _Part:
    """The annotations and images of one folder, by stem."""

    def __init__(self, annotations: Path, images: Path) -> None:
        self.annotations = annotations
        self.xmls = {path.stem: path for path in sorted(annotations.glob("*.xml"))}
        files = [path for path in images.glob("*") if path.suffix.lower() in PICTURES]
        # Where a stem has several images, the first of PICTURES is taken.
        files.sort(key=lambda path: PICTURES.index(path.suffix.lower()), reverse=True)
        self.images = {path.stem: path for path in files}
        self.named: dict[str, str] = {}
        """By stems of images, those of annotations that are called otherwise, and that they belong to."""

    def image_of(self, stem: str, root: ET.Element) -> Path | None:
        """The image of an annotation: its own name's, else one that it names and that no other has."""
        if stem in self.images:
            return self.images[stem]
        for tag in ("filename", "path"):
            named = PureWindowsPath(root.findtext(tag, "").strip()).stem
            free = named in self.images and named not in self.xmls
            if free and self.named.setdefault(named, stem) == stem:
                return self.images[named]
        return None


def _parts(folder: Path, findings: list[Finding]) -> Iterator[tuple[str, _Part, list[str]]]:
    """Each split with the folder and the stems that it has there."""
    annotations = next((child for one in ANNOTATIONS if any((child := folder / one).glob("*.xml"))), None)
    if annotations is not None:
        image_folders = (folder / child for child in ("JPEGImages", "images", "Images"))
        images = next((child for child in image_folders if child.is_dir()), annotations)
        part = _Part(annotations, images)
        for split, stems in _listed(folder, part, findings).items():
            yield split, part, stems
        return
    children = {child.name.lower(): child for child in sorted(folder.glob("*")) if child.is_dir()}
    split_folders = [(split, children[child]) for child, split in SPLIT_FOLDERS.items() if child in children]
    beside = [(split, child) for split, child in [("train", folder), *split_folders] if any(child.glob("*.xml"))]
    if not beside:
        raise InputError(f"{folder} is not a Pascal VOC folder (no Annotations/*.xml): give the folder that holds them")
    for split, child in beside:
        part = _Part(child, child)
        yield split, part, list(part.xmls)


def _listed(folder: Path, part: _Part, findings: list[Finding]) -> dict[str, list[str]]:
    """The stems of each split, as ImageSets/Main lists them; an xml that is listed nowhere is a finding."""
    lists: dict[str, list[str]] = {}
    for split in LISTS:
        path = folder / "ImageSets" / "Main" / f"{split}.txt"
        if path.is_file():
            lines = (line.strip() for line in path.read_text(encoding="utf-8-sig", errors="replace").split("\n"))
            # A name may have spaces; but a class's list says behind each name whether the class is there.
            lists[split] = [line if line in part.xmls else line.split()[0] for line in lines if line]
    trainval = lists.pop("trainval", None)
    if trainval is not None and not {"train", "val"} & set(lists):
        lists = {"train": trainval, **lists}
    if not lists:
        return {"train": list(part.xmls)}
    known = {stem for stems in lists.values() for stem in stems}
    findings += [
        Finding(kinds.IN_NO_SPLIT, within(path, folder), f"listed in no file of {folder / 'ImageSets' / 'Main'}")
        for stem, path in part.xmls.items()
        if stem not in known
    ]
    return lists


def _annotated(part: _Part, stems: list[str], *, folder: Path, findings: list[Finding]) -> Iterator[Annotated]:
    seen = set()
    for stem in stems:
        xml = part.xmls.get(stem)
        where = within(xml or part.annotations / f"{stem}.xml", folder)
        if stem in seen:
            findings.append(Finding(kinds.LISTED_TWICE, where, "in one split"))
            continue
        seen.add(stem)
        if xml is None:
            if stem not in part.images:  # otherwise the image is what is reported
                findings.append(
                    Finding(kinds.MISSING_ANNOTATION, where, "listed in a split, but there is no such file")
                )
            continue
        try:
            root = ET.fromstring(xml.read_bytes(), parser=ET.XMLParser(target=_PlainXml()))
            annotations = list(_objects(root))
        except (ET.ParseError, ValueError, LookupError, OSError) as error:
            findings.append(Finding(kinds.UNREADABLE_ANNOTATION, where, str(error)))
            continue
        path = part.image_of(stem, root)
        if path is None:
            findings.append(Finding(kinds.MISSING_IMAGE, where, f"{stem}.jpg or .png"))
            continue
        yield Annotated(
            path=path,
            source=within(path, folder),
            where=where,
            annotations=annotations,
            declared_size=_declared_size(root),
        )


class _PlainXml(ET.TreeBuilder):
    def doctype(self, name: str, pubid: str, system: str) -> None:
        # Entities, which can swell a small file to gigabytes, can only be declared in a DOCTYPE.
        raise ValueError("it has a DOCTYPE, which annotations do not need")


def _objects(root: ET.Element) -> Iterator[Annotation]:
    exact = root.findtext("source/annotation", "").strip() == EXACT
    for node in root.findall("object"):
        name = node.findtext("name", "").strip()
        if not name:
            raise ValueError("an object without a name")
        corners = [float(node.findtext(f"bndbox/{side}", "nan")) for side in ("xmin", "ymin", "xmax", "ymax")]
        if not all(math.isfinite(corner) for corner in corners):
            raise ValueError(f"a {name} without all of xmin, ymin, xmax and ymax")
        left, top, right, bottom = corners
        # Corners are 1-based and inclusive. Equal ones would span a pixel, but what draws them is a slip of the mouse.
        box = (
            left - 1,
            top - 1,
            right if exact or right > left else right - 1,
            bottom if exact or bottom > top else bottom - 1,
        )
        difficult, crowd = (node.findtext(mark, "0").strip() == "1" for mark in ("difficult", "crowd"))
        yield Annotation(name, box, difficult=difficult, crowd=crowd)


def _declared_size(root: ET.Element) -> tuple[int, int] | None:
    """What <size> says, unless it is missing or filled with zeros."""
    try:
        width, height = (int(float(root.findtext(f"size/{side}", "0"))) for side in ("width", "height"))
    except (ValueError, OverflowError):
        return None
    return (width, height) if width > 0 and height > 0 else None


def _find_unannotated(part: _Part, folder: Path, findings: list[Finding]) -> None:
    findings += [
        Finding(kinds.MISSING_ANNOTATION, within(path, folder), f"there is no {stem}.xml")
        for stem, path in sorted(part.images.items())
        if stem not in part.xmls and stem not in part.named
    ]


class VocWriter:
    """Writes Annotations, JPEGImages and ImageSets/Main.

    Corners that are no whole numbers are written as decimals, and a crowd's box has a <crowd> that only we read.
    """

    def __init__(self, folder: Path, *, name: str, classes: tuple[str, ...]) -> None:
        if unfit := [one for one in classes if not one.isprintable()]:
            raise InputError(f"class {unfit[0]!r} has characters that XML can't hold: export as coco")
        self.folder = folder
        self.name = name
        self.classes = classes
        self.lists: dict[str, list[str]] = {}
        self.num_crowds = 0
        for child in ("Annotations", "JPEGImages", "ImageSets/Main"):
            (folder / child).mkdir(parents=True)

    def add(self, split: str, image: Stored) -> int:
        """Write one more image of ``split``; how many of its boxes the format could take."""
        self.lists.setdefault(split, []).append(image.stem)
        self.num_crowds += sum(image.crowd)
        (self.folder / "JPEGImages" / image.name).write_bytes(image.content)
        tree = ET.ElementTree(self._annotation(image))
        ET.indent(tree)
        tree.write(self.folder / "Annotations" / f"{image.stem}.xml", encoding="utf-8")
        return len(image.boxes)

    def close(self) -> list[str]:
        """Write the lists; what the format could not keep, a sentence each."""
        for split, stems in self.lists.items():
            path = self.folder / "ImageSets" / "Main" / f"{split}.txt"
            path.write_text("".join(f"{stem}\n" for stem in stems), encoding="utf-8")
        others = [split for split in self.lists if split not in LISTS]
        return [f"split {split}: listed, but VOC knows train, val and test only" for split in others] + [
            f"crowds: {self.num_crowds:,} boxes are marked <crowd>, which other tools take for single objects"
        ] * (self.num_crowds > 0)

    def _annotation(self, image: Stored) -> ET.Element:
        root = ET.Element("annotation")
        _texts(root, folder="JPEGImages", filename=image.name)
        _texts(ET.SubElement(root, "source"), database=self.name if self.name.isprintable() else "", annotation=EXACT)
        _texts(ET.SubElement(root, "size"), width=str(image.width), height=str(image.height), depth="3")
        _texts(root, segmented="0")
        for box, label, difficult, crowd in zip(image.boxes, image.labels, image.difficult, image.crowd, strict=True):
            node = ET.SubElement(root, "object")
            _texts(node, name=self.classes[label], pose="Unspecified", truncated="0", difficult=str(int(difficult)))
            if crowd:
                _texts(node, crowd="1")
            left, top, right, bottom = box
            corners = {"xmin": left + 1, "ymin": top + 1, "xmax": right, "ymax": bottom}
            _texts(ET.SubElement(node, "bndbox"), **{side: _number(corner) for side, corner in corners.items()})
        return root


def _texts(node: ET.Element, **texts: str) -> None:
    for tag, text in texts.items():
        ET.SubElement(node, tag).text = text


def _number(value: float) -> str:
    """Whole numbers without a point, as most tools expect them.

    >>> _number(12.0), _number(0.1)
    ('12', '0.1')
    """
    return str(int(value)) if float(value).is_integer() else repr(float(value))
