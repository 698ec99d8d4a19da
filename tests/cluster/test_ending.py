"""How a driver ends its run in MLflow: after it was given up, and while the store is away."""

import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from onestage.cluster import launch
from onestage.cluster.job import Job
from onestage.cluster.stop import Stop
from onestage.tracking import heartbeat, runs, sync
from onestage.tracking.client import client


def trained(uri: str, run_id: str, storage: Path, by: launch.Run) -> launch.Outcome:
    config = {"storage": str(storage), "on_oom": "fail", "overrides": []}
    job = Job(config=config, run_id=run_id, folder=str(storage / run_id), tracking_uri=uri)
    return launch.train(job, by=by, stop=Stop(), shown=lambda: nullcontext(lambda message: None))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return runs.tracking_uri(f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db")


def test_a_run_given_up_in_the_middle_of_its_training_runs_again_and_finishes(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "EVERY_S", 0.1)
    run_id = runs.open_run(store, "given up", tags={})

    def cut_off(*_: Any) -> dict[str, Any]:
        runs.end_run(store, run_id, "KILLED", "no sign of life from its driver on far for 12 minutes")
        end = time.monotonic() + 20
        while client(store).get_run(run_id).info.status != "RUNNING":
            assert time.monotonic() < end
            time.sleep(0.05)
        return {}

    assert trained(store, run_id, tmp_path / "runs", cut_off).status == "FINISHED"
    found = runs.find_run(store, run_id)
    assert found.status == "FINISHED" and runs.REASON_TAG not in found.tags


def test_an_end_that_can_not_be_told_waits_for_sync(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_id = runs.open_run(store, "away", tags={})
    outcome = trained("http://127.0.0.1:9", run_id, tmp_path / "runs", lambda *_: {"metrics": {"val/map": 0.5}})
    assert outcome.exit_code == 0
    spool = tmp_path / "runs" / run_id / "spool"
    assert f"onestage: not all has reached MLflow; what waits in {spool} is sent by: onestage sync {spool}" in (
        capsys.readouterr().err
    )
    assert json.loads((spool / "run.json").read_text())["uri"] == "http://127.0.0.1:9"
    assert client(store).get_run(run_id).info.status == "RUNNING"
    assert sync.sync(spool, uri=store).state == "arrived"
    assert client(store).get_run(run_id).info.status == "FINISHED"


def test_the_end_of_a_life_replaces_that_of_the_one_before(store: str, tmp_path: Path) -> None:
    run_id = runs.open_run(store, "twice", tags={})
    spool = tmp_path / "runs" / run_id / "spool"
    sync.keep_ending(spool, uri=store, run_id=run_id, status="FAILED", reason="boom")
    assert trained(store, run_id, tmp_path / "runs", lambda *_: {}).status == "FINISHED"
    assert not sync.left_in(spool).anything
