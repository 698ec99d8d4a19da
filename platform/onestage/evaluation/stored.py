"""``detections.json``: the truth and the detections of a split in one file, for other programs and later comparisons.

The file is a dataset in COCO's format (https://cocodataset.org/#format-data) with its results under ``detections``.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

from onestage.data.manifest import key_of
from onestage.errors import InputError
from onestage.training.module import Found
from onestage.types import XYXY, Detections, Target

FILE_NAME: Final = "detections.json"
VERSION: Final = 1


class Stored(NamedTuple):
    """What was ``found`` by ``run`` in ``split`` of the dataset with that content hash, in the order of its images."""

    run: str
    split: str
    dataset_hash: str
    classes: list[str]
    threshold: float
    found: list[Found]


def write(stored: Stored, folder: Path) -> Path:
    """Into ``folder``; boxes with hundredths of a pixel, scores with five digits."""
    folder.mkdir(parents=True, exist_ok=True)
    info = {
        "format": VERSION,
        "run": stored.run,
        "split": stored.split,
        "dataset_hash": stored.dataset_hash,
        "threshold": stored.threshold,
    }
    content = {
        "info": info,
        "images": [{"id": one.image_id, "file_name": key_of(one.image_id)} for one in stored.found],
        "categories": [{"id": label, "name": name} for label, name in enumerate(stored.classes)],
        "annotations": [{"id": number, **one} for number, one in enumerate(_truths(stored.found), start=1)],
        "detections": list(_results(stored.found)),
    }
    file = folder / FILE_NAME
    file.write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")
    return file


def read(file: Path) -> Stored:
    """What ``write`` wrote; InputError for anything else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        info = content["info"]
        if info["format"] != VERSION:
            raise InputError(f"{file} has format {info['format']}, not {VERSION}: evaluate the run again")
        rows: dict[int, tuple[list[Any], list[Any]]] = {image["id"]: ([], []) for image in content["images"]}
        for one in content["annotations"]:
            rows[one["image_id"]][0].append(one)
        for one in content["detections"]:
            rows[one["image_id"]][1].append(one)
        found = [_found(image_id, *both) for image_id, both in rows.items()]
        classes = [one["name"] for one in content["categories"]]
        return Stored(info["run"], info["split"], info["dataset_hash"], classes, info["threshold"], found)
    except (OSError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{file} is no {FILE_NAME} of an evaluation ({error}): evaluate the run again") from error


def _truths(found: Sequence[Found]) -> Iterator[dict[str, Any]]:
    for one in found:
        target = one.target
        unset = torch.zeros(len(target.labels), dtype=torch.bool)
        marks = [unset if mark is None else mark for mark in (target.crowd, target.difficult)]
        rows = zip(target.boxes.tolist(), target.labels.tolist(), *(mark.tolist() for mark in marks), strict=True)
        for box, label, crowd, difficult in rows:
            corner = _corner_and_size(box)
            yield {
                "image_id": one.image_id,
                "category_id": label,
                "bbox": corner,
                "area": round(corner[2] * corner[3], 2),
                "iscrowd": int(crowd),
                "difficult": int(difficult),
            }


def _results(found: Sequence[Found]) -> Iterator[dict[str, Any]]:
    for one in found:
        detections = one.detections
        rows = zip(detections.boxes.tolist(), detections.labels.tolist(), detections.scores.tolist(), strict=True)
        for box, label, score in rows:
            bbox = _corner_and_size(box)
            yield {"image_id": one.image_id, "category_id": label, "bbox": bbox, "score": round(score, 5)}


def _corner_and_size(box: Sequence[float]) -> list[float]:
    left, top, right, bottom = box
    return [round(value, 2) for value in (left, top, right - left, bottom - top)]


def _found(image_id: int, truths: Sequence[Any], results: Sequence[Any]) -> Found:
    detections = Detections(
        _boxes(results),
        torch.tensor([one["score"] for one in results], dtype=torch.float32),
        torch.tensor([one["category_id"] for one in results], dtype=torch.int64),
    )
    target = Target(
        _boxes(truths),
        torch.tensor([one["category_id"] for one in truths], dtype=torch.int64),
        image_id,
        crowd=torch.tensor([bool(one["iscrowd"]) for one in truths], dtype=torch.bool),
        difficult=torch.tensor([bool(one["difficult"]) for one in truths], dtype=torch.bool),
    )
    return Found(image_id, detections, target)


def _boxes(rows: Sequence[Any]) -> XYXY:
    boxes = torch.tensor([one["bbox"] for one in rows], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return XYXY(boxes)
