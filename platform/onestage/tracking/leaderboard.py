"""Trainings beside each other, the best first: what an experiment or a sweep has come to."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Final

from onestage.errors import InputError
from onestage.tracking.client import check, client
from onestage.tracking.redaction import redact
from onestage.tracking.runs import (
    EPOCHS_TAG,
    GPU_HOURS_TAG,
    METRIC_TAG,
    POINT_TAG,
    REASON_TAG,
    SCORE_TAG,
    STATE_TAG,
    SWEEP_TAG,
    TRIAL_TAG,
    mark_dead,
)

if TYPE_CHECKING:
    from mlflow.entities import Run

PAGE: Final = 1000
MAP: Final = "val/map"
LOSS: Final = "val/loss"  # the one score that is better the smaller it is


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One training as MLflow knows it; None for what it has not logged (yet).

    ``score`` is ``val/map``, or among the trials of one sweep that sweep's metric, at its best epoch; ``low`` and
    ``high`` bound the 95 % confidence interval of a ``val/map``. ``point`` has what the sweep varied, by override key.
    """

    run_id: str
    name: str
    status: str  # MLflow's: RUNNING, FINISHED, FAILED, KILLED
    detector: str
    dataset_hash: str | None
    score: float | None
    low: float | None = None
    high: float | None = None
    epochs: int | None = None
    gpu_hours: float | None = None  # a worker without a GPU counts as one
    latency_ms: float | None = None  # of one image, forward and detections, where it was trained
    started: float | None = None  # seconds since 1970
    ended: float | None = None
    trial: int | None = None  # its number in the sweep
    state: str | None = None  # the sweep's word on it: done, stopped, failed, lost, cut, running
    reason: str | None = None
    metric: str = MAP  # what the score is
    point: Mapping[str, str | float] = field(default_factory=dict)


def ranked(found: Iterable[Entry], sign: int) -> list[Entry]:
    """The best score first, of equal ones the earlier trial, those without one last; ``sign`` is -1 for a loss."""
    return sorted(found, key=lambda one: (one.score is None, -sign * (one.score or 0.0), one.trial or 0, one.name))


def best_of(found: Sequence[Entry]) -> Entry | None:
    """Of a sweep's trials, the best first: one trained to its end, or else one that was stopped or cut before."""
    scored = [one for one in found if one.score is not None]
    ended = [one for one in scored if one.state == "done"]
    return next(iter([*ended, *(one for one in scored if one.state not in ("failed", "lost"))]), None)


def in_short(point: Mapping[str, str | float]) -> str:
    """What a sweep varied, for one line.

    >>> in_short({"detector": "ssd300", "optimizer.lr": 0.00012345})
    'detector=ssd300 lr=0.000123'
    """
    return " ".join(
        f"{key.rpartition('.')[2]}={f'{value:.3g}' if isinstance(value, float) else value}"
        for key, value in point.items()
    )


def entries(uri: str, experiment: str, *, sweep: str | None = None) -> list[Entry]:
    """The trainings of an experiment, or of one of its sweeps, the best score first, those without one last.

    Raises InputError, with the nearest name, where there is no such experiment or sweep.
    """
    check(uri)
    known = client(uri).get_experiment_by_name(experiment)
    if known is None or known.lifecycle_stage == "deleted":
        names = [one.name for one in client(uri).search_experiments()]
        raise InputError(f"no experiment {experiment!r} in {redact(uri)}{_nearest(experiment, names)}")
    mark_dead(uri, experiment)
    runs = _all_runs(uri, known.experiment_id)
    trainings = [run for run in runs if TRIAL_TAG in run.data.tags or SWEEP_TAG not in run.data.tags]
    if sweep is not None:
        sweeps = sorted({run.data.tags[SWEEP_TAG] for run in runs if SWEEP_TAG in run.data.tags})
        if sweep not in sweeps:
            raise InputError(f"no sweep {sweep!r} in experiment {experiment!r}{_nearest(sweep, sweeps)}")
        trainings = [run for run in trainings if run.data.tags.get(SWEEP_TAG) == sweep]
    metric = next((run.data.tags[METRIC_TAG] for run in trainings if METRIC_TAG in run.data.tags), MAP)
    metric = metric if sweep is not None else MAP  # the one that all trainings have
    found = [_entry(run, metric) for run in trainings]
    sign = -1 if metric == LOSS else 1
    return ranked(found, sign)


def _nearest(name: str, names: list[str]) -> str:
    near = get_close_matches(name, names, n=1, cutoff=0.4)
    if near:
        return f": did you mean {near[0]!r}?"
    return f": there are {', '.join(names[:8])}" if names else ": it holds none"


def _all_runs(uri: str, experiment_id: str) -> "list[Run]":
    found: list[Run] = []
    token: str | None = None
    while True:
        page = client(uri).search_runs([experiment_id], max_results=PAGE, page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def _entry(run: "Run", metric: str) -> Entry:
    tags, params, metrics = run.data.tags, run.data.params, run.data.metrics
    score, low, high = (metrics.get(f"best/{name}") for name in ("map", "map_low", "map_high"))
    if metric != MAP:
        score, low, high = float(tags[SCORE_TAG]) if SCORE_TAG in tags else None, None, None
    started, ended = (None if at is None else at / 1000 for at in (run.info.start_time, run.info.end_time))
    workers = _number(params.get("cluster.num_workers")) or 1
    gpus = max(_number(params.get("cluster.gpus_per_worker")) or 0, 1)
    hours = (ended - started) / 3600 * workers * gpus if started and ended else None
    epoch = metrics.get("epoch")
    point: dict[str, Any] = json.loads(tags.get(POINT_TAG, "{}"))
    return Entry(
        run_id=run.info.run_id,
        name=run.info.run_name or "",
        status=run.info.status,
        # The choice of the command line, where the point has it, is nearer to people than the class.
        detector=str(point.get("detector") or params.get("detector._target_", "").rpartition(".")[2] or "?"),
        dataset_hash=tags.get("dataset.hash"),
        score=score,
        low=low,
        high=high,
        epochs=int(tags[EPOCHS_TAG]) if EPOCHS_TAG in tags else None if epoch is None else int(epoch) + 1,
        gpu_hours=_number(tags.get(GPU_HOURS_TAG)) or hours,
        latency_ms=metrics.get("perf/latency_ms"),
        started=started,
        ended=ended,
        trial=int(tags[TRIAL_TAG]) if TRIAL_TAG in tags else None,
        state=tags.get(STATE_TAG),
        reason=tags.get(REASON_TAG),
        metric=metric,
        point=point,
    )


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None
