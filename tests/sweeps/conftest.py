"""A small data set of drawn images, packed once, and a sweep's folder as one finds it after a while."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def sweep_folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes a journal and the trials' states: ``make({0: ("done", 0.5), 1: ("failed", None)})``."""
    from hydra_plugins.ray_tune_sweeper._journal import Journal
    from onestage.sweeps.folder import Setup, State

    def make(trials: dict[int, tuple[str, float | None]], **setup: Any) -> Path:
        folder = tmp_path / "runs" / "sweeps" / "one"
        defaults: dict[str, Any] = {
            "name": "one", "overrides": ["seed=1,2"], "metric": "val/map", "maximize": True,
            "cluster": {"num_workers": 2, "gpus_per_worker": 0}, "tracking_uri": None,
            "parent": None, "started": 0.0,
        }  # fmt: skip
        Setup(**{**defaults, **setup}).save(folder)
        journal = Journal.open(folder)
        journal.add("sweep", space={}, metric="best", direction="maximize", search="random", seed=0)
        for number, (state, score) in trials.items():
            point = {"detector": "yolov3_tiny", "optimizer.lr": 0.001 * (number + 1)}
            lines = [f"{key}={value}" for key, value in point.items()]
            journal.add("trial", trial=number, point=point, overrides=lines)
            journal.add("start", trial=number, point=point, overrides=lines)
            own = State(run_id=f"run{number}", epoch=3, num_epochs=9, step=30, num_steps=90, loss=1.5, score=score)
            if score is not None:
                own.metrics = {"best/map_low": score - 0.1, "best/map_high": score + 0.1}
                journal.add("result", trial=number, metrics={"best": score, "epoch": 3})
            own.save(folder / str(number))
            time.sleep(0.01)
            if state != "unfinished":
                reason = "by asha" if state == "stopped" else "no luck" if state == "failed" else None
                journal.add("end", trial=number, state=state, value=score, reason=reason)
        journal.close()
        return folder

    return make
