"""A trial, in the process that Ray starts for it: Hydra's state as the driver had it, and the app's own function."""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Number
from pathlib import Path
from threading import Event
from typing import Any, Final

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict
from ray import tune
from ray.train._internal.session import get_session, shutdown_session
from ray.tune.trainable.function_trainable import FunctionTrainable

log = logging.getLogger(__name__)

RETURNED: Final = "hydra/returned"  # in a trial's last report
WORKING_DIR: Final = "hydra/working_dir"
FAILED: Final = "hydra/failed"
LOST: Final = "hydra/lost"
CUT: Final = "hydra/cut"
LAST: Final = (RETURNED, FAILED, LOST, CUT)


STOPPING: Final = "stopping"  # a file in the sweep's folder: all trials are to end

_ending = Event()
_folder: Path | None = None


class Lost(Exception):
    """For an app to raise: its trial failed by no fault of its point, and is worth running again."""


def asked_to_end() -> bool:
    """In a trial: whether it is to end now, as its next ``ray.tune.report`` would say by SystemExit.

    For those to ask who report seldom: Tune's own word reaches a trial only when it reports. The answer to it is to
    save, and to raise SystemExit.
    """
    return _ending.is_set() or (_folder is not None and (_folder / STOPPING).exists())


@dataclass(frozen=True)
class Job:
    """What all trials of a sweep share."""

    context: HydraContext
    task_function: TaskFunction
    singletons: Any
    cwd: str
    folder: Path
    metric: str
    stop_s: float


class Composed:
    """A trial's composed config on its way through Tune, which would take a mapping apart."""

    def __init__(self, config: DictConfig) -> None:
        self.config = config

    def __repr__(self) -> str:
        return "config"


class HydraTrial(FunctionTrainable):
    """Tune's function trainable around Hydra's ``run_job``; the app calls ``ray.tune.report`` as anyone would."""

    _name = "trial"
    _reported: Mapping[str, Any] = {}

    def setup(self, config: dict[str, Any], job: Job) -> None:  # type: ignore[override]  # see tune.with_parameters
        self._job = job
        global _folder
        _folder = job.folder
        _ending.clear()  # one process may have several trials, one after another
        super().setup(config)

    def _trainable_func(self, config: dict[str, Any]) -> None:
        ended: dict[str, Any]
        try:
            returned = self._run(config["composed"].config, int(self.trial_name))
            ended = _report_of(returned.return_value, self._job.metric) | {WORKING_DIR: returned.working_dir}
        except SystemExit as exit:
            if _ending.is_set():
                raise
            ended = {RETURNED: None} if not exit.code else {FAILED: f"the app ended itself: SystemExit: {exit.code}"}
            if asked_to_end():
                ended = {CUT: True}
        except Lost as error:
            ended = {LOST: str(error)}
        except Exception as error:  # also what composing or a callback of Hydra's raises
            log.exception("trial %s failed", self.trial_name)
            plain = type(error) in (Exception, RuntimeError) and str(error)  # their type says nothing
            ended = {FAILED: plain or f"{type(error).__name__}: {error}"}
        if not _ending.is_set():  # else nobody listens any more
            tune.report({**ended, "done": True})

    def _run(self, config: DictConfig, number: int) -> JobReturn:
        job = self._job
        Singleton.set_state(job.singletons)
        setup_globals()
        if Path(job.cwd).is_dir():
            os.chdir(job.cwd)  # where the app was called: its relative paths mean the same here
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
        returned = run_job(
            hydra_context=job.context,
            task_function=job.task_function,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
        if returned.status is JobStatus.FAILED:
            raise returned._return_value
        return returned

    def step(self) -> dict[str, Any]:
        metrics: dict[str, Any] = super().step()
        if any(key in metrics for key in LAST):  # the end is no step of its own
            if self._reported:
                metrics = {**self._reported, **metrics, "training_iteration": self._iteration}
        else:
            self._reported = metrics
        return metrics

    def cleanup(self) -> None:
        """The function's next report raises SystemExit in it; what it then does has ``stop_s`` to end."""
        _ending.set()
        session = get_session()
        assert session
        try:
            session.finish(timeout=self._job.stop_s)
        finally:
            shutdown_session()


def _report_of(value: Any, metric: str) -> dict[str, Any]:
    """What a function's return value says as a last report: a number is the metric, a mapping holds several."""
    if hasattr(value, "item") and not isinstance(value, Mapping):
        value = value.item()  # a tensor or an array of one number
    report: dict[str, Any] = {}
    if isinstance(value, Mapping):
        report = {str(name): number for name, number in value.items() if isinstance(number, Number)}
    elif isinstance(value, Number) and not isinstance(value, bool):
        report = {metric: float(value)}  # type: ignore[arg-type]
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        value = repr(value)  # only plain data goes to the driver and into the journal
    return {**report, RETURNED: value}
