"""What a training leaves to look at, and that nothing there ever ends it."""

import json
import logging
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from onestage.cluster import pictures
from onestage.cluster.job import Job
from onestage.config import build, compose
from onestage.evaluation.stored import read
from onestage.tracking.tracker import NoTracker
from onestage.training.callbacks import BestFound

CHARTS = {"precision_recall", "f1", "confusion", "calibration", "errors"}


class Kept:
    """A tracker that remembers what it was told to log; the rest of it is not asked for."""

    def __init__(self) -> None:
        self.artifacts: dict[str, set[str]] = {}
        self.pictures: dict[tuple[str, int], tuple[int, ...]] = {}

    def log_picture(self, key: str, image: np.ndarray, step: int) -> None:
        self.pictures[key, step] = image.shape

    def log_artifact(self, path: Path, folder: str = "") -> None:
        names = {file.name for file in path.iterdir()} if path.is_dir() else {path.name}
        place = f"{folder}/{path.name}" if path.is_dir() else folder
        self.artifacts.setdefault(place, set()).update(names)


def config_of(root: Path, *overrides: str) -> dict[str, Any]:
    return compose("train", [f"data.root={root}", "detector.width=0.125", "detector.input_size=[96,96]", *overrides])


def job_of(config: dict[str, Any], folder: Path) -> Job:
    return Job(config=config, run_id="a-run", folder=str(folder), tracking_uri=None)


def best_of(found: list[Any]) -> BestFound:
    best = BestFound()
    best.found, best.metrics, best.step = found, {"val/map": 0.25, "best/map": 0.25}, 40
    return best


@pytest.fixture
def found(digits: Path, scenes: ModuleType) -> list[Any]:
    """As if found in the five validation images of the digits."""
    data = build(config_of(digits)["data"])
    ids = [image_id for image_id, _ in data.examples("val", 99)]
    images = scenes.scene(3, num_images=len(ids), num_classes=10)
    return [one._replace(image_id=image_id) for one, image_id in zip(images, ids, strict=True)]


def test_the_labels_and_the_anchors_over_the_boxes(digits: Path, tmp_path: Path) -> None:
    config, tracker = config_of(digits), Kept()
    pictures.of_dataset(tracker, build(config["data"]), config, build(config["detector"]), tmp_path)  # type: ignore[arg-type]
    assert tracker.artifacts == {"dataset": {"labels.png", "anchors.png"}}
    assert set(tracker.pictures) == {("dataset/labels", 0), ("dataset/anchors", 0)}
    assert all(min(shape[:2]) > 300 for shape in tracker.pictures.values())


def test_a_detector_without_anchors_has_the_labels_alone(digits: Path, tmp_path: Path) -> None:
    config, tracker = config_of(digits), Kept()

    class Plain(torch.nn.Module):
        input_size = (96, 96)

        def anchor_sizes(self) -> None:
            return None

    pictures.of_dataset(tracker, build(config["data"]), config, Plain(), tmp_path)  # type: ignore[arg-type]
    assert tracker.artifacts == {"dataset": {"labels.png"}}


def test_the_best_validation_leaves_what_an_evaluation_does(digits: Path, tmp_path: Path, found: list[Any]) -> None:
    config, tracker = config_of(digits, "trainer.num_pictures=2"), Kept()
    data = build(config["data"])
    pictures.of_validation(tracker, best_of(found), data, job_of(config, tmp_path), tmp_path, threshold=0.25)  # type: ignore[arg-type]
    names = {"metrics.json", "per_class.csv", "per_image.csv", "detections.json"} | {f"{one}.png" for one in CHARTS}
    assert tracker.artifacts["evaluation/val"] >= names
    assert {key for key, _ in tracker.pictures} == {f"val/{name}" for name in CHARTS | {"worst_01", "worst_02"}}
    assert {step for _, step in tracker.pictures} == {40}
    stored = read(tmp_path / "evaluation" / "val" / "detections.json")
    assert (stored.run, stored.split, stored.dataset_hash) == ("a-run", "val", data.manifest.content_hash)


def test_of_a_large_validation_a_part_is_drawn_and_it_says_so(
    digits: Path, tmp_path: Path, found: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "MAX_IMAGES", 2)
    config = config_of(digits, "trainer.num_pictures=1")
    pictures.of_validation(
        Kept(), best_of(found), build(config["data"]), job_of(config, tmp_path), tmp_path, threshold=0.25
    )  # type: ignore[arg-type]
    numbers = json.loads((tmp_path / "evaluation" / "val" / "metrics.json").read_text())
    assert (numbers["num_images"], numbers["of_images"], numbers["metrics"]["map"]) == (2, 5, 0.25)


def test_without_a_tracker_there_is_nothing(digits: Path, tmp_path: Path, found: list[Any]) -> None:
    config, tracker = config_of(digits), NoTracker()
    data = build(config["data"])
    pictures.of_dataset(tracker, data, config, None, tmp_path)
    pictures.of_validation(tracker, best_of(found), data, job_of(config, tmp_path), tmp_path, threshold=0.25)
    assert list(tmp_path.iterdir()) == []


def test_without_pictures_there_are_the_tables(digits: Path, tmp_path: Path, found: list[Any]) -> None:
    config, tracker = config_of(digits, "trainer.num_pictures=0"), Kept()
    data = build(config["data"])
    pictures.of_dataset(tracker, data, config, None, tmp_path)  # type: ignore[arg-type]
    pictures.of_validation(tracker, best_of(found), data, job_of(config, tmp_path), tmp_path, threshold=0.25)  # type: ignore[arg-type]
    assert tracker.artifacts == {
        "evaluation/val": {"metrics.json", "per_class.csv", "per_image.csv", "detections.json"}
    }
    assert tracker.pictures == {}


def test_what_goes_wrong_is_one_warning(
    digits: Path, tmp_path: Path, found: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    config = config_of(digits)
    data, folder = build(config["data"]), tmp_path / "file" / "run"
    with caplog.at_level(logging.WARNING):
        pictures.of_dataset(Kept(), data, config, build(config["detector"]), folder)  # type: ignore[arg-type]
        pictures.of_validation(Kept(), best_of(found), data, job_of(config, folder), folder, threshold=0.25)  # type: ignore[arg-type]
    said = [record.getMessage() for record in caplog.records if record.name == pictures.__name__]
    assert [line.split(" could")[0] for line in said] == [
        "the pictures of the dataset",
        "the pictures of the validation",
    ]
    assert all("the training goes on" in line for line in said)
