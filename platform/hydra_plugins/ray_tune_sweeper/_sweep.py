"""A sweep from its command line to its best trial: what is refused before it starts, and what Tune is given to run."""

import logging
import math
import os
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobRuntime, JobStatus, configure_log, env_override, setup_globals
from hydra.errors import HydraException
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict
from ray import tune

from hydra_plugins.ray_tune_sweeper import _cluster, _schedule, _search
from hydra_plugins.ray_tune_sweeper._journal import OUT_OF_TIME, Journal, Trial
from hydra_plugins.ray_tune_sweeper._space import Choices, Point, Space, parse
from hydra_plugins.ray_tune_sweeper._trial import Composed, HydraTrial, Job
from hydra_plugins.ray_tune_sweeper._watch import Recorder, Stop

log = logging.getLogger(__name__)

TUNE = {
    "RAY_AIR_NEW_OUTPUT": "0",  # else it prints a banner, whatever the verbosity
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the journal is our log
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # ours leaves trials their time to end
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # not every report has to have every key
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",  # nobody reads Tune's pickles
    "TUNE_RESULT_BUFFER_LENGTH": "1",
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "86400",  # we say what is waited for
}


class Sweep:
    """One call of a sweep: refuses what can't work, then runs it."""

    def __init__(
        self, settings: DictConfig, context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.settings, self.context, self.task_function, self.config = settings, context, task_function, config
        if settings.direction not in ("minimize", "maximize"):
            raise HydraException(f"hydra.sweeper.direction={settings.direction}: there are minimize and maximize")
        for name in ("trials", "hours", "trial_hours", "max_concurrent"):
            if settings[name] is not None and settings[name] <= 0:
                raise HydraException(f"hydra.sweeper.{name}={settings[name]}: give more than 0, or null")
        launcher = config.hydra.runtime.choices.get("hydra/launcher", "basic")
        if launcher != "basic":
            raise HydraException(f"hydra/launcher={launcher}: Ray launches the trials of hydra/sweeper=ray_tune")
        self.sign = 1 if settings.direction == "maximize" else -1
        self.metric = settings.metric or "objective"
        self.scheduled = settings.scheduler not in (None, "none")
        self.folder = Path(config.hydra.sweep.dir).absolute()
        self.configs: dict[tuple[str, ...], DictConfig] = {}  # by their overrides

    def run(self, arguments: list[str]) -> list[JobReturn]:
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        self.space = self._space(arguments)
        strategy = self._strategy()
        for point in self.space.probes():
            self._config(self.space.overrides(point))
        self.folder.mkdir(parents=True, exist_ok=True)
        if Journal.read(self.folder).trials and not self.settings.resume:
            raise HydraException(
                f"{self.folder} holds a sweep: go on with hydra.sweeper.resume=true, or give another hydra.sweep.dir"
            )
        self.journal = Journal.open(self.folder)
        try:
            self._head()
            OmegaConf.save(self.config, self.folder / "multirun.yaml")
            search = _search.Search(
                self.journal, strategy, trials=self.settings.trials, space=self.space, suggestion=self._suggestion
            )
            scheduler = _schedule.build(self.settings, self.journal, self.space, self._suggestion, self.metric)
            hours, trial_hours, stop_s = self.settings.hours, self.settings.trial_hours, self.settings.stop_s
            stop = Stop(self.journal, self.folder, hours=hours, trial_hours=trial_hours, stop_s=stop_s)
            with _cluster.connected(), stop.on_signals():
                self._tune(search, scheduler, stop)
            return self._results(stop)
        finally:
            self.journal.close()

    def _space(self, arguments: list[str]) -> Space:
        search_space = OmegaConf.to_container(self.settings.search_space, resolve=True)
        assert isinstance(search_space, dict)
        choices = self.config.hydra.runtime.choices
        return parse(
            arguments,
            {str(key): entry for key, entry in search_space.items()},
            seed=self.settings.seed,
            parser=OverridesParser.create(config_loader=self.context.config_loader),
            present=lambda key: choices[key] if key in choices else OmegaConf.select(self.config, key),
        )

    def _strategy(self) -> _search.Strategy:
        settings, listed = self.settings, all(isinstance(one.domain, Choices) for one in self.space.parameters)
        self.search_name = name = settings.search or ("grid" if listed else "random")
        if name not in ("grid", "random", "optuna"):
            raise HydraException(f"hydra.sweeper.search={name}: there are grid, random and optuna")
        if name != "grid" and all(settings[key] is None for key in ("trials", "hours", "trial_hours")):
            raise HydraException(f"search={name} has no end: give hydra.sweeper.trials or hydra.sweeper.hours")
        if name == "grid":
            return _search.grid(self.space)
        if name == "random":
            return _search.uniform(self.space, settings.seed)
        if settings.scheduler == "pbt":
            raise HydraException("scheduler=pbt changes parameters under way: take search=random or grid")
        return _search.tpe(
            self.space, settings.seed, maximize=self.sign > 0, time_attr=settings.time_attr, metric=self.metric
        )

    def _head(self) -> None:
        """Begins the journal, or sees that it is this sweep's."""
        head = {
            "space": self.space.describe(),
            "metric": self.metric,
            "direction": self.settings.direction,
            "search": self.search_name,
            "seed": self.settings.seed,
        }
        former = self.journal.header
        for key, value in head.items() if self.journal.trials else ():
            if former.get(key) != value:
                raise HydraException(f"{self.folder} holds a sweep with {key} {former.get(key)}, not {value}")
        self.journal.add("sweep", **head)

    def _config(self, overrides: list[str]) -> DictConfig:
        """What these compose to, once for all trials; the number of a trial is for whoever takes it to set."""
        key = tuple(overrides)
        if key not in self.configs:
            config = self.context.config_loader.load_sweep_config(self.config, overrides)
            with open_dict(config):
                config.hydra.sweep.dir = str(self.folder)  # the trial's process may have another working directory
            self.configs[key] = config
        return self.configs[key]

    def _suggestion(self, number: int, point: Point) -> dict[str, Any]:
        return {"number": number, "point": point, "composed": Composed(self._config(self.space.overrides(point)))}

    def _tune(self, search: _search.Search, scheduler: Any, stop: Stop) -> None:
        settings = self.settings
        bundles = [dict(bundle) for bundle in settings.bundles]
        room = _cluster.room(nodes := _cluster.nodes(), bundles)
        if not room:
            asked = " and ".join(map(_cluster.named, bundles))
            has = " and ".join(map(_cluster.named, nodes))
            raise HydraException(f"a trial takes {asked}: it never fits on this cluster, whose nodes have {has}")
        concurrent = min(settings.max_concurrent or room, room)
        log.info(f"{self.search_name} search, {concurrent} trials at a time, in {self.folder}")
        context = self.context
        job = Job(
            context, self.task_function, Singleton.get_state(), os.getcwd(), self.folder, self.metric, settings.stop_s
        )
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # it says how to go on from its pickles
        warnings.filterwarnings("ignore", message="Consider boosting PBT")  # trials here have processes of their own
        with env_override({**TUNE, "TUNE_FORCE_TRIAL_CLEANUP_S": str(math.ceil(settings.stop_s) + 1)}):
            try:
                trainable = tune.with_parameters(HydraTrial, job=job)
            except TypeError as error:
                raise HydraException(f"the task function can't be sent to Ray: {error}") from None
            tune.run(
                trainable,
                name=f"{time.time_ns()}",
                storage_path=str(self.folder / ".tune"),
                search_alg=search,
                scheduler=scheduler,
                num_samples=-1,
                max_concurrent_trials=concurrent,
                resources_per_trial=tune.PlacementGroupFactory(bundles[:1]),
                trial_name_creator=lambda trial: str(trial.config["number"]),
                trial_dirname_creator=lambda trial: str(trial.config["number"]),
                stop=stop,
                callbacks=[Recorder(self, search, stop)],
                raise_on_failed_trial=False,
                verbose=0,
            )

    def _results(self, stop: Stop) -> list[JobReturn]:
        trials, best = sorted(self.journal.trials.values(), key=lambda one: one.number), self.journal.best(self.sign)
        self.journal.add("sweep_end", reason=stop.reason or "all")
        written = {
            "name": "ray_tune",
            "best_evaluated_params": dict(best.point) if best else None,
            "best_evaluated_result": best.value if best else None,
            "best_trial": best.number if best else None,
        }
        OmegaConf.save(OmegaConf.create(written), self.folder / "optimization_results.yaml")
        counts = {state: sum(one.state == state for one in trials) for state in ("done", "stopped", "failed", "lost")}
        log.info(", ".join(f"{count} {state}" for state, count in counts.items() if count) or "no trial ended")
        if best:
            log.info(f"best: {self.metric}={best.value:g}, #{best.number} : {' '.join(best.overrides)}")
        if stop.reason in OUT_OF_TIME or stop.signal:
            log.info(f"go on with: hydra.sweep.dir={self.folder} hydra.sweeper.resume=true")
        elif stop.reason:
            raise HydraException(stop.reason)
        if stop.signal == signal.SIGINT:
            raise KeyboardInterrupt
        if stop.signal:
            sys.exit(128 + stop.signal)
        return [self._return(trial) for trial in trials]

    def _return(self, trial: Trial) -> JobReturn:
        own = self._config(trial.overrides).copy()
        with open_dict(own):
            own.hydra.job.id = own.hydra.job.num = trial.number
            hydra = OmegaConf.create({"hydra": own.pop("hydra")})
        result = JobReturn(
            overrides=trial.overrides,
            cfg=own,
            hydra_cfg=hydra,
            working_dir=trial.working_dir,
            task_name=JobRuntime.instance().get("name"),
        )
        if trial.state in ("done", "stopped"):
            result.status = JobStatus.COMPLETED
            result.return_value = trial.returned if trial.state == "done" else trial.value
        elif trial.state != "unfinished":
            result.status, result.return_value = JobStatus.FAILED, HydraException(f"#{trial.number}: {trial.reason}")
        return result
