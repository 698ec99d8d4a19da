"""YOLO: a txt of relative boxes for each image, in labels/ beside images/; a data.yaml names splits and classes.

A label line is `class cx cy w h` in shares of the image's sides, or `class x1 y1 x2 y2 …`, a polygon
(docs.ultralytics.com/datasets/detect). Where there is no yaml, images/ and labels/ with a classes.txt do as well.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Final

from onestage.data.formats import findings as kinds
from onestage.data.formats.files import PICTURES, within
from onestage.data.formats.record import Annotated, Annotation, Box, Finding, Labelled
from onestage.data.formats.stored import Stored
from onestage.errors import InputError

SPLITS: Final = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""The keys of a data.yaml, or folders under images/, and the splits that they mean."""
CLASSES: Final = "classes.txt"
NAME_FILES: Final = (CLASSES, f"labels/{CLASSES}", "obj.names")
MAX_UNNAMED: Final = 10_000
"""Classes that are numbered where they have no names: more is a slip."""
DIGITS: Final = 10
"""Significant ones of a written number: of an image of 10,000 pixels, a millionth of one."""


@dataclass(slots=True)
class _Set:
    """What data.yaml or the folders say, and what was found on the way. ``root`` is what sources are relative to."""

    root: Path
    where: str
    names: list[str]
    entries: dict[str, list[str]]
    bases: list[Path]
    num_keypoint_values: int = 0
    findings: list[Finding] = field(default_factory=list)
    polygons: Counter[str] = field(default_factory=Counter)


def read(source: Path | str, *, classes: Iterable[str] | None = None, name: str | None = None) -> Labelled:
    """What a data.yaml, or the folder that holds it, says.

    Labels follow ``names`` unless ``classes`` gives the names in another order or fewer of them. An image without a
    txt has no boxes. The dataset's ``name`` is the folder's unless given.
    """
    described = _describe(Path(source))
    if classes is not None and (unknown := [one for one in classes if one not in described.names]):
        raise InputError(f"{source} has no class {', '.join(unknown)}: choose from {', '.join(described.names)}")
    splits: dict[str, list[Annotated]] = {}
    num_labelled = 0
    for split, paths in _paths(described):
        images = splits.setdefault(split, [])
        for path in paths:
            labels = _labels_of(path)
            num_labelled += labels is not None
            image = _annotated(path, labels, described)
            if image is not None:
                images.append(image)
    if not any(splits.values()):
        missed = next((f" ({finding.kind}: {finding.what})" for finding in described.findings), "")
        raise InputError(f"{source} leads to no image{missed}: check the paths in it, which may be relative to it")
    if not num_labelled:
        example = next(image.path for images in splits.values() for image in images)
        raise InputError(f"no image of {source} has a txt: {example} needs {_label_paths(example)[0]}")
    _find_unpictured(splits, described)
    if described.polygons:
        what = f"{described.polygons.total():,} in {len(described.polygons):,} files"
        described.findings.append(Finding(kinds.POLYGONS, described.where, what))
    return Labelled(
        name=name or described.root.resolve().name,
        classes=tuple(described.names if classes is None else classes),
        splits=splits,
        findings=described.findings,
    )


def _describe(source: Path) -> _Set:
    if source.is_file():
        return _from_yaml(source)
    yamls = sorted([*source.glob("*.yaml"), *source.glob("*.yml")])
    path = next((path for path in yamls if path.stem in ("data", "dataset")), yamls[0] if len(yamls) == 1 else None)
    if path is not None:
        return _from_yaml(path)
    names = next((path for one in NAME_FILES if (path := source / one).is_file()), None)
    if names is None or not (source / "images").is_dir():
        raise InputError(f"{source} is no YOLO dataset: give a data.yaml, or a folder with one or with classes.txt")
    entries: dict[str, list[str]] = {}
    for child, split in SPLITS.items():
        if (source / "images" / child).is_dir():
            entries.setdefault(split, []).append(f"images/{child}")
    return _Set(
        root=source,
        where=names.name,
        names=_distinct([line.strip() for line in _listed(names) if line.strip()], names),
        entries=entries or {"train": ["images"]},
        bases=[source],
    )


def _from_yaml(path: Path) -> _Set:
    import yaml

    try:
        # Not safe_load, which builds as little but takes the class "no" for False.
        fields = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=yaml.BaseLoader)
    except FileNotFoundError as error:
        raise InputError(f"no file {path}: check the path") from error
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is no yaml that can be read ({' '.join(str(error).split())}): mend it") from error
    if not isinstance(fields, dict):
        raise InputError(f"{path} is no data.yaml: it has no train, val and names")
    root = path.parent
    base = root / _posix(str(fields.get("path", "")))
    return _Set(
        root=root,
        where=path.name,
        names=_names(fields, path),
        entries=_entries(fields, path),
        bases=[base, root] if _is_there(base) else [root],
        num_keypoint_values=_num_keypoint_values(fields, path),
    )


def _names(fields: dict[str, Any], path: Path) -> list[str]:
    """The classes in order, from a list, or from a dict by their numbers."""
    names = fields.get("names")
    try:
        if isinstance(names, dict):
            numbered = {int(number): one for number, one in names.items()}
            if sorted(numbered) != list(range(len(names))):
                raise InputError(f"{path} numbers its names {sorted(numbered)}: number them from 0 without a gap")
            names = [numbered[number] for number in range(len(numbered))]
        if names is None and "nc" in fields:
            if int(fields["nc"]) > MAX_UNNAMED:
                raise InputError(f"{path} has {fields['nc']} classes without names: list them there")
            names = [f"class_{number}" for number in range(int(fields["nc"]))]
        if not isinstance(names, list) or not names or not all(isinstance(one, str) for one in names):
            raise InputError(f"{path} has no names: list the classes there")
        if "nc" in fields and int(fields["nc"]) != len(names):
            raise InputError(f"{path} says nc: {fields['nc']} but has {len(names)} names: mend one of them")
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(f"{path} has numbers of classes that are none ({error}): mend names and nc") from error
    return _distinct([one.strip() for one in names], path)


def _distinct(names: list[str], path: Path) -> list[str]:
    twice = [name or "an empty one" for name, count in Counter(names).items() if count > 1 or not name]
    if twice or not names:
        raise InputError(f"{path} needs names that differ (see: {', '.join(twice) or 'no name'}): mend it")
    return names


def _entries(fields: dict[str, Any], path: Path) -> dict[str, list[str]]:
    entries: dict[str, list[str]] = {}
    for key, split in SPLITS.items():
        values = fields.get(key)
        values = values if isinstance(values, list) else [values]
        if any(isinstance(value, dict | list) for value in values):
            raise InputError(f"{path} has a {key} that is no path and no list of paths: mend it")
        # BaseLoader leaves an empty value, null and ~ as text.
        entries.setdefault(split, []).extend(value for value in values if value not in (None, "", "null", "~"))
    entries = {split: values for split, values in entries.items() if values}
    if not entries:
        raise InputError(f"{path} has no train, val or test: say where the images are")
    return entries


def _num_keypoint_values(fields: dict[str, Any], path: Path) -> int:
    """How many values of keypoints follow each box, where ``kpt_shape`` says that it is such a set."""
    shape = fields.get("kpt_shape")
    if shape is None:
        return 0
    try:
        if not isinstance(shape, list):
            raise TypeError
        num_points, num_values = (int(side) for side in shape)
        return num_points * num_values
    except (TypeError, ValueError) as error:
        raise InputError(f"{path} has a kpt_shape that is no list of two numbers: mend it or take it out") from error


def _paths(described: _Set) -> Iterator[tuple[str, list[Path]]]:
    """The images of each split, in order, each once."""
    for split, values in described.entries.items():
        paths: dict[Path, None] = {}
        for value in values:
            place = _find(value, described.bases)
            if place is None:
                described.findings.append(
                    Finding(kinds.MISSING_SPLIT, described.where, f"{split}: there is no {value}")
                )
                continue
            for path in _images_of(place, described):
                if path in paths:
                    where = within(path, described.root)
                    described.findings.append(Finding(kinds.LISTED_TWICE, where, f"in {split}"))
                paths[path] = None
        if paths:
            yield split, list(paths)


def _find(value: str, bases: list[Path]) -> Path | None:
    """A path as the yaml or a list gives it; Roboflow's lead out of a folder that it thinks the yaml is in."""
    plain = _posix(value)
    inner = plain
    while inner.startswith("../"):
        inner = inner.removeprefix("../")
    return next((path for one in (plain, inner) for base in bases if _is_there(path := base / one)), None)


def _is_there(path: Path) -> bool:
    try:
        return path.is_file() or path.is_dir()
    except OSError:  # a name that no file can have, such as one too long
        return False


def _images_of(place: Path, described: _Set) -> Iterator[Path]:
    """The images under a folder by name, or those that a txt lists."""
    if place.is_dir():
        yield from sorted(path for path in place.rglob("*") if path.suffix.lower() in PICTURES)
        return
    if place.suffix.lower() in PICTURES:
        yield place
        return
    for number, line in enumerate(_listed(place), start=1):
        if not line.strip():
            continue
        path = _find(line.strip(), [place.parent, *described.bases])
        if path is None or not path.is_file():
            where = f"{within(place, described.root)}:{number}"
            described.findings.append(Finding(kinds.MISSING_IMAGE, where, line.strip()))
            continue
        yield path


def _label_paths(image: Path) -> list[Path]:
    """Where an image's labels may be: in the ``labels`` beside the last ``images`` of its path, or beside itself."""
    parts = list(image.parent.parts)
    beside = image.with_suffix(".txt")
    if "images" not in parts:
        return [beside]
    last = len(parts) - 1 - parts[::-1].index("images")
    parts[last] = "labels"
    return [Path(*parts) / beside.name, beside]


def _labels_of(image: Path) -> Path | None:
    return next((path for path in _label_paths(image) if path.is_file()), None)


def _annotated(path: Path, labels: Path | None, described: _Set) -> Annotated | None:
    """One image with its boxes; None, and a finding, where its labels are no text."""
    where = within(labels or path, described.root)
    annotations: list[Annotation] = []
    try:
        lines = _lines(labels) if labels is not None else []
    except (OSError, ValueError) as error:
        described.findings.append(Finding(kinds.UNREADABLE_ANNOTATION, where, str(error)))
        return None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            label, box, is_polygon = _parse(line, num_keypoint_values=described.num_keypoint_values)
        except ValueError as error:
            described.findings.append(Finding(kinds.UNREADABLE_ANNOTATION, f"{where}:{number}", str(error)))
            continue
        if not 0 <= label < len(described.names):
            what = f"{label}, where classes run from 0 to {len(described.names) - 1}"
            described.findings.append(Finding(kinds.UNKNOWN_CLASS, f"{where}:{number}", what))
            continue
        if is_polygon:
            described.polygons[where] += 1
        annotations.append(Annotation(described.names[label], box))
    return Annotated(
        path=path, source=within(path, described.root), where=where, annotations=annotations, relative=True
    )


def _parse(line: str, *, num_keypoint_values: int) -> tuple[int, Box, bool]:
    """Class, box in shares of the image, and whether it was a polygon; ``ValueError`` says what is wrong.

    >>> _parse("1 0.5 0.5 0.25 0.5", num_keypoint_values=0)
    (1, (0.375, 0.25, 0.625, 0.75), False)
    """
    first, *values = (float(word) for word in line.split())
    if not all(math.isfinite(value) for value in [first, *values]) or first != int(first):
        raise ValueError(f"{line.strip()[:80]!r} has numbers that can't be")
    if len(values) == 4 or (num_keypoint_values and len(values) == 4 + num_keypoint_values):
        x, y, width, height = values[:4]
        return int(first), (x - width / 2, y - height / 2, x + width / 2, y + height / 2), False
    if len(values) < 6 or len(values) % 2:
        raise ValueError(f"{len(values) + 1} numbers, where a box has 5, and a polygon 7, 9, 11 or more")
    xs, ys = values[::2], values[1::2]
    return int(first), (min(xs), min(ys), max(xs), max(ys)), True


def _find_unpictured(splits: dict[str, list[Annotated]], described: _Set) -> None:
    """Label files whose image is gone, in the folders that go with those of the images."""
    seen: set[Path] = set()
    for image in chain.from_iterable(splits.values()):
        folder = image.path.parent
        labels = _label_paths(image.path)[0].parent
        if labels == folder or folder in seen:  # beside images, other texts may lie as well
            continue
        seen.add(folder)
        stems = {path.stem for path in folder.iterdir()}
        described.findings += [
            Finding(kinds.MISSING_IMAGE, within(path, described.root), f"{path.stem}.jpg or .png")
            for path in sorted(labels.glob("*.txt"))
            if path.stem not in stems and path.name != CLASSES
        ]


def _listed(path: Path) -> list[str]:
    """The lines of a list of images or names, without which there is no set."""
    try:
        return _lines(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no list that can be read ({error}): save it as UTF-8 text") from error


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8-sig").split("\n")


def _posix(value: str) -> str:
    """A path with forward slashes and nothing before its first folder."""
    return value.strip().replace("\\", "/").removeprefix("./")


class YoloWriter:
    """Writes images/{split}, labels/{split} and data.yaml. Crowds, which it has no mark for, are left out."""

    def __init__(self, folder: Path, *, name: str, classes: tuple[str, ...]) -> None:
        self.folder = folder
        self.classes = classes
        self.splits: list[str] = []
        self.num_crowds = 0
        self.num_difficult = 0

    def add(self, split: str, image: Stored) -> int:
        """Write one more image of ``split``; how many of its boxes the format could take."""
        images, labels = self.folder / "images" / split, self.folder / "labels" / split
        if split not in self.splits:
            self.splits.append(split)
            images.mkdir(parents=True)
            labels.mkdir(parents=True)
        (images / image.name).write_bytes(image.content)
        lines = [
            _line(box, label, image)
            for box, label, crowd in zip(image.boxes, image.labels, image.crowd, strict=True)
            if not crowd
        ]
        (labels / f"{image.stem}.txt").write_text("".join(lines), encoding="utf-8")
        self.num_crowds += sum(image.crowd)
        marks = zip(image.difficult, image.crowd, strict=True)
        self.num_difficult += sum(difficult and not crowd for difficult, crowd in marks)
        return len(lines)

    def close(self) -> list[str]:
        """Write data.yaml; what the format could not keep, a sentence each."""
        import yaml

        folders = {split: f"images/{split}" for split in self.splits}
        # Without a path, which other tools would take from where they are run, folders are relative to the yaml.
        content = {**folders, "names": dict(enumerate(self.classes))}
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        (self.folder / "data.yaml").write_text(text, encoding="utf-8")
        lost = [f"split {split}: YOLO knows train, val and test only" for split in self.splits if split not in SPLITS]
        if self.num_crowds:
            lost.append(f"crowds: {self.num_crowds:,} boxes are left out, as YOLO would take them for single objects")
        if self.num_difficult:
            lost.append(f"difficult: {self.num_difficult:,} boxes are written without this mark")
        return lost


def _line(box: Box, label: int, image: Stored) -> str:
    left, top, right, bottom = box
    shares = (
        (left + right) / 2 / image.width,
        (top + bottom) / 2 / image.height,
        (right - left) / image.width,
        (bottom - top) / image.height,
    )
    return f"{label} {' '.join(f'{share:.{DIGITS}g}' for share in shares)}\n"
