"""Numbers and tables of an evaluation, by hand."""

import csv
import json
from pathlib import Path
from types import ModuleType

import pytest

from onestage.evaluation.report import Report, measure, per_class, per_image, write_tables
from onestage.metrics.mean_ap import MeanAP

A, B, NOWHERE = [0, 0, 10, 10], [20, 0, 30, 10], [50, 50, 60, 60]
CLASSES = ["a", "b, with a comma", "c"]


@pytest.fixture
def report(scenes: ModuleType) -> Report:
    images = [
        scenes.one([(A, 0)], [(A, 0, 0.9)], image_id=4),  # all right
        scenes.one([(A, 0), (B, 0)], [(A, 0, 0.9), (NOWHERE, 0, 0.8)], image_id=5),  # F1: 2 / (2 + 1 + 1)
        scenes.one([(A, 0), (B, 1)], [(NOWHERE, 0, 0.8)], image_id=6),  # nothing right, three errors
        scenes.one([], [(NOWHERE, 1, 0.2)], image_id=7),  # nothing there and nothing sure
        scenes.one([(A, 0)], [(A, 0, 0.1)], image_id=8),  # found, but below the threshold: one error
    ]
    return measure(images, classes=CLASSES, threshold=0.25, coco=MeanAP(classes=CLASSES)(images))


def test_the_worst_images_have_the_lowest_f1_then_the_most_errors(report: Report) -> None:
    assert report.worst(10) == [2, 4, 1]
    assert report.worst(2) == [2, 4]


def test_a_row_for_each_image_counts_what_happened_there(report: Report) -> None:
    rows = {row["image"]: row for row in per_image(report)}
    assert list(rows) == ["000004", "000005", "000006", "000007", "000008"]
    assert [row["f1"] for row in rows.values()] == [1.0, 0.5, 0.0, 1.0, 0.0]
    fifth = {"truths": 2, "found": 1, "background": 1, "not_found": 1, "localisation": 0, "duplicate": 0}
    assert rows["000005"].items() >= fifth.items()


def test_a_row_for_each_class_with_a_truth(report: Report) -> None:
    rows = {row["class"]: row for row in per_class(report)}
    assert list(rows) == ["a", "b, with a comma"]
    assert [row["truths"] for row in rows.values()] == [5, 1]
    # Of a: hits at 0.9, 0.9 and 0.1, two wrong at 0.8 between them. From 0.1 on three of five are right, and three of
    # five found: F1 is 3/5; from 0.9 on it is 2 * 2 / (2 + 5).
    best = {"best_f1": 0.6, "at_score": 0.1, "precision": 0.6, "recall": 0.6}
    assert rows["a"].items() >= best.items()
    assert rows["b, with a comma"]["ap_50"] == 0.0
    assert rows["a"]["ap"] == round(report.metrics["ap/a"], 5)


def test_the_numbers_are_those_of_the_pictures(report: Report) -> None:
    """From 0.1 on the mean F1 of both classes is (0.6 + 0) / 2, which is the highest that one threshold gives."""
    assert report.metrics["f1/best"] == pytest.approx(0.3)
    assert report.metrics["f1/threshold"] == pytest.approx(0.1)
    assert report.metrics["errors/background"] == report.costs["background"] > 0
    assert {"map", "map_50", "voc07/map", "voc12/map", "calibration/error"} <= set(report.metrics)


def test_tables_are_read_by_other_programs(report: Report, tmp_path: Path) -> None:
    files = write_tables(report, tmp_path / "new" / "folder")
    assert [file.name for file in files] == ["metrics.json", "per_class.csv", "per_image.csv"]
    numbers = json.loads(files[0].read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (numbers["num_images"], numbers["of_images"], numbers["metrics"]) == (5, 5, report.metrics)
    assert numbers["confusion"]["rows_are_truths"][0] == [2, 0, 0, 3]
    with files[1].open(newline="") as table:
        assert [row["class"] for row in csv.DictReader(table)] == ["a", "b, with a comma"]


def test_a_split_without_truths_has_a_report_too(scenes: ModuleType, tmp_path: Path) -> None:
    images = [scenes.one([], [(A, 0, 0.9)]), scenes.one([], [])]
    report = measure(images, classes=CLASSES, threshold=0.25, coco=MeanAP(classes=CLASSES)(images))
    assert report.curves[0] == [] and per_class(report) == []
    assert [file.is_file() for file in write_tables(report, tmp_path)] == [True] * 3
