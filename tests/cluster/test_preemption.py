"""A training stops where it is asked to: within an epoch, and at its last step without the validation that is due."""

import os
import signal
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from onestage.cluster import worker
from onestage.cluster.job import Job
from onestage.cluster.launch import launch
from onestage.cluster.preflight import check
from onestage.config import compose
from onestage.errors import PREEMPTED
from onestage.training.callbacks import BatchPictures
from onestage.training.endings import Stopped

from .conftest import SETTINGS

STEPS_PER_EPOCH = 6  # 24 images, 4 at once


def train(digits: Path, storage: Path, *, asked_at: int | None = None) -> dict[str, Any]:
    """Two epochs; asked to stop within the step ``asked_at``."""
    overrides = ["cluster=none", "tracking=none", f"data.root={digits}", "data.batch_size=4", "trainer.max_epochs=2"]
    config = check(compose("train", [*overrides, f"storage={storage}", "augment=yolov4", *SETTINGS]))
    steps = count(1)
    return worker.train(
        Job(config=config, run_id="run", folder=str(storage / "run"), tracking_uri=None),
        rank=0,
        trainer_options={"accelerator": "cpu", "devices": 1},
        progress=lambda message: None,
        asked=lambda: next(steps) == asked_at,
    )


@pytest.mark.slow
def test_at_an_epochs_last_step_it_stops_before_the_validation_and_goes_on_with_the_next_epoch(
    digits: Path, tmp_path: Path
) -> None:
    whole = train(digits, tmp_path / "whole")
    with pytest.raises(Stopped, match=f"stopped at step {STEPS_PER_EPOCH}, checkpoint saved"):
        train(digits, tmp_path / "stopped", asked_at=STEPS_PER_EPOCH)
    saved = torch.load(tmp_path / "stopped" / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == STEPS_PER_EPOCH
    assert "val/map" not in saved["onestage"]["metrics"]
    resumed = train(digits, tmp_path / "stopped")
    ends = [torch.load(one["checkpoint"], weights_only=True) for one in (whole, resumed)]
    assert [end["global_step"] for end in ends] == [2 * STEPS_PER_EPOCH] * 2
    assert ends[0]["onestage"]["images_seen"] == ends[1]["onestage"]["images_seen"] == 48
    for name, value in ends[0]["state_dict"].items():
        assert torch.equal(value, ends[1]["state_dict"][name]), name
    assert resumed["metrics"]["val/map"] == whole["metrics"]["val/map"]


@pytest.mark.slow
def test_sigterm_within_an_epoch_leaves_a_checkpoint_and_says_preempted(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    after = STEPS_PER_EPOCH + 2

    class Terminated(BatchPictures):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == after:
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(worker, "BatchPictures", Terminated)
    overrides = ["cluster=none", "tracking=none", f"data.root={digits}", "data.batch_size=4", "trainer.max_epochs=3"]
    outcome = launch(compose("train", [*overrides, f"storage={tmp_path}", "augment=none", *SETTINGS]))
    assert (outcome.exit_code, outcome.status) == (PREEMPTED, "KILLED")
    saved = torch.load(outcome.folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == after + 1
