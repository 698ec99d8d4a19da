"""What a sweep's folder says of it."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from hydra_plugins.ray_tune_sweeper._journal import Journal
from onestage.sweeps.folder import Setup, State
from onestage.sweeps.watch import Watch, entries, overview

Make = Callable[..., Path]


def test_the_best_stand_first_and_those_without_a_score_last(sweep_folder: Make) -> None:
    folder = sweep_folder({0: ("done", 0.3), 1: ("failed", None), 2: ("stopped", 0.1), 3: ("done", 0.5)})
    found = entries(folder, Setup.load(folder), dataset_hash="abc")
    assert [(one.trial, one.score, one.state, one.status) for one in found] == [
        (3, 0.5, "done", "FINISHED"),
        (0, 0.3, "done", "FINISHED"),
        (2, 0.1, "stopped", "KILLED"),
        (1, None, "failed", "FAILED"),
    ]
    assert (found[0].low, found[0].high) == (pytest.approx(0.4), pytest.approx(0.6))
    assert found[3].reason == "no luck"


def test_a_minimised_metric_turns_the_order(sweep_folder: Make) -> None:
    folder = sweep_folder({0: ("done", 0.3), 1: ("done", 0.5)}, metric="val/loss", maximize=False)
    found = entries(folder, Setup.load(folder), dataset_hash=None)
    assert [one.trial for one in found] == [0, 1]
    assert found[0].low is None  # the interval is the mAP's


def test_gpu_hours_count_every_worker(sweep_folder: Make) -> None:
    folder = sweep_folder({0: ("done", 0.3)})
    journal = Journal.read(folder)
    seconds = journal.trials[0].spent_s
    assert seconds > 0
    found = entries(folder, Setup.load(folder), dataset_hash=None)
    assert found[0].gpu_hours == pytest.approx(2 * seconds / 3600)  # two workers, each counted as a GPU


def test_the_table_says_what_runs_and_what_was_cut(sweep_folder: Make) -> None:
    folder = sweep_folder({0: ("done", 0.3), 1: ("unfinished", 0.2)})
    setup = Setup.load(folder)

    def shown() -> str:
        console = Console(width=120, record=True, file=io.StringIO())
        console.print(overview(folder, setup, Journal.read(folder)))
        return console.export_text()

    assert "1 cut, 1 done" in shown()
    held = Journal.open(folder)
    try:
        assert "1 done, 1 running" in shown() and "starting" in shown()
    finally:
        held.close()


def test_a_state_that_is_damaged_is_none(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text('{"run_id": "a"')
    assert State.load(tmp_path) == State()
    assert State.load(tmp_path / "nowhere") == State()


def test_what_was_cut_is_neither_done_nor_lost(sweep_folder: Make) -> None:
    folder = sweep_folder({0: ("unfinished", 0.2)})
    (found,) = entries(folder, Setup.load(folder), dataset_hash=None)
    assert (found.state, found.status, found.score) == ("cut", "KILLED", 0.2)


def test_a_sweep_that_goes_on_does_not_repeat_what_was_said(sweep_folder: Make) -> None:
    folder = sweep_folder({0: ("done", 0.5), 1: ("unfinished", 0.25)})
    watch = Watch(folder, Setup.load(folder))
    watch.console = Console(width=120, file=io.StringIO())
    watch._look()
    journal = Journal.open(folder)
    journal.add("end", trial=1, state="done", value=0.25)
    journal.close()
    watch._look()
    assert isinstance(watch.console.file, io.StringIO)
    assert watch.console.file.getvalue().splitlines() == ["#1 done: epoch 3, val/map 0.2500 (best: 0.5000 of #0)"]


def test_what_a_trial_waits_for_is_said_once_each_time(sweep_folder: Make) -> None:
    folder = sweep_folder({0: ("unfinished", None)})
    watch = Watch(folder, Setup.load(folder))
    watch.console = Console(width=120, file=io.StringIO())

    def look(doing: str) -> None:
        State(doing=doing).save(folder / "0")
        watch._look()

    for doing in ("waiting: 2 GPU asked, 9 s", "waiting: 2 GPU asked, 8 s", "training", "waiting: 2 GPU asked, 9 s"):
        look(doing)
    assert isinstance(watch.console.file, io.StringIO)
    assert watch.console.file.getvalue().splitlines() == ["#0 waiting: 2 GPU asked, 9 s"] * 2
