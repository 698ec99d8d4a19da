"""Sweeps on a real Ray: what users see of an app that knows of the sweeper by ``ray.tune.report`` alone."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from hydra.errors import HydraException
from hydra.test_utils.test_utils import TSweepRunner
from omegaconf import DictConfig, OmegaConf

from hydra_plugins.ray_tune_sweeper._journal import NAME, Journal

from .conftest import sweeping

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

App = Callable[..., subprocess.Popen[str]]


def finished(process: subprocess.Popen[str], code: int = 0) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    return output


def until(condition: Callable[[], Any], seconds: float = 240) -> Any:
    for _ in range(int(seconds * 20)):
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s")


def test_the_apps_return_value_is_the_objective(app: App, tmp_path: Path) -> None:
    finished(app("x=3,-1,2", "kind=a", "hydra.sweep.dir=out"))
    assert OmegaConf.load(tmp_path / "out" / "optimization_results.yaml") == {
        "name": "ray_tune",
        "best_evaluated_params": {"x": "-1"},
        "best_evaluated_result": 1.0,
        "best_trial": 1,
    }
    trials = Journal.read(tmp_path / "out").trials
    assert [trial.value for trial in trials.values()] == [9.0, 1.0, 4.0]
    assert [r["loss"] for r in trials[2].results] == [5.0, 4.5, 4 + 1 / 3]
    assert OmegaConf.load(tmp_path / "out" / "1" / ".hydra" / "overrides.yaml") == ["x=-1", "kind=a"]


def test_asha_stops_a_trial_which_then_says_farewell(app: App, tmp_path: Path) -> None:
    """One at a time, each worse than those before: with a rung at every epoch all but the first are stopped there."""
    asha = ["scheduler=asha", "metric=loss", "asha.reduction_factor=2", "max_concurrent=1", "bundles=[{CPU: 2}]"]
    output = finished(app("x=1,2,3", "farewell=1", "hydra.sweep.dir=out", *(f"hydra.sweeper.{one}" for one in asha)))
    trials = Journal.read(tmp_path / "out").trials
    assert [(trial.state, len(trial.results)) for trial in trials.values()] == [("done", 3)] + [("stopped", 1)] * 2
    assert [(tmp_path / "out" / str(number) / "farewell").exists() for number in trials] == [True] * 3
    assert "2 stopped" in output and "best: loss=1, #0" in output


def test_killed_and_resumed(app: App, tmp_path: Path) -> None:
    """Finished trials stay as they are, the one under way goes on in its folder, and the rest is what it would be."""
    arguments = ["x=interval(0,1)", "epochs=6", "pause=0.3", "hydra.sweep.dir=out"]
    arguments += [f"hydra.sweeper.{one}" for one in ("trials=3", "max_concurrent=1", "time_attr=epoch", "seed=3")]
    first = app(*arguments)
    out = tmp_path / "out"
    until(lambda: (out / "1" / "learnt").exists() and int((out / "1" / "learnt").read_text() or 0) >= 3)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    with (out / NAME).open("ab") as journal:
        journal.write(b'{"event": "result", "tri')
    before = Journal.read(out).trials
    assert [trial.state for trial in before.values()] == ["done", "unfinished"]

    refused = finished(app(*arguments), 1)
    assert "hydra.sweeper.resume=true" in refused
    finished(app(*arguments, "hydra.sweeper.resume=true"))
    after = Journal.read(out).trials
    assert [trial.state for trial in after.values()] == ["done"] * 3
    assert after[0] == before[0]
    assert after[1].point == before[1].point
    again = [result["epoch"] for result in after[1].results[len(before[1].results) :]]
    assert again[0] >= 4 and again == list(range(again[0], 7))  # not from the start
    assert len({trial.point["x"] for trial in after.values()}) == 3

    finished(app(*arguments, "hydra.sweeper.resume=true"))
    assert Journal.read(out).trials == after


def test_interrupted_once_it_ends_cleanly_and_says_how_to_go_on(app: App, tmp_path: Path) -> None:
    process = app("x=1,2", "epochs=100", "pause=0.2", "hydra.sweep.dir=out")
    out = tmp_path / "out"
    until(lambda: (out / "0" / "learnt").exists())
    process.send_signal(signal.SIGINT)
    output = finished(process, -signal.SIGINT)
    assert "hydra.sweeper.resume=true" in output
    assert (out / "0" / "farewell").exists()
    journal = Journal.read(out)
    assert journal.ended_because == "interrupted" and journal.trials[0].state == "unfinished"


Runner = Callable[..., Any]


@pytest.fixture
def sweep(own_ray: str, hydra_sweep_runner: TSweepRunner, tmp_path: Path, hydra_restore_singletons: None) -> Runner:
    """Sweeps a function of a config with foo and bar in this process; what sweep() returned and the journal."""

    def run(task: Callable[[DictConfig], Any], *overrides: str) -> tuple[Any, Journal]:
        with sweeping(hydra_sweep_runner, tmp_path, *overrides, task=task) as done:
            assert done.returns is not None
            return done.returns[0], Journal.read(tmp_path)

    return run


def test_a_failing_trial_is_recorded_and_the_others_run(sweep: Runner) -> None:
    def task(cfg: DictConfig) -> float:
        if cfg.foo == 2:
            raise ValueError("two is unlucky")
        if cfg.foo == 3:
            raise SystemExit("three gives up")
        return float("nan") if cfg.foo == 4 else float(cfg.foo)

    returns, journal = sweep(task, "foo=1,2,3,4")
    reasons = {trial.number: trial.reason for trial in journal.trials.values() if trial.state == "failed"}
    assert reasons == {
        1: "ValueError: two is unlucky",
        2: "the app ended itself: SystemExit: three gives up",
        3: "objective is nan",
    }
    assert returns[0].return_value == 1.0
    with pytest.raises(HydraException, match="two is unlucky"):
        _ = returns[1].return_value


def test_a_lost_trial_runs_again(sweep: Runner) -> None:
    def task(cfg: DictConfig) -> float:
        from hydra.core.hydra_config import HydraConfig

        mark = Path(HydraConfig.get().runtime.output_dir) / "been here"
        if cfg.foo == 1 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return float(cfg.foo)

    _, journal = sweep(task, "foo=1,2")
    assert [(trial.state, trial.starts) for trial in journal.trials.values()] == [("done", 2), ("done", 1)]


def test_one_that_the_app_calls_lost_runs_again_and_lost_twice_it_is_left_for_a_resume(sweep: Runner) -> None:
    def task(cfg: DictConfig) -> float:
        from hydra.core.hydra_config import HydraConfig

        from hydra_plugins.ray_tune_sweeper._trial import Lost

        mark = Path(HydraConfig.get().runtime.output_dir) / "been here"
        if cfg.foo == 2 or not mark.exists():
            mark.touch()
            raise Lost("no machine for it")
        return float(cfg.foo)

    _, journal = sweep(task, "foo=1,2")
    first, second = journal.trials.values()
    assert (first.state, first.starts, first.value) == ("done", 2, 1.0)
    assert (second.state, second.starts, second.reason) == ("lost", 2, "no machine for it")
    assert journal.unfinished() == [second]


def test_out_of_time_it_ends_with_the_best_so_far(sweep: Runner) -> None:
    def task(cfg: DictConfig) -> float:
        from ray import tune

        for _ in range(1000 if cfg.foo == 2 else 1):
            time.sleep(0.1)
            tune.report({"loss": 1.0})
        return 1.0

    start = time.monotonic()
    returns, journal = sweep(task, "foo=1,2,3", "hydra.sweeper.hours=0.005", "hydra.sweeper.max_concurrent=1")
    assert time.monotonic() - start < 90  # trial 1 alone would take 100 s
    assert journal.ended_because == "hours"
    assert [trial.state for trial in journal.trials.values()] == ["done", "unfinished"]
    assert returns[0].return_value == 1.0


def test_who_reports_seldom_can_ask_whether_to_end(sweep: Runner, tmp_path_factory: pytest.TempPathFactory) -> None:
    asked = tmp_path_factory.mktemp("asked") / "asked"  # the sweep's own folder goes with it

    def task(cfg: DictConfig) -> float:
        from ray import tune

        from hydra_plugins.ray_tune_sweeper._trial import asked_to_end

        tune.report({"loss": 1.0})
        while not asked_to_end():
            time.sleep(0.1)
        asked.touch()
        raise SystemExit

    _, journal = sweep(task, "foo=1", "hydra.sweeper.trial_hours=0.006")
    assert journal.trials[0].state == "unfinished"
    assert asked.exists()


def test_a_farewell_has_a_limit(sweep: Runner) -> None:
    def task(cfg: DictConfig) -> float:
        from ray import tune

        try:
            while True:
                time.sleep(0.1)
                tune.report({"loss": 1.0})
        finally:
            time.sleep(300)

    start = time.monotonic()
    _, journal = sweep(task, "foo=1", "hydra.sweeper.trial_hours=0.003", "hydra.sweeper.stop_s=1")
    assert time.monotonic() - start < 100
    assert journal.ended_because == "trial_hours"
    assert journal.trials[0].state == "unfinished" and journal.trials[0].results


def test_a_metric_that_nobody_reports_ends_the_sweep_at_its_first_trial(sweep: Runner) -> None:
    def task(cfg: DictConfig) -> None:
        from ray import tune

        tune.report({"cost": 1.0})

    settings = ["hydra.sweeper.max_concurrent=1", "hydra.sweeper.metric=loss", "hydra.sweeper.scheduler=asha"]
    with pytest.raises(HydraException, match=r"asha has nothing to go by: trial 0 .* 'loss', but cost, "):
        sweep(task, "foo=range(20)", *settings)


def test_a_trial_larger_than_the_cluster_is_refused(sweep: Runner, tmp_path: Path) -> None:
    with pytest.raises(HydraException, match="1 CPU and 4 GPU: it never fits on this cluster, whose nodes have 2 CPU"):
        sweep(lambda cfg: 1.0, "foo=1,2", "hydra.sweeper.bundles=[{CPU: 1}, {GPU: 4}]")
    assert Journal.read(tmp_path).trials == {}


def test_pbt_goes_on_from_the_best_with_another_number(sweep: Runner) -> None:
    """Two trials whose score grows by foo each step: the worse one goes on from the better one's checkpoint.

    Side by side, and the better one reports first: Ray compares the last scores of both, of whatever step.
    """

    def task(cfg: DictConfig) -> float:
        import json
        import tempfile

        from hydra.core.hydra_config import HydraConfig
        from ray import tune

        number, out = HydraConfig.get().job.num, Path(HydraConfig.get().runtime.output_dir).parent
        score, step = 0.0, 0
        if checkpoint := tune.get_checkpoint():
            with checkpoint.as_directory() as folder:
                score, step = json.loads((Path(folder) / "state").read_text())
        while step < 6:
            score, step = score + cfg.foo, step + 1
            (out / f"{number} at {step}: {cfg.foo}").touch()
            other = until(lambda: [*out.glob(f"{1 - number} at {step}: *")])[0].name  # noqa: B023
            if float(other.split()[-1]) > cfg.foo:
                until((out / f"{1 - number} reported {step}").exists)
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / "state").write_text(json.dumps([score, step]))
                tune.report({"score": score, "step": step}, checkpoint=tune.Checkpoint.from_directory(folder))
            (out / f"{number} reported {step}").touch()
        return score

    settings = ["scheduler=pbt", "pbt.perturbation_interval=2", "metric=score", "direction=maximize", "time_attr=step"]
    space = ["search=random", "trials=2", "seed=1", "pbt.resample_probability=0", "pbt.quantile_fraction=0.5"]
    _, journal = sweep(task, "foo=interval(1,10)", *(f"hydra.sweeper.{one}" for one in settings + space))
    first = {trial.number: trial.results[0]["score"] for trial in journal.trials.values()}
    worse, better = sorted(first, key=lambda number: first[number])
    assert [trial.state for trial in journal.trials.values()] == ["done", "done"]
    assert journal.trials[worse].starts > 1
    assert journal.trials[worse].value > 6 * first[worse]
    assert journal.trials[better].value == pytest.approx(6 * first[better])


def test_the_ray_of_the_tests_is_theirs(own_ray: str) -> None:
    """A sweep leaves the Ray alone that it found, and nothing of its own in it."""
    assert ray.is_initialized()
    until(lambda: ray.available_resources().get("CPU") == 2.0, 20)
