"""Which point to try next: a pure function of the seed, the trial's number and what is known of the other trials.

So a resumed sweep goes on just as the uninterrupted one would have, with nothing to restore.
"""

import itertools
import random
import warnings
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from hydra.errors import HydraException
from ray.tune.search import Searcher

from hydra_plugins.ray_tune_sweeper._journal import Journal, Trial
from hydra_plugins.ray_tune_sweeper._space import Choices, Parameter, Point, Space, Value

Suggestion = Callable[[int, Point], dict[str, Any]]  # of a trial: what Tune calls its config


class Strategy(Protocol):
    def __call__(self, number: int, known: Iterable[Trial]) -> Point | None:
        """The point of trial ``number``, or None where there are no more."""


def grid(space: Space) -> Strategy:
    """Every point in turn. Raises HydraException where the space has an interval."""
    space.grid()  # raises now, not at the first trial

    return lambda number, known: next(itertools.islice(space.grid(), number, None), None)


def uniform(space: Space, seed: int) -> Strategy:
    """Draws at random, from an interval's logarithm where that is tagged log; whatever the others gave."""
    return lambda number, known: space.draw(seed, number)


def tpe(space: Space, seed: int, *, maximize: bool, time_attr: str, metric: str) -> Strategy:
    """Optuna's tree-structured Parzen estimator: multivariate, grouped by which parameters exist together."""
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
    from optuna.trial import TrialState, create_trial

    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def distribution(domain: Any) -> BaseDistribution:
        if isinstance(domain, Choices):  # by place where there is an order: what is near is alike
            texts = domain.texts
            return IntDistribution(0, len(texts) - 1) if domain.ordered else CategoricalDistribution(texts)
        if domain.whole:
            return IntDistribution(int(domain.low), int(domain.high), log=domain.log)
        return FloatDistribution(domain.low, domain.high, log=domain.log)

    distributions = {parameter.key: distribution(parameter.domain) for parameter in space.parameters}
    ordered = {
        parameter.key: parameter.domain.texts
        for parameter in space.parameters
        if isinstance(parameter.domain, Choices) and parameter.domain.ordered
    }
    states = {"done": TrialState.COMPLETE, "stopped": TrialState.PRUNED, "unfinished": TrialState.RUNNING}

    def told(trial: Trial) -> Any:
        inner = {k: ordered[k].index(str(v)) if k in ordered else v for k, v in trial.point.items()}
        steps = {int(r[time_attr]): float(r[metric]) for r in trial.results if metric in r and time_attr in r}
        return create_trial(
            state=states[trial.state],
            value=trial.value if trial.state == "done" else None,
            params=inner,
            distributions={key: distributions[key] for key in inner},
            intermediate_values=steps,
        )

    def propose(number: int, known: Iterable[Trial]) -> Point:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.TPESampler(
                multivariate=True,
                group=True,
                constant_liar=True,
                seed=random.Random(f"{seed}/{number}").getrandbits(32),
            )
            study = optuna.create_study(sampler=sampler, direction="maximize" if maximize else "minimize")
            usable = [one for one in known if one.state in states and (one.state != "done" or one.value is not None)]
            study.add_trials([told(trial) for trial in usable])
            asked = study.ask()

            def choose(parameter: Parameter) -> Value:
                key, domain = parameter.key, distributions[parameter.key]
                if isinstance(domain, CategoricalDistribution):
                    return str(asked.suggest_categorical(key, domain.choices))
                if isinstance(domain, FloatDistribution):
                    return asked.suggest_float(key, domain.low, domain.high, log=domain.log)
                assert isinstance(domain, IntDistribution)
                whole = asked.suggest_int(key, domain.low, domain.high, log=domain.log)
                return ordered[key][whole] if key in ordered else whole

            return space.walk(choose)

    return propose


class Search(Searcher):
    """Gives Tune first the trials that a former life of the sweep left unfinished, then new ones, up to ``trials``."""

    def __init__(
        self,
        journal: Journal,
        strategy: Strategy,
        *,
        trials: int | None,
        space: Space,
        suggestion: Suggestion,
    ) -> None:
        super().__init__()
        self.journal, self.strategy, self.trials, self.space = journal, strategy, trials, space
        self.suggestion = suggestion
        self.again = deque(trial.number for trial in journal.unfinished())

    def suggest(self, trial_id: str) -> Any:
        if self.again:
            number = self.again.popleft()
            return self.suggestion(number, self.journal.trials[number].point)
        number = len(self.journal.trials)
        point = None
        if self.trials is None or number < self.trials:
            point = self.strategy(number, self.journal.trials.values())
        if point is None:  # whoever still runs may be lost and come again
            running = any(trial.state == "unfinished" for trial in self.journal.trials.values())
            return None if running else Searcher.FINISHED
        suggestion = self.suggestion(number, point)
        self.journal.add("trial", trial=number, point=point, overrides=self.space.overrides(point))
        return suggestion

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The journal has it already."""

    def save(self, checkpoint_path: str) -> None:
        """The journal is what is kept."""

    def restore(self, checkpoint_path: str) -> None:
        raise HydraException("a sweep is resumed from its journal, with hydra.sweeper.resume=true")
