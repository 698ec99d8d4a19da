"""A training's tracker over MLflow: everything is queued on disk and sent by a thread."""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Final

import numpy as np
from numpy.typing import NDArray

from onestage.tracking import pyfunc
from onestage.tracking.averaging import FullRate
from onestage.tracking.delivery import allowed_name, allowed_names
from onestage.tracking.redaction import redact, redact_settings
from onestage.tracking.spool import open_spool

# mlflow.utils.validation: MAX_PARAM_VAL_LENGTH and MAX_TAG_VAL_LENGTH.
PARAM_LIMIT: Final = 6000
TAG_LIMIT: Final = 8000


class MlflowTracker:
    """Logs to the run ``run_id`` of the store at ``uri``, by way of ``folder`` on a local disk.

    ``folder`` belongs to this run alone, and a resume on the same host uses it again. ``resume_from_step`` is the step
    of the checkpoint that the training goes on from (None: it starts): steps between it and the last one logged are
    trained twice but logged once, as they were first. Steps within ``every_s`` seconds are sent as their average
    (`onestage.tracking.averaging`); 0 sends each, and tells ``say`` in one line what that costs.
    """

    def __init__(
        self,
        *,
        uri: str,
        run_id: str,
        folder: Path,
        resume_from_step: int | None = None,
        every_s: float = 0.0,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.run_id = run_id
        resumed = resume_from_step is not None
        self._spool = open_spool(uri=uri, run_id=run_id, folder=folder, resumed=resumed, every_s=every_s)
        self._full_rate = FullRate(say) if say is not None and every_s <= 0 else None

    def log_params(self, params: Mapping[str, object]) -> None:
        flat = {allowed_name(key): text[:PARAM_LIMIT] for key, text in _flatten(redact_settings(params))}
        self._spool.put("params", {"params": flat})

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        began = time.perf_counter()
        self._spool.append(metrics, step)
        if self._full_rate is not None:
            self._full_rate.add(metrics, time.perf_counter() - began)

    def log_picture(self, key: str, image: NDArray[np.uint8], step: int) -> None:
        fields = {"key": allowed_name(key).replace(":", "_"), "step": int(step), "time_ms": _now_ms()}
        self._spool.put("picture", fields, lambda payload: _write_picture(image, payload / "picture.png"))

    def log_artifact(self, path: Path, folder: str = "") -> None:
        def copy(payload: Path) -> None:
            if path.is_dir():
                shutil.copytree(path, payload / path.name)
            else:
                shutil.copy2(path, payload / path.name)

        self._spool.put("artifact", {"folder": folder}, copy)

    def log_text(self, text: str, file: str) -> None:
        place = PurePosixPath(file)
        folder = "" if place.parent == PurePosixPath(".") else str(place.parent)
        self._spool.put("artifact", {"folder": folder}, lambda payload: (payload / place.name).write_text(redact(text)))

    def log_dict(self, values: Mapping[str, object], file: str) -> None:
        self.log_text(json.dumps(redact_settings(values), indent=2, default=str), file)

    def log_table(self, rows: Sequence[Mapping[str, object]], file: str) -> None:
        columns = list(rows[0]) if rows else []
        # As pandas writes "split", which is how MLflow keeps its tables.
        table = json.dumps({"columns": columns, "data": [[row[column] for column in columns] for row in rows]})
        name = PurePosixPath(file).name
        self._spool.put("table", {"file": file}, lambda payload: (payload / name).write_text(table))

    def log_dataset(self, root: str, profile: Mapping[str, object], *, name: str, digest: str, context: str) -> None:
        fields = {"name": name, "digest": digest, "root": redact(root), "profile": dict(profile), "context": context}
        self._spool.put("dataset", fields)

    def log_model(self, folder: Path, metrics: Mapping[str, float], *, step: int, name: str = "model") -> None:
        names = allowed_names(metrics)
        numbers = {names[key]: float(value) for key, value in metrics.items()}
        fields = {"name": name, "metrics": numbers, "step": int(step), "time_ms": _now_ms()}
        self._spool.put("model", fields, lambda payload: pyfunc.save(folder, payload))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        shown = {allowed_name(key): str(value)[:TAG_LIMIT] for key, value in redact_settings(tags).items()}
        self._spool.put("tags", {"tags": shown})

    def flush(self, timeout_s: float) -> bool:
        """Wait until all that was logged has arrived, at most so long; True when it has."""
        return self._spool.flush(timeout_s)

    def close(self, timeout_s: float = 30.0) -> bool:
        if self._full_rate is not None:
            self._full_rate.tell()
        return self._spool.close(timeout_s)


def _now_ms() -> int:
    return int(time.time() * 1000)


def _write_picture(image: NDArray[np.uint8], path: Path) -> None:
    import PIL.Image

    PIL.Image.fromarray(np.ascontiguousarray(image)).save(path, compress_level=1)


def _flatten(settings: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Leaves as (dotted key, text); a list of dicts gives its places, ``augment.0.probability``."""
    for key, value in settings.items():
        if isinstance(value, list) and any(isinstance(part, Mapping) for part in value):
            value = {str(place): part for place, part in enumerate(value)}
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)
