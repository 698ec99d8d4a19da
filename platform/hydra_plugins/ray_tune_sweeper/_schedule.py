"""Tune's schedulers, fed with the results of a former life, and leaving a trial the time that it needs to end."""

import itertools
import math
import random
from types import SimpleNamespace
from typing import Any

from hydra.errors import HydraException
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)

from hydra_plugins.ray_tune_sweeper._journal import Journal
from hydra_plugins.ray_tune_sweeper._search import Suggestion
from hydra_plugins.ray_tune_sweeper._space import Interval, Space
from hydra_plugins.ray_tune_sweeper._trial import FAILED, LOST


class _Former:
    """Stands for a trial of a former life; schedulers know trials by identity or by id."""

    def __init__(self, number: int) -> None:
        self.trial_id = f"former {number}"


class _Sweeps:
    """Mixed into each of Tune's: results may lack a key, and a stopped trial has ``stop_s`` to end."""

    journal: Journal
    stop_s: float
    needs: tuple[str, ...]  # keys without which it can't judge a result

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        # Tune's own 10 s would cut short whoever is still ending when the sweep does, and no setting changes them.
        tune_controller._tune_controller._actor_force_cleanup_timeout = self.stop_s
        super().on_trial_add(tune_controller, trial)  # type: ignore[misc]

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        if FAILED in result or LOST in result:
            super().on_trial_error(tune_controller, trial)  # type: ignore[misc]
        elif all(key in result for key in self.needs):
            super().on_trial_complete(tune_controller, trial, result)  # type: ignore[misc]

    def feed(self, trial: Any, number: int) -> None:
        """Takes in what trial ``number`` reported in a former life, whatever was decided on it then."""
        for result in self.journal.trials[number].results:
            if all(key in result for key in self.needs):
                self.on_trial_result(None, trial, result)  # type: ignore[attr-defined]

    def feed_ended(self) -> None:
        """Takes in the trials that ended in a former life."""
        for number, trial in self.journal.trials.items():
            if trial.state in ("done", "stopped", "failed"):
                former = _Former(number)
                super().on_trial_add(None, former)  # type: ignore[misc]
                self.feed(former, number)


class Fifo(_Sweeps, FIFOScheduler):
    """Every trial runs to its own end."""


class Asha(_Sweeps, AsyncHyperBandScheduler):
    """Asynchronous successive halving, arXiv:1810.05934."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.ids: dict[int, str] = {}  # Tune's, by number

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        number = int(trial.custom_trial_name)
        if (lost := self.ids.get(number)) is not None:  # what it reported then counts once
            for _, recorded in itertools.chain.from_iterable(bracket._rungs for bracket in self._brackets):
                recorded.pop(lost, None)
        self.ids[number] = trial.trial_id
        self.feed(trial, number)  # so that one that goes on at step 6 has its rungs below

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision = str(super().on_trial_result(tune_controller, trial, result))
        # Nothing is won by stopping one that is at its end.
        return TrialScheduler.CONTINUE if result.get(self._time_attr, 0) >= self._max_t else decision


class Median(_Sweeps, MedianStoppingRule):
    """The median stopping rule of Google Vizier."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.former: dict[int, Any] = {}  # Tune's trials, by number

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        number = int(trial.custom_trial_name)
        if number in self.former:  # lost, and here again
            self._results.pop(self.former[number], None)
        self.former[number] = trial
        self.feed(trial, number)

    def feed(self, trial: Any, number: int) -> None:
        results = self.journal.trials[number].results
        self._results[trial] = [result for result in results if all(key in result for key in self.needs)]
        if not self._results[trial]:
            del self._results[trial]


class Population(_Sweeps, PopulationBasedTraining):
    """Population based training, arXiv:1711.09846: the worst go on from the best's checkpoint, with other numbers."""

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        # Tune's refuses searchers, for fear that they would learn from it; ours are grid and random.
        inner = tune_controller._tune_controller
        super().on_trial_add(SimpleNamespace(search_alg=None, _tune_controller=inner), trial)


def build(settings: Any, journal: Journal, space: Space, suggestion: Suggestion, metric: str) -> Any:
    """The scheduler that the settings name, knowing the journal's ended trials. Raises HydraException."""
    name, time_attr = settings.scheduler or "none", settings.time_attr
    mode = {"minimize": "min", "maximize": "max"}[settings.direction]
    common: dict[str, Any] = {"time_attr": time_attr, "metric": metric, "mode": mode}
    scheduler: _Sweeps
    if name == "none":
        scheduler = Fifo()
    elif name == "asha":
        asha = settings.asha
        if not 0 < asha.grace_period <= asha.max_t or asha.reduction_factor <= 1:
            raise HydraException("hydra.sweeper.asha: need 0 < grace_period <= max_t and reduction_factor > 1")
        scheduler = Asha(**common, **asha, stop_last_trials=False)  # an app at its last step ends by itself
    elif name == "median":
        common |= {**settings.median, "min_time_slice": math.inf}  # never pause a trial: it would start anew
        scheduler = Median(**common)
    elif name == "pbt":
        if not any(isinstance(one.domain, Interval) for one in space.parameters):
            raise HydraException("scheduler=pbt changes intervals while they train, and the space has none")
        rng, resample = random.Random(settings.seed), settings.pbt.resample_probability

        def explore(config: dict[str, Any]) -> dict[str, Any]:
            return suggestion(config["number"], space.perturb(config["point"], rng, resample))

        common |= settings.pbt
        scheduler = Population(**common, custom_explore_fn=explore, log_config=False, require_attrs=False)
    else:
        raise HydraException(f"hydra.sweeper.scheduler={name}: there are none, asha, median and pbt")
    scheduler.journal, scheduler.stop_s = journal, settings.stop_s
    scheduler.needs = () if name == "none" else (metric, time_attr)
    if name in ("asha", "median"):
        scheduler.feed_ended()
    return scheduler
