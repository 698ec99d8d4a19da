from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra.errors import HydraException
from omegaconf import OmegaConf
from ray.tune.schedulers import TrialScheduler

from hydra_plugins.ray_tune_sweeper._journal import Journal
from hydra_plugins.ray_tune_sweeper._schedule import build
from hydra_plugins.ray_tune_sweeper._space import parse
from hydra_plugins.ray_tune_sweeper.ray_tune_sweeper import RayTuneSweeperConf

SPACE = parse(["lr=interval(0,1)", "kind=a,b"], {})


@pytest.fixture
def journal(tmp_path: Path) -> Any:
    """Four trials of a former life whose losses after steps 1, 2 and 3 are 1, 2, 3 and 4; and one that didn't end."""
    journal = Journal.open(tmp_path)
    for number in range(5):
        journal.add("trial", trial=number, point={"lr": 0.1, "kind": "a"}, overrides=[])
        for step in (1, 2, 3):
            journal.add("result", trial=number, metrics={"training_iteration": step, "loss": number + 1.0})
        if number < 4:
            journal.add("end", trial=number, state="done", value=number + 1.0)
    yield journal
    journal.close()


def scheduler(journal: Journal, **settings: Any) -> Any:
    full = OmegaConf.merge(OmegaConf.structured(RayTuneSweeperConf), settings)
    return build(full, journal, SPACE, lambda number, point: {"number": number, "point": point}, "loss")


class Running:
    """As much of a trial of Tune's as its schedulers look at."""

    trial_id: str
    custom_trial_name: str


def decides(scheduler: Any, loss: float, number: int = 9, step: int = 1) -> str:
    """What is decided on a trial that reports such a loss."""
    trial = Running()
    trial.trial_id, trial.custom_trial_name = f"now {number}", str(number)
    controller = SimpleNamespace(_tune_controller=SimpleNamespace())
    scheduler.journal.trials.setdefault(number, SimpleNamespace(results=[], state="unfinished"))
    scheduler.on_trial_add(controller, trial)
    return str(scheduler.on_trial_result(controller, trial, {"training_iteration": step, "loss": loss}))


@pytest.mark.parametrize(("name", "good", "bad"), [("asha", 1.5, 3.5), ("median", 2.4, 2.6)])
def test_a_resumed_scheduler_knows_what_was_reported(journal: Journal, name: str, good: float, bad: float) -> None:
    assert decides(scheduler(journal, scheduler=name), good) == TrialScheduler.CONTINUE
    assert decides(scheduler(journal, scheduler=name), bad) == TrialScheduler.STOP
    journal.trials.clear()
    assert decides(scheduler(journal, scheduler=name), bad) == TrialScheduler.CONTINUE


def test_one_that_goes_on_is_judged_where_it_goes_on(journal: Journal) -> None:
    """Trial 4 has its value at rungs 1 and 3 from its former life: at step 4 there is nothing left to decide."""
    assert decides(scheduler(journal, scheduler="asha"), 99.0, number=4, step=4) == TrialScheduler.CONTINUE
    assert decides(scheduler(journal, scheduler="asha"), 99.0, number=4, step=9) == TrialScheduler.CONTINUE
    assert decides(scheduler(journal, scheduler="asha"), 99.0, number=8, step=4) == TrialScheduler.STOP


def test_at_the_last_rung_a_trial_ends_by_itself(journal: Journal) -> None:
    asha = scheduler(journal, scheduler="asha", asha={"max_t": 3})
    assert decides(asha, 99.0, step=3) == TrialScheduler.CONTINUE
    assert decides(asha, 99.0, number=8, step=1) == TrialScheduler.STOP


def test_one_that_was_lost_and_runs_again_counts_once(journal: Journal) -> None:
    """At rungs 1 and 3, which it had reached, its second life's id stands alone."""
    asha = scheduler(journal, scheduler="asha")
    controller = SimpleNamespace(_tune_controller=SimpleNamespace())
    for life in ("first", "second"):
        trial = Running()
        trial.trial_id, trial.custom_trial_name = life, "4"
        asha.on_trial_add(controller, trial)
    lives = [set(recorded) & {"first", "second"} for _, recorded in asha._brackets[0]._rungs]  # the lowest rung last
    assert lives[-2:] == [{"second"}] * 2 and not any(lives[:-2])


def test_the_median_of_one_that_goes_on_is_of_all_its_results(journal: Journal) -> None:
    """Trial 4 had 5 thrice before it was cut."""
    median = scheduler(journal, scheduler="median")
    trial = Running()
    trial.trial_id, trial.custom_trial_name = "again", "4"
    median.on_trial_add(SimpleNamespace(_tune_controller=SimpleNamespace()), trial)
    assert [one["loss"] for one in median._results[trial]] == [5.0, 5.0, 5.0]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"scheduler": "bohb"}, "there are none, asha, median and pbt"),
        ({"scheduler": "asha", "asha": {"max_t": 2, "grace_period": 3}}, "grace_period <= max_t"),
    ],
)
def test_wrong_settings_are_refused(journal: Journal, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(HydraException, match=says):
        scheduler(journal, **settings)


def test_pbt_explores_in_hydras_terms(journal: Journal) -> None:
    pbt = scheduler(journal, scheduler="pbt", pbt={"resample_probability": 0.0})
    donor = SimpleNamespace(config={"number": 3, "point": {"lr": 0.5, "kind": "b"}, "composed": "of the donor"})
    config, _ = pbt._get_new_config(None, donor)
    assert config["point"] in ({"lr": 0.4, "kind": "b"}, {"lr": 0.6, "kind": "b"}) and "composed" not in config
