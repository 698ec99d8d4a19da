"""How a sweep ends and goes on, without its trainings: exit codes, what a resume may change, what MLflow is told."""

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import pytest

from hydra_plugins.ray_tune_sweeper._journal import NAME, Journal
from onestage.errors import DONE, FAILED, OUT_OF_BUDGET, InputError
from onestage.sweeps import status, sweep
from onestage.sweeps.folder import Setup, State, journal_of
from onestage.sweeps.watch import Watch
from onestage.tracking import runs
from onestage.tracking.client import client

Make = Callable[..., Path]


class Unwatched(nullcontext[None]):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder


@pytest.mark.parametrize(
    ("states", "because", "ended", "code"),
    [
        (["done", "failed"], "all", "all", DONE),
        (["stopped"], "all", "all", DONE),
        (["failed", "failed"], "all", "all failed", FAILED),
        (["done", "lost", "lost"], "all", "2 lost", FAILED),
        (["done", "unfinished"], "hours", "hours", OUT_OF_BUDGET),
        (["unfinished"], "trial_hours", "gpu_hours", OUT_OF_BUDGET),
    ],
)
def test_exit_codes(
    sweep_folder: Make, monkeypatch: pytest.MonkeyPatch, states: list[str], because: str, ended: str, code: int
) -> None:
    folder = sweep_folder({number: (state, None) for number, state in enumerate(states)})
    journal = Journal.open(folder)
    journal.add("sweep_end", reason=because)
    journal.close()
    monkeypatch.setattr(sweep, "multirun", lambda *given: None)
    assert sweep._run_trials(cast(Watch, Unwatched(folder)), []) == (ended, code)


@pytest.mark.parametrize("changed", ["sweep.metric=val/map_50", "data.root=elsewhere", "detector=ssd300", "seed=3,4"])
def test_a_resume_may_not_change_what_its_trials_are(sweep_folder: Make, tmp_path: Path, changed: str) -> None:
    sweep_folder({0: ("done", 0.5)})
    with pytest.raises(InputError, match="goes on as it was begun; what may change is budget"):
        sweep.resume("one", [changed], storage=str(tmp_path / "runs"))


def test_runs_whose_end_never_arrived_are_ended_with_the_sweepers_words(sweep_folder: Make, tmp_path: Path) -> None:
    store = runs.tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    runs.check(store)
    folder = sweep_folder({0: ("stopped", 0.25), 1: ("failed", None)}, tracking_uri=store)
    for number in (0, 1):
        run_id = runs.open_run(store, "mended", name=f"one #{number}", tags={"onestage.sweep": "one"})
        state: Any = json.loads((folder / str(number) / "state.json").read_text())
        State(**{**state, "run_id": run_id}).save(folder / str(number))
    setup = Setup.load(folder)
    assert len(status.mend(folder, setup, journal_of(folder))) == 2
    for number, reason in enumerate(("by asha", "no luck")):
        run = client(store).get_run(str(State.load(folder / str(number)).run_id))
        assert run.info.status == "KILLED" and run.data.tags[runs.REASON_TAG] == reason
        assert run.data.tags["point.optimizer.lr"] == str(0.001 * (number + 1))
    assert status.mend(folder, setup, journal_of(folder)) == []


def test_a_server_that_is_away_is_asked_once(
    sweep_folder: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = sweep_folder(dict.fromkeys(range(5), ("stopped", 0.25)), tracking_uri="http://127.0.0.1:9")
    asked: list[str] = []
    monkeypatch.setattr(runs, "end_if_running", lambda uri, run, reason: False)
    monkeypatch.setattr(runs, "tell", lambda uri, run, tags: bool(asked.append(run)))
    assert status.mend(folder, Setup.load(folder), journal_of(folder)) == []
    assert asked == ["run0"]
    assert "onestage sweep status one" in capsys.readouterr().err


def test_a_damaged_journal_is_one_line_and_hides_no_other_sweep(sweep_folder: Make, tmp_path: Path) -> None:
    folder = sweep_folder({0: ("done", 0.5)})
    lines = (folder / NAME).read_text().splitlines()
    (folder / NAME).write_text("\n".join([lines[0], lines[1][:-9], *lines[2:]]) + "\n")
    storage = str(tmp_path / "runs")
    with pytest.raises(InputError, match=r"trials\.jsonl:2 is damaged .*: remove the line"):
        status.mended("one", storage)
    (listed,) = status.all_of(storage)
    assert "damaged" in listed.state


def test_ray_is_not_imported_before_its_token_is_set() -> None:
    """A Ray of our own takes its token from the environment, which Ray reads when it is imported."""
    code = "import sys, onestage.sweeps.sweep; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
