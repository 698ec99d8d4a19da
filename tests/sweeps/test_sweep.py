"""Sweeps as users run them: real trainings on a real Ray, a real MLflow store, and a driver that is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hydra_plugins.ray_tune_sweeper._journal import Journal
from onestage.cli import main
from onestage.sweeps.folder import folder_of
from onestage.tracking import registry, runs
from onestage.tracking.client import client
from onestage.tracking.leaderboard import entries
from onestage.tracking.origin import CHANGES, code

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

BCCD = Path(__file__).parents[3] / "shared" / "data" / "bccd"
SMALL = [
    "detector.width=0.125", "detector.input_size=[64,64]", "augment=none", "trainer.num_pictures=0",
    "cluster.cpus_per_worker=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def bccd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not BCCD.is_dir():
        pytest.skip(f"no photographs: {BCCD} is not here")
    folder = tmp_path_factory.mktemp("bccd") / "shards"
    assert main(["data", "import", "voc", str(BCCD), "--out", str(folder)]) == 0
    return folder


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Starts ``onestage sweep`` in a folder of its own; stdout and stderr apart."""

    def run(*words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "onestage.cli", "sweep", *words],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return run


def ended(process: subprocess.Popen[str], code: int, seconds: float = 800) -> tuple[str, str]:
    out, err = process.communicate(timeout=seconds)
    assert process.returncode == code, err
    assert "Traceback" not in err, err
    return out, err


def until(condition: Callable[[], Any], seconds: float = 180) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.2)
    raise AssertionError(f"not within {seconds} s")


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    """Those of a run's history."""
    lines = (json.loads(line) for line in (run / "history.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == kind]


def test_eight_trials_killed_and_resumed_end_with_a_champion(
    bccd: Path, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two detectors and two continuous parameters under ASHA on photographs; kill -9 under way, then resume."""
    monkeypatch.chdir(tmp_path)
    me = ["-c", "user.name=ann", "-c", "user.email=ann@example.org"]
    for words in (["init", "-q"], [*me, "commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run(["git", *words], check=True)
    Path("notes.txt").touch()
    folder = folder_of("runs", "night")
    first = start(
        "detector=yolov3_tiny,yolov2_tiny_voc", "optimizer.lr=tag(log, interval(1e-4, 1e-2))",
        "optimizer.weight_decay=tag(log, interval(1e-5, 1e-2))", f"data.root={bccd}", *SMALL, "sweep.name=night",
        "budget.trials=8", "trainer.max_epochs=3", "sweep.scheduler=asha", "sweep.asha.grace_epochs=1",
        "sweep.asha.reduction=2",
    )  # fmt: skip

    def under_way() -> bool:
        trials = Journal.read(folder).trials.values()
        half = (one for one in trials if not one.ended and one.results and one.results[-1]["epoch"] < 2)
        return any(one.ended for one in trials) and any(half)

    until(under_way, 400)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    before = Journal.read(folder).trials
    finished = {number: one for number, one in before.items() if one.ended}
    cut = {number for number, one in before.items() if not one.ended and one.results and one.results[-1]["epoch"] < 3}
    assert cut
    uri = runs.tracking_uri(None)
    assert main(["sweep", "status", "night"]) == 0
    running = client(uri).search_runs(_experiments(uri), "attributes.status = 'RUNNING'")
    assert not running  # what the kill left untrue

    out, _ = ended(start("resume", "night", "--json"), 0)
    told = json.loads(out.strip().splitlines()[-1])
    trials = Journal.read(folder).trials
    assert len(trials) == 8 and all(one.ended for one in trials.values())
    assert {number: trials[number] for number in finished} == finished  # not run again
    assert all(one.starts == 1 for number, one in trials.items() if number not in before)
    stopped = [one for one in trials.values() if one.state == "stopped"]
    assert stopped and all(one.results[-1]["epoch"] < 3 for one in stopped)
    # There is room for two at a time: others trained after those that were stopped, in the place that they gave back.
    spans = [(one.started or 0.0, one.ended_at or 0.0) for one in trials.values()]
    assert max(sum(start <= at < end for start, end in spans) for at, _ in spans) == 2
    assert any(
        other.results and (other.started or 0.0) >= (one.ended_at or 0.0)
        for one in stopped
        for other in trials.values()
    )
    for number in trials:  # in the same run, with its checkpoint kept
        state = json.loads((folder / str(number) / "state.json").read_text())
        assert Path("runs", state["run_id"], "checkpoints", "last.ckpt").is_file()
        if number in cut:
            starts = events(tmp_path / "runs" / state["run_id"], "started")
            assert len(starts) == 2 and starts[1]["step"] > 0  # from its checkpoint

    found = entries(uri, "onestage", sweep="night")
    assert len(found) == 8
    assert {one.status for one in found} <= {"FINISHED", "KILLED"}
    assert [one.run_id for one in found] == [one["run_id"] for one in told["runs"]]
    assert all(set(one.point) == {"detector", "optimizer.lr", "optimizer.weight_decay"} for one in found)
    best = next(one for one in found if one.state == "done")
    assert best.low is not None and best.score is not None and best.high is not None and best.low < best.high

    children = client(uri).search_runs(_experiments(uri), "tags.`onestage.trial` LIKE '%'")
    (parent,) = {run.data.tags["mlflow.parentRunId"] for run in children}
    own = client(uri).get_run(parent)
    assert own.info.status == "FINISHED" and own.data.tags["onestage.sweep"] == "night"
    held = [file.path for file in client(uri).list_artifacts(parent)]
    assert {"leaderboard.json", "pictures"} <= set(held)
    for run in [own, *children]:  # wherever its process was
        assert run.data.tags["mlflow.source.git.commit"] == code().commit
        changes = runs.download(uri, run.info.run_id, CHANGES, tmp_path / "got" / run.info.run_id)
        assert "# not in git: notes.txt\n" in changes.read_text()
    pictures = {Path(file.path).name for file in client(uri).list_artifacts(parent, "pictures")}
    assert pictures == {"trials.png", "parallel.png", "importance.png", "pareto.png"}

    champion = registry.holder(uri, told["champion"]["name"])
    assert champion is not None and champion.run_id == best.run_id
    assert told["champion"]["split"] == "test"
    assert main(["evaluate", f"models:/{champion.name}@champion", "split=test"]) == 0


def _experiments(uri: str) -> list[str]:
    return [one.experiment_id for one in client(uri).search_experiments()]


def test_interrupted_it_saves_and_cut_by_gpu_hours_it_exits_with_3(digits: Path, start: Start, tmp_path: Path) -> None:
    """Ctrl-C once: trials save, resume goes on with them; then the budget ends it."""
    folder = folder_of(str(tmp_path / "runs"), "cut")
    words = ["optimizer.lr=1e-3,1e-4,1e-5", f"data.root={digits}", *SMALL, "sweep.name=cut", "trainer.max_epochs=5000"]
    process = start(*words, "sweep.max_concurrent=1", "tracking=none")
    until(lambda: folder.is_dir() and any(one.results for one in Journal.read(folder).trials.values()))
    process.send_signal(signal.SIGINT)
    _, err = ended(process, 130)
    assert "onestage sweep resume cut" in err
    before = Journal.read(folder)
    assert before.ended_because == "interrupted"
    state = json.loads((folder / "0" / "state.json").read_text())
    assert state["doing"] == "killed"
    assert (tmp_path / "runs" / state["run_id"] / "checkpoints" / "last.ckpt").is_file()

    hours = (before.spent_s(time.time()) + 90) / 3600
    _, err = ended(start("resume", "cut", f"budget.gpu_hours={hours:.6f}"), 3)
    assert "budget.gpu_hours=" in err
    after = Journal.read(folder).trials[0]
    assert after.starts == 2
    run = tmp_path / "runs" / state["run_id"]
    # No step is lost: the checkpoint is of the last one, or of one later than what was last heard.
    assert events(run, "started")[1]["step"] >= events(run, "interrupted")[0]["step"] > 0
    assert after.results[len(before.trials[0].results)]["epoch"] >= before.trials[0].results[-1]["epoch"]
