"""What a sweep leaves on disk, in STORAGE/sweeps/NAME: how it was called, and of each trial how it stands.

Beside that lies the sweeper's own journal, `trials.jsonl`.
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from onestage.cluster.resources import counted_gpus
from onestage.cluster.storage import write_json
from onestage.data.store import is_address
from onestage.errors import InputError
from onestage.tracking.client import with_user
from onestage.tracking.redaction import without_user

if TYPE_CHECKING:
    from hydra_plugins.ray_tune_sweeper._journal import Journal

SETUP: Final = "sweep.json"
STATE: Final = "state.json"
ROOT: Final = "sweeps"
WAITING: Final = "waiting"  # what a trial is doing, before what it waits for


def folder_of(storage: str, name: str) -> Path:
    """Where sweep ``name`` has its folder: beside the runs, or here where those are at an address."""
    return (Path(ROOT) if is_address(storage) else Path(storage) / ROOT) / name


def name_of(settings: Mapping[str, Any]) -> str:
    """The name of a new sweep: its config's own, or the time."""
    return settings["name"] or f"{datetime.now():%m%d-%H%M%S}"


def kept(overrides: Sequence[str]) -> list[str]:
    """The overrides as they may lie on disk. The password of a tracking address goes into the environment instead.

    There this process and its trials find it.
    """
    shown = [without_user(one) for one in overrides]
    for override, without in zip(overrides, shown, strict=True):
        key, _, uri = override.partition("=")
        if key == "tracking.uri" and override != without:
            os.environ["MLFLOW_TRACKING_URI"] = uri.strip("'\"")
    return shown


def journal_of(folder: Path) -> "Journal":
    """The sweeper's journal, as it is now. Raises InputError where a line of it is damaged."""
    from hydra_plugins.ray_tune_sweeper._journal import Damaged, Journal

    try:
        return Journal.read(folder)
    except Damaged as error:
        raise InputError(str(error)) from error


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A sweep as it was started; plain data, for its trials and for whoever goes on with it.

    The password of ``tracking_uri`` is not kept: it comes from MLFLOW_TRACKING_URI.
    ``cluster`` is the config's, with each worker's share worked out; ``parent`` the sweep's own run in MLflow.
    """

    name: str
    overrides: list[str]
    metric: str
    maximize: bool
    cluster: dict[str, Any]
    tracking_uri: str | None
    parent: str | None
    started: float = field(default_factory=time.time)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        uri = self.tracking_uri and without_user(self.tracking_uri)
        write_json(folder / SETUP, asdict(self) | {"tracking_uri": uri})

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Raises InputError where there is no sweep."""
        file = folder / SETUP
        if not file.is_file():
            others = sorted(path.parent.name for path in folder.parent.glob(f"*/{SETUP}"))
            there = f"there are {', '.join(others)}" if others else "there is none"
            raise InputError(f"no sweep {folder.name!r} in {folder.parent}: {there}; storage=… names another place")
        known = json.loads(file.read_text())
        return cls(**known | {"tracking_uri": known["tracking_uri"] and with_user(known["tracking_uri"])})

    @property
    def sign(self) -> int:
        """What makes a better score the larger one."""
        return 1 if self.maximize else -1

    @property
    def gpus_of_trial(self) -> float:
        """What an hour of a trial costs in GPU-hours."""
        return counted_gpus(self.cluster)


@dataclass(kw_only=True)
class State:
    """How a trial stands, as its own process last said; None for what is not known yet."""

    run_id: str | None = None
    doing: str = "starting"
    epoch: int = 0  # validated
    reported: int = 0  # that the search has heard of
    num_epochs: int | None = None
    step: int = 0
    num_steps: int | None = None
    loss: float | None = None
    score: float | None = None  # the best so far
    metrics: dict[str, float] = field(default_factory=dict)  # where the score was best
    outcome: dict[str, float] = field(default_factory=dict)  # of a training that ended

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / STATE, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """As it was when nothing can be read."""
        try:
            return cls(**json.loads((folder / STATE).read_text()))
        except (OSError, ValueError, TypeError):
            return cls()
