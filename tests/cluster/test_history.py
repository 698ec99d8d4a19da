"""The run's log: what is in it, what a loss cost, and that it goes on over processes; numbers by hand."""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from onestage.cluster.history import History


class Run:
    """A history with clocks of the test's own: the monotonic one begins anew with each process, the day's does not."""

    def __init__(self, file: Path, *, passed_s: float = 0.0) -> None:
        self.seconds = 0.0
        self.passed_s = passed_s
        self.said: list[str] = []
        self.file = file
        self.history = History(
            file,
            say=self.said.append,
            clock=lambda: 5000.0 + self.seconds,
            now=lambda: datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=self.passed_s + self.seconds),
        )

    def start(self, *hosts: str, step: int = 0, images: int = 0) -> None:
        for rank, host in enumerate(hosts):
            start = {"rank": rank, "host": host, "world_size": len(hosts), "global_batch": 8}
            self.history.hear({"started": start | {"step": step, "images": images}})

    def step(self, step: int, *, at: float) -> None:
        """Steps of eight images."""
        self.seconds = at
        message = {"epoch": 0, "num_epochs": 1, "step": step, "num_steps": 100, "images": 8 * step}
        self.history.hear(message)

    def lose(self, why: str = "worker 1: killed", **more: Any) -> None:
        self.history.hear({"lost": why, "pause_s": 5.0, "restart": 1, "limit": 8, **more})

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.file.read_text().splitlines()]

    def events(self) -> list[str]:
        return [record["event"] for record in self.records()]


@pytest.fixture
def process(tmp_path: Path) -> Callable[..., Run]:
    """A process that opens the same run's history."""
    return lambda **options: Run(tmp_path / "run" / "history.jsonl", **options)


def test_an_undisturbed_run(process: Callable[..., Run]) -> None:
    run = process()
    run.start("a", "b")
    for step in range(1, 11):
        run.step(step, at=float(step))
    run.history.end("finished")
    assert run.said == ["started: 2 workers on a, b, 8 images a step, from step 0"]
    first, last = run.records()
    assert first["at"] == "2026-01-01T00:00:00.000000Z" and last["at"] == "2026-01-01T00:00:10.000000Z"
    assert first["workers"] == 2 and first["hosts"] == ["a", "b"] and first["global_batch"] == 8
    assert run.history.summary() == {"restarts": 0, "lost_steps": 0, "lost_images": 0, "recovery_s": []}


def test_what_a_lost_worker_cost(process: Callable[..., Run]) -> None:
    """Reached 47 at 100 s; goes on from 40 and does its next step at 123.5 s: seven steps of eight images lost."""
    run = process()
    run.start("a", "b")
    run.step(47, at=100.0)
    run.lose(ranks=[1])
    run.start("a", "c", step=40, images=320)
    run.step(41, at=123.5)
    run.step(60, at=140.0)
    assert run.said[1:] == [
        "lost at step 47: worker 1: killed (worker 1 on b)",
        "starting again in 5 s (1 of at most 8 without progress)",
        "started: 2 workers on a, c, 8 images a step, from step 40",
        "resumed at step 40 after having reached step 47: lost 7 steps (56 images), "
        "23.5 s from the last step before to the first step after",
    ]
    assert run.events() == ["started", "lost", "restart", "started", "resumed"]
    assert run.records()[1]["hosts"] == {"1": "b"}
    assert run.history.summary() == {"restarts": 1, "lost_steps": 7, "lost_images": 56, "recovery_s": [23.5]}


def test_a_start_that_is_lost_before_its_first_step_costs_nothing_twice(process: Callable[..., Run]) -> None:
    run = process()
    run.start("a")
    run.step(10, at=10.0)
    run.lose()
    run.start("a", step=8, images=64)
    run.lose()
    run.start("a", step=8, images=64)
    run.step(9, at=40.0)
    assert run.history.summary() == {"restarts": 2, "lost_steps": 2, "lost_images": 16, "recovery_s": [30.0]}


def test_a_validation_after_a_resume_is_no_step(process: Callable[..., Run]) -> None:
    run = process()
    run.start("a")
    run.step(10, at=10.0)
    run.lose()
    run.start("a", step=8, images=64)
    run.step(8, at=20.0)
    assert run.history.summary()["recovery_s"] == []
    run.step(9, at=25.0)
    assert run.history.summary()["recovery_s"] == [15.0]


def test_a_checkpoint_newer_than_the_last_word_loses_nothing(process: Callable[..., Run]) -> None:
    run = process()
    run.start("a")
    run.step(10, at=10.0)
    run.lose()
    run.start("a", step=12, images=96)
    run.step(13, at=20.0)
    assert run.history.summary() == {"restarts": 1, "lost_steps": 0, "lost_images": 0, "recovery_s": [10.0]}


def test_fewer_and_more_workers(process: Callable[..., Run]) -> None:
    run = process()
    run.start("a", "b", "c")
    run.step(10, at=10.0)
    run.lose(ranks=[2])
    run.start("a", "b", step=10, images=80)
    run.step(11, at=20.0)
    run.start("a", "b", "c", step=11, images=88)
    run.step(12, at=30.0)
    resized = [record for record in run.records() if record["event"] == "resized"]
    assert [(one["before"], one["workers"], one["step"]) for one in resized] == [(3, 2, 10), (2, 3, 11)]
    assert "resized from 3 workers to 2" in run.said
    assert run.history.summary()["restarts"] == 2


def test_a_group_that_never_was_complete_is_forgotten(process: Callable[..., Run]) -> None:
    run = process()
    start = {"rank": 1, "host": "b", "world_size": 2, "global_batch": 8, "step": 0, "images": 0}
    run.history.hear({"started": start})
    run.lose()
    run.start("c", "d")
    assert run.said[-1] == "started: 2 workers on c, d, 8 images a step, from step 0"
    assert run.said[0] == "lost before the first step: worker 1: killed"


def test_hangs_checkpoints_and_notes_are_kept(process: Callable[..., Run]) -> None:
    run = process()
    run.history.hear({"hang": "worker 1 on b stands still"})
    run.history.hear({"checkpoint": "disk full: step 20 was not saved"})
    run.history.hear({"note": "the driver was lost"})
    run.history.hear({"waiting": "3 s of 600 s"})
    run.history.hear({"skipped": ["x"], "file": "y"})
    assert run.events() == ["hang", "checkpoint", "note"]
    assert run.said == ["hang: worker 1 on b stands still", "disk full: step 20 was not saved"]


def test_a_driver_that_was_killed_and_resumed_goes_on_in_the_same_file(process: Callable[..., Run]) -> None:
    """Killed without a word after step 30 at 60 s; the next begins 100 s after the first and steps 20 s later."""
    before = process()
    before.start("a")
    before.step(30, at=60.0)
    after = process(passed_s=100.0)
    after.start("a", step=25, images=200)
    after.step(26, at=20.0)
    assert after.events() == ["started", "started", "resumed"]
    assert after.history.summary() == {"restarts": 1, "lost_steps": 5, "lost_images": 40, "recovery_s": [60.0]}
    third = process(passed_s=500.0)
    assert third.history.summary() == after.history.summary()


def test_a_finished_run_that_is_trained_further_has_lost_nothing(process: Callable[..., Run]) -> None:
    before = process()
    before.start("a")
    before.step(30, at=60.0)
    before.history.end("finished")
    after = process(passed_s=9000.0)
    after.start("a", step=30, images=240)
    after.step(31, at=20.0)
    assert after.history.summary() == {"restarts": 0, "lost_steps": 0, "lost_images": 0, "recovery_s": []}


def test_a_preempted_run_says_so_and_what_its_pause_was(process: Callable[..., Run]) -> None:
    before = process()
    before.start("a")
    before.step(30, at=60.0)
    before.history.end("preempted", "SIGTERM")
    assert before.events()[-1] == "preempted"
    after = process(passed_s=100.0)
    after.start("a", step=30, images=240)
    after.step(31, at=20.0)
    assert after.history.summary() == {"restarts": 1, "lost_steps": 0, "lost_images": 0, "recovery_s": [60.0]}


def test_a_clock_that_was_set_back_makes_no_negative_time(process: Callable[..., Run]) -> None:
    before = process(passed_s=1000.0)
    before.start("a")
    before.step(30, at=60.0)
    after = process()
    after.start("a", step=30, images=240)
    after.step(31, at=20.0)
    assert after.history.summary()["recovery_s"] == [20.0]


def test_a_line_that_was_cut_stays_alone(process: Callable[..., Run]) -> None:
    run = process()
    run.start("a")
    with run.file.open("a") as file:
        file.write('{"at": "2026-')
    again = process()
    again.history.end("failed", "no reason")
    lines = run.file.read_text().splitlines()
    assert len(lines) == 3 and lines[1] == '{"at": "2026-'
    assert json.loads(lines[2])["event"] == "failed"


def test_a_disk_that_is_full_is_said_once_and_raises_nothing(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    run = Run(blocked / "history.jsonl")
    run.start("a")
    run.step(3, at=3.0)
    run.lose()
    run.start("a", step=1, images=8)
    run.step(2, at=9.0)
    run.history.end("finished")
    assert sum("cannot be written" in line for line in run.said) == 1
    assert run.history.summary() == {"restarts": 1, "lost_steps": 2, "lost_images": 16, "recovery_s": [6.0]}


def test_images_that_are_not_said_are_counted_by_steps(process: Callable[..., Run]) -> None:
    """From 320 images at step 40 to step 47 of eight images each: 376; the next group has 344."""
    run = process()
    run.start("a", step=40, images=320)
    run.history.hear({"epoch": 0, "num_epochs": 1, "step": 47, "num_steps": 100})
    run.lose()
    run.start("a", step=43, images=344)
    run.step(44, at=9.0)
    assert run.history.summary()["lost_images"] == 32
