"""Carries what a spool holds to one MLflow run. Every call may take seconds and may raise: for threads only."""

import hashlib
import json
import logging
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from onestage.tracking.client import client, refused
from onestage.tracking.images import FOLDER, log_picture, picture_name
from onestage.tracking.redaction import redact

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Metric, Run

log = logging.getLogger(__name__)

# mlflow.utils.validation: MAX_METRICS_PER_BATCH, MAX_PARAMS_TAGS_PER_BATCH and MAX_ENTITY_KEY_LENGTH.
POINTS_PER_CALL: Final = 1000
PARAMS_PER_CALL: Final = 100
NAME_LIMIT: Final = 250
DIGEST_LIMIT: Final = 36  # MAX_DATASET_DIGEST_SIZE there
SYSTEM: Final = "system/"
"""How the names of a machine's metrics begin: MLflow shows them in a tab of their own."""
ITEM_TAG: Final = "onestage.item"


class Point(NamedTuple):
    """One number of one metric; ``time_ms`` since the epoch says when it was logged, not when it was sent."""

    key: str
    value: float
    time_ms: int
    step: int


class Refused(Exception):
    """The store will never take this, however often it is sent."""


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if refused(error):
            raise Refused(redact(str(error))) from error
        raise


@lru_cache(maxsize=4096)
def allowed_name(name: str) -> str:
    """The name with what MLflow forbids in metrics, params and tags replaced.

    >>> [allowed_name(name) for name in ("val/ap/traffic light", "val/ap/cat&dog", "/../a//b")]
    ['val/ap/traffic light', 'val/ap/cat_dog', 'a/b']
    """
    return posixpath.normpath(re.sub(r"[^/\w.\- :]", "_", name)[:NAME_LIMIT]).lstrip("/.") or "_"


def allowed_names(names: Iterable[str]) -> dict[str, str]:
    """By name what `allowed_name` makes of it, kept apart where it makes the same of several: by a sum of the name.

    >>> list(allowed_names(["ap/cat dog", "ap/cat&dog", "ap/cat+dog", "ap/cat_dog"]).values())
    ['ap/cat dog', 'ap/cat_dog.3625f9', 'ap/cat_dog.50afd8', 'ap/cat_dog']
    """
    allowed = {name: allowed_name(name) for name in names}
    if len(set(allowed.values())) == len(allowed):
        return allowed
    shared = {name for name, count in Counter(allowed.values()).items() if count > 1}
    return {name: _apart(name) if to in shared and to != name else to for name, to in allowed.items()}


def _apart(name: str) -> str:
    mark = "." + hashlib.sha256(name.encode()).hexdigest()[:6]
    return allowed_name(name)[: NAME_LIMIT - len(mark)] + mark


def last_step(run: "Run") -> int:
    """The last training step of a run's metrics; those of its machines count seconds instead."""
    # Run.data.metrics has the values alone; the message form of the same answer has the steps.
    metrics = run.data.to_proto().metrics
    return max((metric.step for metric in metrics if not metric.key.startswith(SYSTEM)), default=0)


class Delivery(Protocol):
    """Where a spool sends to. Any exception but `Refused` means: not now, try again."""

    def latest_steps(self) -> dict[str, int]:
        """The last step that the store holds of each metric."""

    def points(self, points: Sequence[Point]) -> None:
        """Send at most `POINTS_PER_CALL` points. Sending the same ones again changes nothing."""

    def item(self, kind: str, fields: Mapping[str, Any], payload: Path) -> None:
        """Send one params, tags, artifact, picture or model; ``payload`` is the folder of its files."""


class RunDelivery:
    """Delivery to the MLflow run ``run_id`` of the store at ``uri``. Whatever is sent twice is there once."""

    def __init__(self, *, uri: str, run_id: str) -> None:
        self._uri = uri
        self._run_id = run_id

    @property
    def _client(self) -> "MlflowClient":
        return client(self._uri)

    def latest_steps(self) -> dict[str, int]:
        # Run.data.metrics has the values alone; the message form of the same answer has the steps.
        return {metric.key: metric.step for metric in self._client.get_run(self._run_id).data.to_proto().metrics}

    def points(self, points: Sequence[Point]) -> None:
        with _refusals():
            self._log_batch(metrics=[self._metric(point) for point in points])

    def item(self, kind: str, fields: Mapping[str, Any], payload: Path) -> None:
        senders: dict[str, Callable[..., None]] = {
            "params": self._params,
            "tags": self._tags,
            "artifact": self._artifact,
            "table": self._table,
            "picture": self._picture,
            "model": self._model,
            "dataset": self._dataset,
        }
        with _refusals():
            senders[kind](payload=payload, **fields)

    def _metric(self, point: Point, model_id: str | None = None) -> "Metric":
        from mlflow.entities import Metric

        return Metric(point.key, point.value, point.time_ms, point.step, model_id=model_id)

    def _log_batch(self, **entities: Any) -> None:
        self._client.log_batch(self._run_id, **entities, synchronous=True)

    def _params(self, *, payload: Path, params: dict[str, str]) -> None:
        from mlflow.entities import Param

        held = self._client.get_run(self._run_id).data.params
        if changed := sorted(key for key, value in params.items() if held.get(key, value) != value):
            log.warning("params stay as this run first logged them (MLflow keeps one value): %s", ", ".join(changed))
        new = [Param(key, value) for key, value in params.items() if key not in held]
        for start in range(0, len(new), PARAMS_PER_CALL):
            self._log_batch(params=new[start : start + PARAMS_PER_CALL])

    def _tags(self, *, payload: Path, tags: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        every = [RunTag(key, value) for key, value in tags.items()]
        for start in range(0, len(every), PARAMS_PER_CALL):
            self._log_batch(tags=every[start : start + PARAMS_PER_CALL])

    def _artifact(self, *, payload: Path, folder: str) -> None:
        for path in sorted(payload.iterdir()):
            self._client.log_artifact(self._run_id, str(path), folder or None)

    def _table(self, *, payload: Path, file: str) -> None:
        from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS

        self._artifact(payload=payload, folder=posixpath.dirname(file))
        # The dashboard draws as tables what this tag names.
        held = json.loads(self._client.get_run(self._run_id).data.tags.get(MLFLOW_LOGGED_ARTIFACTS, "[]"))
        if (entry := {"path": file, "type": "table"}) not in held:
            self._client.set_tag(self._run_id, MLFLOW_LOGGED_ARTIFACTS, json.dumps([*held, entry]))

    def _picture(self, *, payload: Path, key: str, step: int, time_ms: int) -> None:
        import PIL.Image

        held = [file.path for file in self._client.list_artifacts(self._run_id, FOLDER)]
        if any(path.startswith(picture_name(key, step)) and path.endswith(".webp") for path in held):
            return  # a picture of this key and step is logged once
        with PIL.Image.open(payload / "picture.png") as image:
            log_picture(self._client, self._run_id, image, key=key, step=step, time_ms=time_ms)

    def _dataset(
        self, *, payload: Path, name: str, digest: str, root: str, profile: dict[str, Any], context: str
    ) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag
        from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

        dataset = Dataset(
            name=name,
            digest=digest[:DIGEST_LIMIT],
            source_type=root.partition("://")[0] if "://" in root else "local",
            source=json.dumps({"uri": root}),
            profile=json.dumps(profile),
        )
        given = DatasetInput(dataset, tags=[InputTag(MLFLOW_DATASET_CONTEXT, context)])
        self._client.log_inputs(self._run_id, datasets=[given])

    def _model(self, *, payload: Path, name: str, metrics: dict[str, float], step: int, time_ms: int) -> None:
        from mlflow.entities import LoggedModelOutput
        from mlflow.models import Model

        model = self._logged_model(name, tag=str(time_ms))
        if str(model.status) == "READY":
            return
        stamped = Model.load(str(payload))
        stamped.artifact_path = model.artifact_location
        stamped.model_uuid = stamped.model_id = model.model_id
        stamped.run_id = self._run_id
        stamped.save(str(payload / "MLmodel"))
        self._client.log_model_artifacts(model.model_id, str(payload))
        self._client.log_outputs(self._run_id, [LoggedModelOutput(model.model_id, step)])
        points = [self._logged_point(Point(key, value, time_ms, step)) for key, value in metrics.items()]
        self._log_batch(metrics=[self._metric(point, model.model_id) for point in points])
        self._client.finalize_logged_model(model.model_id, "READY")

    def _logged_model(self, name: str, *, tag: str) -> "LoggedModel":
        """The run's model of that name and tag: one whose upload was cut is taken up again."""
        experiment = self._client.get_run(self._run_id).info.experiment_id
        mine = f"source_run_id = '{self._run_id}' AND name = '{name}' AND tags.`{ITEM_TAG}` = '{tag}'"
        if found := self._client.search_logged_models([experiment], filter_string=mine, max_results=1):
            return found[0]
        return self._client.create_logged_model(
            experiment, name=name, source_run_id=self._run_id, tags={ITEM_TAG: tag}, model_type="object-detector"
        )

    def _logged_point(self, point: Point) -> Point:
        """The run's own point of that key and step, if it has one: linking a model must not add a second."""
        for held in self._client.get_metric_history(self._run_id, point.key):
            if held.step == point.step:
                return point._replace(value=held.value, time_ms=held.timestamp)
        return point
