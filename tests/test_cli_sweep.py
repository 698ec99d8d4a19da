"""``onestage sweep`` and ``onestage leaderboard`` at the command line, without a training."""

import csv
import json
from pathlib import Path

import pytest

from onestage.cli import main


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["sweep", "optimizer.lr=1e-3"], "nothing varies"),
        (["train", "-m", "optimizer.lr=1e-3"], "nothing varies"),
        (["sweep", "optimizer.lrr=1e-3,1e-4"], "nearest is 'optimizer.lr'"),
        (["sweep", "--dry", "seed=1,2"], "no option --dry"),
        (["sweep", "--dry-run", "seed=1,2", "probe=maybe"], "probe=true or probe=false"),
        (["sweep", "resume"], "name one sweep"),
        (["sweep", "resume", "night"], "no sweep 'night'"),
        (["sweep", "status", "night"], "no sweep 'night'"),
        (["sweep", "seed=1,2", "cluster.gpus_per_worker=64"], "64"),
    ],
)
def test_refused_in_one_line(digits: Path, words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    named = [f"data.root={digits}", "tracking=none"] if "resume" not in words and "status" not in words else []
    assert main([*words, *named]) == 2
    captured = capsys.readouterr()
    assert says in captured.err and captured.err.count("\n") == 1 and not captured.out
    assert not list(Path().glob("runs/sweeps/*"))  # nothing was begun


def test_a_dry_run_tells_the_trials_and_leaves_nothing(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["seed=1,2,3", "optimizer.lr=1e-3,1e-4", f"data.root={digits}", "tracking=none", "trainer.max_epochs=5"]
    assert main(["sweep", "--dry-run", "--json", *words]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["search"], told["trials"], told["epochs"]) == ("grid", 6, [30, 30])
    assert [point[:2] for point in told["points"][:2]] == [
        ["seed=1", "optimizer.lr=0.001"],
        ["seed=1", "optimizer.lr=0.0001"],
    ]
    assert told["gpu_hours"] is None and told["concurrent"] >= 1
    assert not list(Path().iterdir())


def test_help_names_the_ready_spaces(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "--help"]) == 0
    assert "all_detectors, fusion, imbalance, lr" in capsys.readouterr().out


def test_a_leaderboard_as_json_and_csv(capsys: pytest.CaptureFixture[str]) -> None:
    from onestage.tracking import runs
    from onestage.tracking.client import client

    uri = runs.tracking_uri(None)
    for name, score, data_hash in (("one", 0.25, "a"), ("two", 0.5, "b")):
        run_id = runs.open_run(uri, "cells", name=name, tags={"dataset.hash": data_hash})
        client(uri).log_metric(run_id, "best/map", score)
    assert main(["leaderboard", "cells", "--json"]) == 0
    captured = capsys.readouterr()
    assert [one["name"] for one in json.loads(captured.out)["runs"]] == ["two", "one"]
    assert "not all of them were scored on the same data" in captured.err
    assert main(["leaderboard", "cells", "--csv", "board.csv"]) == 0
    with open("board.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["name"], float(row["score"])) for row in rows] == [("two", 0.5), ("one", 0.25)]
    assert main(["leaderboard", "cells"]) == 0
    assert "0.5000" in capsys.readouterr().out
    assert main(["leaderboard", "cell"]) == 2
    assert "did you mean 'cells'" in capsys.readouterr().err
