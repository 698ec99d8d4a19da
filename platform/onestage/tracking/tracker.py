"""What training asks of a tracker; MLflow is one answer, nothing at all is another."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


def store_uri(config: Mapping[str, Any]) -> str | None:
    """Where a composed config keeps its runs; None for tracking=none, which needs no MLflow."""
    if config["tracking"]["kind"] == "none":
        return None
    from onestage.tracking.client import tracking_uri

    return tracking_uri(config["tracking"]["uri"])


class Tracker(Protocol):
    """Keeps what one training says about itself.

    No method waits for a server, and none raises because one is away or a disk is full: a training goes on without
    its record. Names may hold letters, digits, and ``_ - . / :`` and spaces; other characters become ``_``,
    and metrics of one call that would become the same are kept apart.
    """

    run_id: str

    def log_params(self, params: Mapping[str, object]) -> None:
        """Settings, nested or flat: nested keys are joined by dots. What a run once logged stays as it was."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Numbers at a step; a key's steps must rise, and points at or below its last step are dropped."""

    def log_picture(self, key: str, image: NDArray[np.uint8], step: int) -> None:
        """An image (H, W, 3) RGB, shown along the steps under its key."""

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """A file or folder as it is now, copied under ``folder`` of the run's artifacts."""

    def log_text(self, text: str, file: str) -> None:
        """Text as an artifact, e.g. ``file="notes/split.txt"``."""

    def log_dict(self, values: Mapping[str, object], file: str) -> None:
        """Plain containers as a JSON artifact (which any YAML reader reads too)."""

    def log_table(self, rows: Sequence[Mapping[str, object]], file: str) -> None:
        """Rows of the same columns as a JSON artifact that the dashboard draws as a table; the last of a file stays."""

    def log_dataset(self, root: str, profile: Mapping[str, object], *, name: str, digest: str, context: str) -> None:
        """What was read, as an input of the run: where it lies, what is in it, and for what (``context``)."""

    def log_model(self, folder: Path, metrics: Mapping[str, float], *, step: int, name: str = "model") -> None:
        """A model folder (``model.safetensors`` and ``model.json``), with the metrics that it had at ``step``."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Words about the run that may change later."""

    def close(self, timeout_s: float = 30.0) -> bool:
        """Send what waits, for at most this long. True when everything arrived."""


class NoTracker:
    """``tracking=none``: keeps nothing."""

    run_id = ""

    def log_params(self, params: Mapping[str, object]) -> None: ...

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None: ...

    def log_picture(self, key: str, image: NDArray[np.uint8], step: int) -> None: ...

    def log_artifact(self, path: Path, folder: str = "") -> None: ...

    def log_text(self, text: str, file: str) -> None: ...

    def log_dict(self, values: Mapping[str, object], file: str) -> None: ...

    def log_table(self, rows: Sequence[Mapping[str, object]], file: str) -> None: ...

    def log_dataset(
        self, root: str, profile: Mapping[str, object], *, name: str, digest: str, context: str
    ) -> None: ...

    def log_model(self, folder: Path, metrics: Mapping[str, float], *, step: int, name: str = "model") -> None: ...

    def set_tags(self, tags: Mapping[str, str]) -> None: ...

    def close(self, timeout_s: float = 30.0) -> bool:
        return True
