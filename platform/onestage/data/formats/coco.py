"""COCO: one json for each split, with images, annotations and categories (cocodataset.org/#format-data).

Three layouts are known: annotations/instances_{split}.json beside the images' folders, {split}/_annotations.coco.json
among its images as Roboflow leaves it, and a json beside its images or their folder.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from onestage.data.formats import findings as kinds
from onestage.data.formats.files import within
from onestage.data.formats.record import Annotated, Annotation, Box, Finding, Labelled
from onestage.data.formats.stored import Stored
from onestage.errors import InputError

ANNOTATIONS: Final = "annotations"
ROBOFLOW: Final = "_annotations.coco.json"
SPLITS: Final = ("train", "val", "test")
MARKS: Final = {"difficult": "difficult", "crowd": "iscrowd"}
ALIASES: Final = {"valid": "val", "validation": "val", "default": "train"}
"""Names that other tools give to our splits; CVAT's "default" is all there is."""


@dataclass(frozen=True, slots=True)
class _File:
    """One json: its split, what it says, and the folders in which its images may lie, likely ones first."""

    path: Path
    split: str
    content: dict[str, Any]
    folders: list[Path]


def read(source: Path | str, *, classes: Iterable[str] | None = None, name: str | None = None) -> Labelled:
    """What a COCO folder or json says.

    Labels follow the category ids' order, which need not be 1 to K, unless ``classes`` gives the names in another
    order or fewer of them. The dataset's ``name`` is the folder's unless given.
    """
    source = Path(source)
    root = source if source.is_dir() else source.parent
    if source.is_file() and root.name == ANNOTATIONS:  # COCO's own: the images' folders are beside it
        root = root.parent
    files = [
        _File(path, split, content, _image_folders(path, split, root=root))
        for path, split, content in _files(source, root)
    ]
    findings: list[Finding] = []
    categories = _categories(files, root=root, findings=findings)
    if classes is not None and (unknown := [one for one in classes if one not in categories.values()]):
        there = ", ".join(categories.values())
        raise InputError(f"{source} has no class {', '.join(unknown)}: choose from {there}")
    splits: dict[str, list[Annotated]] = {}
    for file in sorted(files, key=lambda one: SPLITS.index(one.split) if one.split in SPLITS else len(SPLITS)):
        if file.split in splits:
            both = " and ".join(str(one.path) for one in files if one.split == file.split)
            raise InputError(f"{both} are both the split {file.split!r}: give one of them, or rename it")
        splits[file.split] = list(_annotated(file, categories, root=root, findings=findings))
    return Labelled(
        name=name or root.resolve().name,
        classes=tuple(categories.values() if classes is None else classes),
        splits=splits,
        findings=findings,
    )


def _files(source: Path, root: Path) -> list[tuple[Path, str, dict[str, Any]]]:
    """The json files that annotate images, with their splits."""
    if source.is_file():
        return [(source, _split_of(source, alone=True), _load(source))]
    beside = sorted([*root.glob(ROBOFLOW), *root.glob(f"*/{ROBOFLOW}")])
    if beside:
        return [
            (path, _split_named(path.parent.name if path.parent != root else "train"), _load(path)) for path in beside
        ]
    for folder in (root / ANNOTATIONS, root):
        paths = sorted(folder.glob("*.json"))
        # COCO's own folder has captions and keypoints of the same images as well.
        paths = [path for path in paths if path.name.startswith("instances")] or paths
        loaded = [(path, content) for path in paths if _annotates(content := _load(path))]
        if loaded:
            return [(path, _split_of(path, alone=len(loaded) == 1), content) for path, content in loaded]
    raise InputError(
        f"{source} is no COCO dataset: give a folder with annotations/instances_SPLIT.json, one whose folders have "
        f"{ROBOFLOW}, or a json file"
    )


def _load(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            content = json.load(file, object_hook=_without_outline)
    except FileNotFoundError as error:
        raise InputError(f"no file {path}: check the path") from error
    except (ValueError, RecursionError, OSError) as error:
        raise InputError(f"{path} is no json that can be read ({error}): mend it or make it again") from error
    return content if isinstance(content, dict) else {}


def _without_outline(fields: dict[str, Any]) -> dict[str, Any]:
    """Outlines are most of a file's size, and only needed where there is no box."""
    if fields.get("bbox"):
        fields.pop("segmentation", None)
    return fields


def _annotates(content: dict[str, Any]) -> bool:
    return all(isinstance(content.get(part), list) for part in ("images", "annotations", "categories"))


def _split_of(path: Path, *, alone: bool) -> str:
    """The split that a file's name tells: instances_train2017.json is "train"; if it tells none, the name itself.

    >>> _split_of(Path("instances_val2017.json"), alone=False), _split_of(Path("result.json"), alone=True)
    ('val', 'train')
    """
    words = [word.lower() for word in re.findall(r"[A-Za-z]+", path.stem)]
    named = [_split_named(word) for word in words]
    found = next((word for word in named if word in SPLITS), None)
    if found is None and (path.stem.startswith("instances_") or not alone):
        return _split_named(path.stem.removeprefix("instances_"))
    return found or "train"


def _split_named(word: str) -> str:
    plain = re.sub(r"[^a-z0-9_]+", "-", word.lower()).strip("-")
    return ALIASES.get(plain, plain) or "train"


def _image_folders(path: Path, split: str, *, root: Path) -> list[Path]:
    """The folders that a file's names may be relative to; those of its own split first."""
    own = path.stem.removeprefix("instances_")
    names = [own, split, *(alias for alias, meant in ALIASES.items() if meant == split)]
    tops = [path.parent] if path.name == ROBOFLOW else [root / "images", root, path.parent]
    folders = [top / name for top in tops for name in names if name] + [path.parent / "images", *tops]
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def _categories(files: list[_File], *, root: Path, findings: list[Finding]) -> dict[Any, str]:
    """Category id to name, in the ids' order, but for one that only groups others; all files must have the same."""
    found: dict[Any, str] = {}
    for file in files:
        if not _annotates(file.content):
            raise InputError(f"{file.path} has no lists of images, annotations and categories: it is no COCO file")
        try:
            ordered = sorted(file.content["categories"], key=lambda one: one["id"])
            categories = {one["id"]: str(one["name"]).strip() for one in ordered}
        except (KeyError, TypeError) as error:
            raise InputError(f"{file.path} has a category without id and name, or with an odd one: mend it") from error
        if len(categories) < len(ordered):
            raise InputError(f"{file.path} has two categories of one id: mend them")
        if found and categories != found:
            raise InputError(f"{file.path} and {files[0].path} have different categories: make them the same")
        found = categories
    if not found:
        raise InputError(f"{files[0].path} has no categories: add them")
    if (group := _grouping(files, found)) is not None:
        findings.append(Finding(kinds.GROUPING_CLASS, within(files[0].path, root), found.pop(group)))
    if len(set(found.values())) < len(found) or not all(found.values()):
        raise InputError(f"{files[0].path} has two categories of one name, or one without: mend them")
    return found


def _grouping(files: list[_File], categories: dict[Any, str]) -> Any | None:
    """The id of the category that Roboflow adds as the group of all others, if it has no boxes.

    A class may have the same name.
    """
    groups = {one["id"]: one.get("supercategory") for one in files[0].content["categories"]}
    for category, name in categories.items():
        others = [group for other, group in groups.items() if other != category]
        if others and groups[category] == "none" and all(group == name for group in others):
            annotations = (one for file in files for one in file.content["annotations"])
            used = any(isinstance(one, dict) and one.get("category_id") == category for one in annotations)
            return None if used else category
    return None


def _annotated(file: _File, categories: dict[Any, str], *, root: Path, findings: list[Finding]) -> Iterator[Annotated]:
    where = within(file.path, root)
    drawn = _annotations(file, categories, where=where, findings=findings)
    seen: dict[Path, Annotated] = {}
    for image in file.content["images"]:
        file_name = str(image["file_name"]).replace("\\", "/")
        if file_name.startswith("/") or ".." in file_name.split("/"):
            findings.append(Finding(kinds.ELSEWHERE, where, file_name))
            continue
        path = next((path for folder in file.folders if _is_file(path := folder / file_name)), None)
        if path is None:
            findings.append(Finding(kinds.MISSING_IMAGE, where, file_name))
            continue
        if path in seen:
            findings.append(Finding(kinds.LISTED_TWICE, where, file_name))
            seen[path].annotations.extend(drawn[image["id"]])
            continue
        seen[path] = Annotated(
            path=path,
            source=within(path, root),
            where=f"{where}, image {image['id']}",
            annotations=drawn[image["id"]],
            declared_size=_declared_size(image),
        )
    yield from seen.values()


def _annotations(
    file: _File, categories: dict[Any, str], *, where: str, findings: list[Finding]
) -> dict[Any, list[Annotation]]:
    """Image id to its boxes."""
    drawn: dict[Any, list[Annotation]] = {}
    for image in file.content["images"]:
        if not isinstance(image, dict) or not image.get("file_name") or not isinstance(image.get("id"), int | str):
            raise InputError(f"{file.path} has an image without id or file_name: {str(image)[:80]}")
        if image["id"] in drawn:
            raise InputError(f"{file.path} has two images with the id {image['id']}: number them anew")
        drawn[image["id"]] = []
    for number, one in enumerate(file.content["annotations"]):
        at = f"{where}, annotation {one.get('id', number) if isinstance(one, dict) else number}"
        try:
            box = _box(one)
            image_id, category = one["image_id"], one["category_id"]
            if image_id not in drawn:
                findings.append(Finding(kinds.MISSING_IMAGE, at, f"there is no image {image_id}"))
            elif category not in categories:
                findings.append(Finding(kinds.UNKNOWN_CLASS, at, f"there is no category {category}"))
            else:
                marks = {mark: bool(int(one.get(field) or 0)) for mark, field in MARKS.items()}
                drawn[image_id].append(Annotation(categories[category], box, **marks))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            what = f"no field {error}" if isinstance(error, KeyError) else str(error)
            findings.append(Finding(kinds.UNREADABLE_ANNOTATION, at, what))
    return drawn


def _box(annotation: dict[str, Any]) -> Box:
    """The box, or the one around the outline where there is none; ``ValueError`` where there is neither."""
    if annotation.get("bbox"):
        left, top, width, height = (float(value) for value in annotation["bbox"])
        box = (left, top, left + width, top + height)
    else:
        outline = annotation.get("segmentation")
        if not isinstance(outline, list) or not outline:
            raise ValueError("it has neither a bbox nor a polygon")
        points = [float(value) for polygon in outline for value in polygon]
        box = (min(points[::2]), min(points[1::2]), max(points[::2]), max(points[1::2]))
    if not all(math.isfinite(side) for side in box):
        raise ValueError(f"its box is not finite: {box}")
    return box


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that no file can have, such as one too long
        return False


def _declared_size(image: dict[str, Any]) -> tuple[int, int] | None:
    try:
        width, height = int(image["width"]), int(image["height"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    return (width, height) if width > 0 and height > 0 else None


class CocoWriter:
    """Writes annotations/instances_{split}.json, and the images into {split}.

    ``difficult`` is a field of our own beside ``iscrowd``; ``area`` is the box's.
    """

    def __init__(self, folder: Path, *, name: str, classes: tuple[str, ...]) -> None:
        self.folder = folder
        self.name = name
        self.classes = classes
        self.images: dict[str, list[dict[str, Any]]] = {}
        self.annotations: dict[str, list[dict[str, Any]]] = {}
        self.num_images = 0
        self.num_boxes = 0
        (folder / "annotations").mkdir(parents=True)

    def add(self, split: str, image: Stored) -> int:
        """Write one more image of ``split``; how many of its boxes the format could take."""
        if split not in self.images:
            self.images[split], self.annotations[split] = [], []
            (self.folder / split).mkdir(exist_ok=True)
        (self.folder / split / image.name).write_bytes(image.content)
        self.num_images += 1
        self.images[split].append(
            {"id": self.num_images, "file_name": image.name, "width": image.width, "height": image.height}
        )
        for box, label, difficult, crowd in zip(image.boxes, image.labels, image.difficult, image.crowd, strict=True):
            left, top, right, bottom = box
            self.num_boxes += 1
            self.annotations[split].append(
                {
                    "id": self.num_boxes,
                    "image_id": self.num_images,
                    "category_id": label + 1,
                    "bbox": [left, top, right - left, bottom - top],
                    "area": (right - left) * (bottom - top),
                    "iscrowd": int(crowd),
                    "difficult": int(difficult),
                }
            )
        return len(image.boxes)

    def close(self) -> list[str]:
        """Write the json files. The format keeps everything."""
        for split, images in self.images.items():
            content = {
                "info": {"description": self.name},
                "images": images,
                "annotations": self.annotations[split],
                "categories": [{"id": number, "name": one} for number, one in enumerate(self.classes, start=1)],
            }
            path = self.folder / "annotations" / f"instances_{split}.json"
            path.write_text(json.dumps(content), encoding="utf-8")
        return []
