"""Runs in MLflow as the driver handles them: opened, found again, ended, and declared dead when their process is."""

import json
import os
import posixpath
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Final

from onestage.errors import InputError
from onestage.tracking.client import SQLITE, check, client, missing, refused, tracking_uri
from onestage.tracking.dashboard import VIEW_TAG, view_tags
from onestage.tracking.delivery import allowed_names, last_step
from onestage.tracking.endings import Ending, bury, end_if_running, end_run
from onestage.tracking.heartbeat import REASON_TAG, dead_because, last_beat, life_tags, store_time, where
from onestage.tracking.origin import PID_TAG, is_alive, is_here, origin_tags
from onestage.tracking.redaction import redact, redact_settings

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel, Run

__all__ = [
    "REASON_TAG",
    "Ending",
    "FoundRun",
    "bury",
    "check",
    "download",
    "download_model",
    "end_if_running",
    "end_run",
    "find_run",
    "is_busy",
    "last_unfinished",
    "log_summary",
    "logged_model",
    "mark_dead",
    "open_run",
    "reopen_run",
    "tell",
    "tracking_uri",
    "where",
]

SWEEP_TAG: Final = "onestage.sweep"
TRIAL_TAG: Final = "onestage.trial"
POINT_TAG: Final = "onestage.point"
STATE_TAG: Final = "onestage.state"
SCORE_TAG: Final = "onestage.score"
GPU_HOURS_TAG: Final = "onestage.gpu_hours"  # of a trial, without the time in which its sweep was cut
EPOCHS_TAG: Final = "onestage.epochs"  # of a trial, validated
METRIC_TAG: Final = "onestage.metric"  # which validation number the score is
JOB_TAG: Final = "onestage.job"

_REGISTERED: Final = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[\w\-]+)|/(?P<version>\d+))")
_LOGGED: Final = re.compile(r"models:/(?P<model_id>m-[\w\-]+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundRun:
    """What a store knows of a run; ``metrics`` are the latest values."""

    run_id: str
    name: str
    experiment: str
    status: str
    artifact_uri: str
    params: Mapping[str, str]
    tags: Mapping[str, str]
    metrics: Mapping[str, float]


def open_run(uri: str, experiment: str, *, name: str | None = None, tags: Mapping[str, str]) -> str:
    """Start a run, and the experiment where it's new; its id. It carries this process, for `mark_dead`."""
    shown = {key: str(value) for key, value in redact_settings(tags).items()}
    tags = {**origin_tags(), **life_tags(uri), **shown}
    run = client(uri).create_run(_experiment_id(uri, experiment), run_name=name, tags=tags)
    return str(run.info.run_id)


def reopen_run(uri: str, run_id: str) -> None:
    """Set a run to RUNNING again, under this process, and mark the dead beside it. Its end time can't be cleared.

    Raises InputError, with the nearest ids, when there is no such run.
    """
    run = _get(uri, run_id)
    if REASON_TAG in run.data.tags:
        client(uri).delete_tag(run_id, REASON_TAG)  # of an end that is none any more
    for key, value in life_tags(uri).items():
        client(uri).set_tag(run_id, key, value)
    client(uri).update_run(run_id, status="RUNNING")
    mark_dead(uri, client(uri).get_experiment(run.info.experiment_id).name)


def tell(uri: str, run_id: str, tags: Mapping[str, str], *, params: Mapping[str, str] = {}) -> bool:
    """Tags and params on a run of whatever process. False when the store could not be told; never raises."""
    from mlflow.entities import Param, RunTag

    try:
        client(uri).log_batch(
            run_id,
            tags=[RunTag(key, redact(value)) for key, value in tags.items()],
            params=[Param(key, redact(value)) for key, value in params.items()],
        )
    except Exception:
        return False
    return True


def point_tags(point: Mapping[str, str | float]) -> dict[str, str]:
    """What a trial has of what its sweep varies; under PBT it changes."""
    return {POINT_TAG: json.dumps(point), **{f"point.{key}": str(value) for key, value in point.items()}}


def last_unfinished(uri: str, experiment: str) -> str | None:
    """The newest run of the experiment that is RUNNING, FAILED or KILLED; None without one.

    A run that another process is busy with, here or by its signs of life elsewhere, is passed over: two trainings
    must not share one. So are sweeps and their trials, which are gone on with as a whole.
    """
    for run in _runs(uri, experiment, "attributes.status != 'FINISHED'"):
        if SWEEP_TAG not in run.data.tags and (run.info.status != "RUNNING" or not is_busy(uri, run.data.tags)):
            return str(run.info.run_id)
    return None


def is_busy(uri: str, tags: Mapping[str, str]) -> bool:
    """Whether a RUNNING run's driver is another process than this, and alive as far as is known."""
    if is_here(tags):
        return is_alive(tags) and tags.get(PID_TAG) != str(os.getpid())
    return last_beat(tags) is not None and dead_because(tags, lambda: store_time(uri)) is None


def mark_dead(uri: str, experiment: str) -> list[str]:
    """Set to KILLED the RUNNING runs of an experiment whose driver is dead; their ids. Never raises."""
    try:
        return bury(uri, _runs(uri, experiment, "attributes.status = 'RUNNING'"))
    except Exception:
        return []


def find_run(uri: str, run_id: str) -> FoundRun:
    """A run by its id; one without a living driver is KILLED now. Raises InputError, with the nearest ids, for none."""
    run = _get(uri, run_id)
    if bury(uri, [run]):
        run = _get(uri, run_id)
    return FoundRun(
        run_id=run_id,
        name=run.info.run_name or "",
        experiment=client(uri).get_experiment(run.info.experiment_id).name,
        status=run.info.status,
        artifact_uri=run.info.artifact_uri,
        params=run.data.params,
        tags=run.data.tags,
        metrics=run.data.metrics,
    )


def log_summary(uri: str, run: str, metrics: Mapping[str, float]) -> bool:
    """Add numbers to a run at its last step. False when ``run`` is no run's id, say a checkpoint's path."""
    from mlflow.entities import Metric

    try:
        found = client(uri).get_run(run)
    except Exception as error:
        if missing(error) or refused(error):
            return False
        raise
    step, names, now_ms = last_step(found), allowed_names(metrics), int(time.time() * 1000)
    client(uri).log_batch(run, [Metric(names[key], value, now_ms, step) for key, value in metrics.items()])
    return True


def download(uri: str, run_id: str, artifact_path: str, to: Path) -> Path:
    """Copy a run's artifact, file or folder, into ``to``; where it lies now. Raises InputError when there is none."""
    _get(uri, run_id)
    to.mkdir(parents=True, exist_ok=True)
    try:
        return Path(client(uri).download_artifacts(run_id, artifact_path, str(to)))
    except Exception as error:
        held = [file.path for file in client(uri).list_artifacts(run_id, posixpath.dirname(artifact_path) or None)]
        if artifact_path in held:
            raise
        raise InputError(f"run {run_id} has no artifact {artifact_path!r}: it has {held or 'none'}") from error


def download_model(uri: str, run: str, to: Path) -> Path:
    """Copy a model into ``to``; the folder in it that holds ``model.safetensors`` and ``model.json``.

    ``run`` is a run id (its newest model named "model"), ``models:/name@alias``, ``models:/name/3`` or the
    ``models:/m-…`` of one logged model. Raises InputError when there is none, or it's no model of ours.
    """
    import mlflow
    import mlflow.artifacts

    location = _registered(uri, run) if run.startswith("models:") else logged_model(uri, run).artifact_location
    to.mkdir(parents=True, exist_ok=True)
    try:
        fetched = mlflow.artifacts.download_artifacts(artifact_uri=location, dst_path=str(to), tracking_uri=uri)
    except mlflow.MlflowException as error:
        reason = redact(" ".join(str(error).split()))
        raise InputError(f"the files of {run} can't be fetched from {redact(location)}: {reason}") from error
    for weights in Path(fetched).rglob("model.safetensors"):
        return weights.parent
    raise InputError(f"{run} holds no model.safetensors: it was not logged by onestage, choose another")


def logged_model(uri: str, run_id: str) -> "LoggedModel":
    """The newest finished model named "model" of a run. Raises InputError when there is none."""
    experiment = _get(uri, run_id).info.experiment_id
    mine = f"source_run_id = '{run_id}' AND name = 'model'"
    newest_first = [{"field_name": "creation_timestamp", "ascending": False}]
    for model in client(uri).search_logged_models([experiment], mine, order_by=newest_first):
        if str(model.status) == "READY":
            return model
    raise InputError(f"run {run_id} has logged no model: train it to its end, or name one of its checkpoints")


def _registered(uri: str, model: str) -> str:
    """Where the files of a ``models:/`` URI lie."""
    try:
        if logged := _LOGGED.fullmatch(model):
            return str(client(uri).get_logged_model(logged["model_id"]).artifact_location)
        if not (named := _REGISTERED.fullmatch(model)):
            raise InputError(f"{model!r} names no model: write models:/NAME@ALIAS or models:/NAME/VERSION")
        name, version = named["name"], named["version"]
        if version is None:
            version = client(uri).get_model_version_by_alias(name, named["alias"]).version
        source = str(client(uri).get_model_version_download_uri(name, version))
    except InputError:
        raise
    except Exception as error:
        if not (missing(error) or refused(error)):
            raise
        raise InputError(f"no model {model!r} in {redact(uri)}: see `onestage models list`") from error
    return _registered(uri, source) if _LOGGED.fullmatch(source) else source


def _get(uri: str, run_id: str) -> "Run":
    try:
        run = client(uri).get_run(run_id)
    except Exception as error:
        if not missing(error):
            raise
        every = [experiment.experiment_id for experiment in client(uri).search_experiments()]
        known = [run.info.run_id for run in client(uri).search_runs(every, max_results=200)]
        near = [other for other in known if other.startswith(run_id)] or get_close_matches(run_id, known, cutoff=0.4)
        hint = f"did you mean {' or '.join(near[:3])}?" if near else "`onestage dashboard` lists them"
        raise InputError(f"no run {run_id!r} in {redact(uri)}: {hint}") from None
    if run.info.lifecycle_stage == "deleted":
        raise InputError(f"run {run_id} is deleted: bring it back with `mlflow runs restore --run-id {run_id}`")
    return run


def _runs(uri: str, experiment: str, filter_string: str) -> "list[Run]":
    """The newest 1,000 runs of the experiment that match, newest first."""
    known = client(uri).get_experiment_by_name(experiment)
    if known is None:
        return []
    newest_first = ["attributes.start_time DESC"]
    return list(client(uri).search_runs([known.experiment_id], filter_string, order_by=newest_first, max_results=1000))


def _experiment_id(uri: str, name: str) -> str:
    known = client(uri).get_experiment_by_name(name)
    if known is None:
        try:
            return client(uri).create_experiment(name, _artifact_location(uri, name), tags=view_tags())
        except Exception:  # Another driver may have made it meanwhile.
            known = client(uri).get_experiment_by_name(name)
            if known is None:
                raise
    if known.lifecycle_stage == "deleted":
        restore = f"mlflow experiments restore --experiment-id {known.experiment_id}"
        raise InputError(f"experiment {name!r} is deleted in {redact(uri)}: choose another name, or `{restore}`")
    if VIEW_TAG not in known.tags:
        with suppress(Exception):  # who may log into an experiment may not always change it
            for key, value in view_tags().items():
                client(uri).set_experiment_tag(known.experiment_id, key, value)
    return str(known.experiment_id)


def _artifact_location(uri: str, experiment: str) -> str | None:
    """Beside a SQLite file; MLflow's own default hangs on the current directory. Other stores know best (None)."""
    if not uri.startswith(SQLITE):
        return None
    folder = Path(uri.removeprefix(SQLITE)).parent / "mlruns" / re.sub(r"[^\w.\-]", "-", experiment)
    return folder.as_uri()
