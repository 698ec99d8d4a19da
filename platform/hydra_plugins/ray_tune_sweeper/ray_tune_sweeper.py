"""The plugin as Hydra finds it: its settings, and the sweeper that Hydra calls."""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import MISSING, DictConfig, OmegaConf


@dataclass
class AshaConf:
    """Of each rung, at grace_period × reduction_factor^k up to max_t, the best 1 / reduction_factor go on."""

    grace_period: int = 1
    reduction_factor: float = 3
    max_t: int = 100


@dataclass
class MedianConf:
    """A trial ends whose best is worse than the median of the others' running means, from grace_period on."""

    grace_period: float = 1
    min_samples_required: int = 3


@dataclass
class PbtConf:
    """Every perturbation_interval the worst quantile_fraction go on from a checkpoint that one of the best reported."""

    perturbation_interval: float = 4
    burn_in_period: float = 0
    quantile_fraction: float = 0.25
    resample_probability: float = 0.25


@dataclass
class RayTuneSweeperConf:
    """The settings, under ``hydra.sweeper``. The sweep's folder is ``hydra.sweep.dir``, which all nodes must see."""

    _target_: str = "hydra_plugins.ray_tune_sweeper.ray_tune_sweeper.RayTuneSweeper"
    search: str | None = None  # grid, random or optuna; null: grid, or random where the space has an interval
    scheduler: str | None = None  # asha, median or pbt; null or none: every trial runs to its end
    asha: AshaConf = field(default_factory=AshaConf)
    median: MedianConf = field(default_factory=MedianConf)
    pbt: PbtConf = field(default_factory=PbtConf)
    metric: str | None = None  # a key that the app reports; a number that its function returns counts as it
    direction: str = "minimize"  # or maximize
    time_attr: str = "training_iteration"  # what schedulers count; a key of the app's own, where it may be resumed
    search_space: dict[str, Any] = field(default_factory=dict)  # KEY: values, or KEY: {values: …, when: {KEY: values}}
    trials: int | None = None  # null: the whole grid
    hours: float | None = None  # of this call: then the sweep ends, with the best so far
    trial_hours: float | None = None  # the same, of all trials together, in all calls
    max_concurrent: int | None = None  # null: as many trials as the cluster has room for
    seed: int = 0
    # What a trial takes: its own process, which Ray reserves, then each worker that it starts by itself.
    bundles: list[dict[str, Any]] = field(default_factory=lambda: [{"CPU": 1.0}])
    stop_s: float = 30.0  # for a stopped trial to reach its next report and to end
    wait_s: float = 600.0  # for room on the cluster while no trial runs
    retries: int = 1  # of a trial whose process was lost; one that fails is not tried again
    resume: bool = False  # go on with the sweep in hydra.sweep.dir


ConfigStore.instance().store(group="hydra/sweeper", name="ray_tune", node=RayTuneSweeperConf, provider="ray_tune")


class RayTuneSweeper(Sweeper):
    """Runs a multirun's jobs as trials of Ray Tune."""

    def __init__(self, **settings: Any) -> None:
        self.settings = OmegaConf.create(settings)
        self.task_function: TaskFunction = MISSING

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def sweep(self, arguments: list[str]) -> list[list[JobReturn]]:
        """Runs the trials; one batch of all their returns, in the order of their numbers. Raises HydraException."""
        from hydra_plugins.ray_tune_sweeper._sweep import Sweep  # Ray takes seconds to import, and every app scans us

        assert self.hydra_context is not None and self.config is not None
        return [Sweep(self.settings, self.hydra_context, self.task_function, self.config).run(arguments)]
