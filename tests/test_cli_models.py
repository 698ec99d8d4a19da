"""`onestage models` as people use it: runs with real models, evaluated by the gate, in a real store."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onestage.cli import main
from onestage.data.manifest import FILE_NAME, Manifest
from onestage.promotion import Score
from onestage.tracking import registry, runs
from onestage.tracking.mlflow_tracker import MlflowTracker

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = runs.tracking_uri(f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db")
    runs.check(uri)
    return uri


@pytest.fixture(scope="module")
def trained(
    store: str, digits: Path, make_model: Callable[..., None], tmp_path_factory: pytest.TempPathFactory
) -> list[str]:
    """Two runs that have logged what a training logs of its model and its data."""
    made = []
    for seed in range(2):
        folder = tmp_path_factory.mktemp("run")
        manifest = Manifest.load(digits)
        make_model(folder / "model", root=digits, classes=manifest.classes, seed=seed)
        made.append(runs.open_run(store, "models", name=f"seed {seed}", tags={}))
        tracker = MlflowTracker(uri=store, run_id=made[-1], folder=folder / "spool")
        tracker.log_params({"data": {"root": str(digits)}})
        tracker.log_artifact(digits / FILE_NAME, "dataset")
        tracker.set_tags({"dataset.hash": manifest.content_hash, "dataset.name": "digits"})
        tracker.log_model(folder / "model", {}, step=1)
        assert tracker.close(30)
        assert runs.end_run(store, made[-1], "FINISHED")
    return made


def told(capsys: Capture) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return result


@pytest.mark.slow
def test_from_a_run_to_a_champion_and_back(store: str, trained: list[str], digits: Path, capsys: Capture) -> None:
    where = f"tracking.uri={store}"
    content = Manifest.load(digits).content_hash
    assert main(["models", "list", where]) == 0
    assert "no model is registered" in capsys.readouterr().err

    assert main(["models", "promote", trained[0], where]) == 0
    assert "models:/digits@champion is now version 1, test/map 0." in capsys.readouterr().out
    measured = runs.find_run(store, trained[0]).metrics["test/map"]
    first = registry.find(store, "digits/1")
    assert Score.of_tags(first.tags) == Score(value=measured, split="test", dataset_hash=content)

    # As if it were the best detector of digits there is.
    registry.tell(store, first, Score(value=0.99, split="test", dataset_hash=content).tags())
    assert main(["models", "promote", trained[1], where]) == 1
    said = capsys.readouterr().err
    assert "the champion test/map 0.9900; --force promotes it all the same" in said
    assert len(registry.versions(store, "digits")) == 1
    assert main(["models", "promote", trained[1], where, "--alias", "challenger"]) == 0
    capsys.readouterr()
    assert main(["models", "promote", "models:/digits@challenger", "--force", "--json", where]) == 0
    forced = told(capsys)
    assert (forced["version"], forced["former"], forced["moved"], forced["refused"]) == ("2", "1", True, None)

    assert main(["models", "list", where]) == 0
    table = capsys.readouterr().out
    assert "challenger" not in table and content[:12] in table and trained[1][:8] in table
    assert main(["models", "list", "--json", where]) == 0
    versions = told(capsys)["versions"]
    assert [(one["version"], one["aliases"]) for one in versions] == [("2", ["champion"]), ("1", [])]
    lineage = versions[0]["lineage"]
    assert (lineage["run_id"], lineage["dataset_hash"], lineage["root"]) == (trained[1], content, str(digits))
    shards = {shard.name: shard.sha256 for split in Manifest.load(digits).splits.values() for shard in split.shards}
    assert {one["name"]: one["sha256"] for one in lineage["shards"]} == shards

    assert main(["models", "show", "digits@champion", where]) == 0
    shown = capsys.readouterr().out
    assert all(sha256 in shown for sha256 in shards.values()) and "seed 1 in models, FINISHED" in shown
    assert main(["models", "rollback", "digits", where]) == 0
    assert "is version 1 again, no more version 2" in capsys.readouterr().out
    assert main(["models", "rollback", "digits", where]) == 2
    assert "no version of 'digits' was champion before version 1" in capsys.readouterr().err


def test_models_that_are_not_there_are_one_line(store: str, capsys: Capture) -> None:
    for words in (
        ["show", "nothing/1"],
        ["rollback", "nothing"],
        ["list", "nothing"],
        ["promote", "models:/nothing/1"],
    ):
        assert main(["models", *words, f"tracking.uri={store}"]) == 2
        assert "no model 'nothing'" in capsys.readouterr().err


def test_without_a_store_there_are_no_models(capsys: Capture) -> None:
    assert main(["models", "list", "tracking=none"]) == 2
    assert "tracking=none keeps no models" in capsys.readouterr().err
