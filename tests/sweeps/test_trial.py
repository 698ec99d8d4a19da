"""What Tune hears of a trial, and when."""

import threading
import time
from collections.abc import Callable
from math import nan
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from hydra_plugins.ray_tune_sweeper._trial import Lost
from onestage.cluster.stop import Stop
from onestage.sweeps import trial
from onestage.sweeps.folder import Setup, State


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    heard: list[dict[str, Any]] = []
    monkeypatch.setattr(trial, "_tell_tune", lambda metrics, run_id: heard.append(metrics))
    return heard


@pytest.fixture
def report(sweep_folder: Callable[..., Path]) -> trial.Report:
    folder = sweep_folder({0: ("unfinished", None)})
    report = trial.Report(State(), Setup.load(folder), folder / "0")
    report.stop = Stop()
    return report


def validated(epoch: int, score: float) -> dict[str, Any]:
    return {"validated": {"epoch": epoch, "step": 6 * epoch, "metrics": {"val/map": score}}}


def test_a_validation_is_told_when_a_checkpoint_holds_it(report: trial.Report, told: list[dict[str, Any]]) -> None:
    report(validated(1, 0.25))
    report({"written": 3})  # of the middle of the epoch
    assert told == [] and report.state.score == 0.25
    report({"written": 6})
    report({"written": 9})
    assert told == [{"val/map": 0.25, "best": 0.25, "epoch": 1}]


def test_one_whose_checkpoint_failed_is_told_before_the_next(report: trial.Report, told: list[dict[str, Any]]) -> None:
    report(validated(1, 0.5))
    report(validated(2, 0.25))
    assert [one["epoch"] for one in told] == [1]
    report({"written": 12})
    assert [(one["epoch"], one["best"]) for one in told] == [(1, 0.5), (2, 0.5)]


def test_what_a_restart_repeats_is_not_told_again(report: trial.Report, told: list[dict[str, Any]]) -> None:
    for epoch in (1, 2, 1, 2, 3):
        report(validated(epoch, 0.1 * epoch))
        report({"written": 6 * epoch})
    assert [one["epoch"] for one in told] == [1, 2, 3]


def test_a_trial_that_tune_ends_saves_and_says_no_more(
    report: trial.Report, told: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(metrics: dict[str, Any], run_id: str) -> None:
        told.append(metrics)
        raise SystemExit

    monkeypatch.setattr(trial, "_tell_tune", end)
    for epoch in (1, 2):
        report(validated(epoch, 0.5))
        report({"written": 6 * epoch})
    assert report.stop.asked == "ended" and [one["epoch"] for one in told] == [1]


def test_one_that_a_kill_kept_from_the_search_is_told_after_the_resume(
    report: trial.Report, told: list[dict[str, Any]]
) -> None:
    report(validated(1, 0.5))  # killed before its checkpoint was there: the epoch is trained again
    again = trial.Report(State.load(report.folder), report.setup, report.folder)
    again.stop = Stop()
    again(validated(1, 0.5))
    again({"written": 6})
    assert [one["epoch"] for one in told] == [1]


@pytest.mark.parametrize(
    ("maximize", "scores", "best"),
    [(True, [nan, 0.25, 0.5, nan, 0.125], 0.5), (False, [0.5, nan, 0.9, 0.5], 0.5), (True, [nan], None)],
)
def test_the_best_so_far_is_a_number(
    sweep_folder: Callable[..., Path], told: list[dict[str, Any]], maximize: bool, scores: list[float], best: float
) -> None:
    folder = sweep_folder({0: ("unfinished", None)}, maximize=maximize)
    report = trial.Report(State(), Setup.load(folder), folder / "0")
    report.stop = Stop()
    for epoch, score in enumerate(scores, 1):
        report(validated(epoch, score))
    assert report.state.score == best


def test_a_trials_next_life_waits_for_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under PBT, which starts a trial anew while it still saves."""
    lives: list[str] = []
    began = threading.Event()

    def live(config: dict[str, Any], number: int, folder: Path) -> dict[str, Any]:
        lives.append(f"{config['life']} begins")
        began.set()
        time.sleep(0.5)
        lives.append(f"{config['life']} ends")
        return {}

    monkeypatch.setattr(trial, "_run", live)
    first = threading.Thread(target=trial.run, args=[{"life": "first"}, 0, tmp_path / "0"])
    first.start()
    assert began.wait(5)
    trial.run({"life": "second"}, 0, tmp_path / "0")
    first.join()
    assert lives == ["first begins", "first ends", "second begins", "second ends"]
    monkeypatch.setattr(trial, "FAREWELL_S", 0.1)
    with FileLock(tmp_path / "0" / "lock"), pytest.raises(Lost, match="former life"):
        trial.run({"life": "third"}, 0, tmp_path / "0")
