"""`onestage evaluate` of a run with a model, from the command to the files and to MLflow."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from onestage.cli import main
from onestage.data.formats.record import Record, Source
from onestage.data.pack import pack
from onestage.evaluation import evaluate
from onestage.evaluation.stored import read
from onestage.tracking import runs
from onestage.tracking.client import client

CHARTS = {"precision_recall", "f1", "confusion", "calibration", "errors"}
TABLES = {"metrics.json", "per_class.csv", "per_image.csv", "detections.json"}


def told(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return result


def test_the_files_lie_in_the_runs_folder_and_are_listed(storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["tracking=none", f"storage={storage}", "trainer.num_pictures=2"]
    assert main(["evaluate", "newborn", "split=test", *common, "--json"]) == 0
    result = told(capsys)
    folder = storage / "newborn" / "evaluation" / "test"
    assert result["out"] == str(folder) and result["artifacts"] is None
    assert {Path(file).parent for file in result["files"]} == {folder}
    names = {Path(file).name for file in result["files"]}
    assert names == {file.name for file in folder.iterdir()}
    assert names >= TABLES | {f"{name}.png" for name in CHARTS}
    worst = sorted(name for name in names if name.startswith("worst_"))
    assert len(worst) == 2 and worst[0].startswith("worst_01_")
    with Image.open(folder / worst[0]) as picture:
        assert picture.width >= 2 * 96
    numbers = json.loads((folder / "metrics.json").read_text())
    assert {f"test/{name}": value for name, value in numbers["metrics"].items()} == result["metrics"]
    assert {"test/map", "test/map_low", "test/voc07/map", "test/voc12/map"} <= set(result["metrics"])
    stored = read(folder / "detections.json")
    assert (stored.run, stored.split, len(stored.found)) == ("newborn", "test", 4)


def test_a_person_is_told_where_they_are(storage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "here"
    common = ["tracking=none", f"storage={storage}", "trainer.num_pictures=0", "split=val"]
    assert main(["evaluate", "newborn", *common, f"out={out}"]) == 0
    assert f"tables and pictures  {out}" in capsys.readouterr().out
    assert {file.name for file in out.iterdir()} == TABLES  # no pictures were asked for
    other = tmp_path / "there"
    assert main(["evaluate", "newborn", *common, "--out", str(other)]) == 0
    assert other.is_dir()


@pytest.mark.slow
def test_a_second_evaluation_replaces_the_first(storage: Path, tmp_path: Path) -> None:
    overrides = ["tracking=none", f"storage={storage}"]
    evaluate("newborn", split="val", overrides=[*overrides, "trainer.num_pictures=3"], out=tmp_path)
    assert len(list(tmp_path.glob("worst_*"))) == 3
    evaluate("newborn", split="val", overrides=[*overrides, "trainer.num_pictures=1"], out=tmp_path)
    assert len(list(tmp_path.glob("worst_*"))) == 1


def test_only_numbers_where_no_files_are_wanted(storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = evaluate("newborn", split="val", overrides=["tracking=none", f"storage={storage}"], files=False)
    assert "files" not in result and "val/map" in result["metrics"]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_can_not_be_written_to_is_one_line(
    storage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    out = f"out={tmp_path}/file/inside"
    assert main(["evaluate", "newborn", "tracking=none", f"storage={storage}", "split=val", out]) == 2
    assert "can't be written to" in capsys.readouterr().err.splitlines()[-1]


def test_difficult_boxes_arrive_as_they_were_packed(tmp_path: Path, make_model: Callable[..., None]) -> None:
    Image.fromarray(np.full((96, 96, 3), 90, np.uint8)).save(tmp_path / "one.png")
    boxes = [(5.0, 5.0, 40.0, 40.0), (50.0, 50.0, 90.0, 90.0)]
    record = Record(tmp_path / "one.png", 96, 96, boxes, [0, 0], [False, True], [False, False], source="one.png")
    pack(Source("marked", ("thing",), {"train": [record], "val": [record], "test": [record]}, []), tmp_path / "set")
    make_model(tmp_path / "runs" / "newborn" / "model", root=tmp_path / "set", classes=["thing"])
    overrides = ["tracking=none", f"storage={tmp_path / 'runs'}", "trainer.num_pictures=0"]
    result = evaluate("newborn", split="test", overrides=overrides)
    (one,) = read(Path(result["out"]) / "detections.json").found
    assert one.target.difficult is not None and one.target.difficult.tolist() == [False, True]


@pytest.mark.slow
def test_an_mlflow_run_gets_numbers_files_and_pictures(storage: Path, tmp_path: Path) -> None:
    uri = runs.tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    run_id = runs.open_run(uri, "evaluations", tags={})
    client(uri).log_metric(run_id, "val/map", 0.5, step=7)
    shutil.copytree(storage / "newborn" / "model", tmp_path / "runs" / run_id / "model")
    overrides = [f"tracking.uri={uri}", f"storage={tmp_path / 'runs'}", "trainer.num_pictures=1"]
    result = evaluate(run_id, split="test", overrides=overrides)
    assert result["artifacts"] == "evaluation/test"
    there = {Path(one.path).name for one in client(uri).list_artifacts(run_id, "evaluation/test")}
    assert there == {Path(file).name for file in result["files"]}
    shown = {Path(one.path).name.split("+timestamp")[0] for one in client(uri).list_artifacts(run_id, "images")}
    assert shown == {f"test~{name}+step+7" for name in CHARTS | {"worst_01"}}
    held = client(uri).get_run(run_id).data.metrics
    assert held["test/voc07/map"] == pytest.approx(result["metrics"]["test/voc07/map"])
    stored = read(runs.download(uri, run_id, "evaluation/test/detections.json", tmp_path / "back"))
    assert stored.run == run_id and len(stored.found) == 4


def test_a_store_that_is_away_takes_nothing_from_what_was_measured(
    storage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [f"storage={storage}", "tracking.uri=http://ann:pw@127.0.0.1:9", "trainer.num_pictures=0"]
    assert main(["evaluate", "newborn", "split=test", *settings, "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out.splitlines()[-1])
    assert result["artifacts"] is None and "test/map" in result["metrics"]
    assert all(Path(file).is_file() for file in result["files"])
    [line] = [line for line in captured.err.splitlines() if "MLflow" in line]
    assert line.startswith("not in MLflow: no MLflow server answers at http://") and "pw" not in line
