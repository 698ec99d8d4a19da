"""All that is told about the detections of a split: numbers, a table by class, and what the pictures show.

K classes, I images.
"""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from onestage.data.manifest import key_of
from onestage.metrics import tide
from onestage.metrics.calibration import Calibration, calibration
from onestage.metrics.confusion import confusion
from onestage.metrics.curves import Curve, best_threshold, curves
from onestage.metrics.matching import IOUS, Ints, matched
from onestage.metrics.tide import HIT, KINDS, Judged
from onestage.metrics.voc import VocAP
from onestage.training.module import Found

AT_75: Final = 5
"""The place of IoU 0.75 among ``IOUS``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """``found`` (I) of a split, and what it comes to; ``threshold`` is the score from which the model is believed.

    ``curves`` are those of the classes with truths at each of ``IOUS``; ``judged`` (I) are the errors among detections
    from the threshold on; ``costs`` and ``counts`` by kind are those of all detections. ``metrics`` are plain numbers
    by name, COCO's among them. ``of_images`` is how many the split has, where ``found`` is a part of them.
    """

    classes: Sequence[str]
    threshold: float
    found: Sequence[Found]
    curves: Sequence[Sequence[Curve]]
    confusion: Ints
    calibration: Calibration
    costs: Mapping[str, float]
    counts: Mapping[str, int]
    judged: Sequence[Judged]
    metrics: Mapping[str, float]
    of_images: int

    def worst(self, num_images: int) -> list[int]:
        """The images with the lowest F1 at the threshold, of equal ones those with the most errors; none without."""
        marks = [(f1(one), -num_errors(one)) for one in self.judged]
        order = sorted(range(len(marks)), key=lambda index: (*marks[index], index))
        return [index for index in order if marks[index][0] < 1.0][:num_images]


def measure(
    found: Sequence[Found],
    *,
    classes: Sequence[str],
    threshold: float,
    coco: Mapping[str, float],
    of_images: int | None = None,
) -> Report:
    """The report on a split, or on some of its ``of_images``.

    The whole split's scores after COCO are known already, by names such as ``map_50``.
    """
    by_class = list(matched(found))
    at_each_iou = [curves(by_class, at=at) for at in range(len(IOUS))]
    everything = [tide.judge(one) for one in found]
    costs = tide.costs(everything)
    reliability = calibration(by_class)
    metrics = {**coco, **VocAP(classes=classes)(found)}
    if at_each_iou[0]:
        metrics["f1/threshold"], metrics["f1/best"] = best_threshold(at_each_iou[0])
        metrics["calibration/error"] = reliability.error
        metrics |= {f"errors/{name}": cost for name, cost in costs.items()}
    return Report(
        classes=list(classes),
        threshold=threshold,
        found=found,
        curves=at_each_iou,
        confusion=confusion(found, num_classes=len(classes), threshold=threshold),
        calibration=reliability,
        costs=costs,
        counts=tide.counts(everything),
        judged=[tide.judge(one, threshold=threshold) for one in found],
        metrics=metrics,
        of_images=len(found) if of_images is None else of_images,
    )


def num_errors(one: Judged) -> int:
    """Wrong detections of an image, and truths that nothing finds."""
    return int((one.kind >= 0).sum()) + int(one.unfound.sum())


def f1(one: Judged) -> float:
    """Of one image: twice its hits among them and all its errors; 1 where there is nothing to find and nothing found.

    A box that is a little off counts twice, as wrong and as a truth that nothing finds.
    """
    hits = 2 * int((one.kind == HIT).sum())
    total = hits + num_errors(one)
    return hits / total if total else 1.0


def write_tables(report: Report, folder: Path) -> list[Path]:
    """``metrics.json``, ``per_class.csv`` and ``per_image.csv``."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / name for name in ("metrics.json", "per_class.csv", "per_image.csv")]
    files[0].write_text(json.dumps(_numbers(report), indent=1) + "\n", encoding="utf-8")
    write_csv(files[1], per_class(report))
    write_csv(files[2], per_image(report))
    return files


def per_class(report: Report) -> list[dict[str, Any]]:
    """A row for every class with a truth: its APs, and its precision and recall at the threshold of its best F1."""
    rows = []
    for at_50, at_75 in zip(report.curves[0], report.curves[AT_75], strict=True):
        name, best = report.classes[at_50.label], at_50.best()
        scores = {
            "ap": report.metrics.get(f"ap/{name}", math.nan),
            "ap_50": at_50.envelope().mean(),
            "ap_75": at_75.envelope().mean(),
            "voc07_ap": report.metrics.get(f"voc07/ap/{name}", math.nan),
            "voc12_ap": report.metrics.get(f"voc12/ap/{name}", math.nan),
            "best_f1": best.f1,
            "at_score": best.threshold,
            "precision": best.precision,
            "recall": best.recall,
        }
        rows.append({"class": name, "truths": at_50.truths, **{key: round(float(x), 5) for key, x in scores.items()}})
    return rows


def per_image(report: Report) -> list[dict[str, Any]]:
    """A row for every image: its F1 at the threshold, what was found there, and its errors by kind."""
    return [
        {
            "image": key_of(one.image_id),
            "f1": round(f1(judged), 5),
            "truths": int((~judged.truths.crowd).sum()),
            "found": int((judged.kind == HIT).sum()),
            **{name: int((judged.kind == kind).sum()) for kind, name in enumerate(KINDS[:-1])},
            "not_found": int(judged.unfound.sum()),
        }
        for one, judged in zip(report.found, report.judged, strict=True)
    ]


def _numbers(report: Report) -> dict[str, Any]:
    return {
        "num_images": len(report.found),
        "of_images": report.of_images,
        "threshold": report.threshold,
        "metrics": dict(report.metrics),
        "errors": {name: {"ap_50_lost": report.costs[name], "number": report.counts[name]} for name in KINDS},
        "calibration": {
            "edges": report.calibration.edges.round(6).tolist(),
            "counts": report.calibration.counts.tolist(),
            "score": _known(report.calibration.score.tolist()),
            "precision": _known(report.calibration.precision.tolist()),
        },
        "confusion": {"classes": [*report.classes, "background"], "rows_are_truths": report.confusion.tolist()},
    }


def _known(values: Sequence[float]) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values]


def write_csv(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A table whose columns are those of its first row."""
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, fieldnames=list(rows[0]) if rows else ["nothing"])
        writer.writeheader()
        writer.writerows(rows)
