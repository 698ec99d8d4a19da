"""The pictures of the first batches, from a dataset folder into MLflow."""

import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import pytorch_lightning as pl
import torch
from mlflow import MlflowClient
from torch import Tensor, nn

from onestage.config import build, compose
from onestage.data import scenes
from onestage.tracking import runs
from onestage.tracking.mlflow_tracker import MlflowTracker
from onestage.training.callbacks import BatchPictures, sheet
from onestage.training.module import DetectionModule
from onestage.types import Target


class Mean(nn.Module):
    loss_parts = ("box",)

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, images: Tensor) -> Tensor:
        return images.mean() * self.weight

    def losses(self, output: Tensor, targets: Sequence[Target]) -> dict[str, Tensor]:
        return {"box": output.sum()}


class Keys(pl.Callback):
    def __init__(self) -> None:
        self.keys: list[str] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.keys += batch.keys


@pytest.fixture
def root(tmp_path: Path) -> Path:
    scenes.draw(tmp_path / "digits", seed=1, num_train=10, num_val=2, num_test=2, size=96)
    return tmp_path / "digits"


def trained(root: Path, folder: Path, *callbacks: pl.Callback) -> list[str]:
    """The keys in the order they were trained on."""
    overrides = [f"data.root={root}", "detector.input_size=[96,96]", "data.batch_size=4", "data.num_workers=0"]
    data = build(compose("train", [*overrides, "augment=yolov4"])["data"])
    module = DetectionModule(
        detector=Mean(),
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1),
        schedule=lambda epoch, num_epochs: 1.0,
        metric=lambda found: {},
        seed=0,
        card={},
    )
    seen = Keys()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=2,
        callbacks=[seen, *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )
    trainer.fit(module, datamodule=data)
    return seen.keys


def test_the_first_batches_lie_in_the_run_as_they_were_trained_on(store: str, root: Path, tmp_path: Path) -> None:
    run_id = runs.open_run(store, f"pictures {uuid.uuid4()}", tags={})
    tracker = MlflowTracker(uri=store, run_id=run_id, folder=tmp_path / "spool")
    classes = [str(digit) for digit in range(10)]
    keys = trained(root, tmp_path, BatchPictures(classes=classes, sink=tracker.log_picture))
    assert tracker.close(20)
    assert keys == trained(root, tmp_path), "the picture took no batch from the training"

    paths = sorted(one.path for one in MlflowClient(store).list_artifacts(run_id, "images"))
    files = [path for path in paths if path.endswith(".png")]
    assert [path.split("+timestamp")[0] for path in files] == [
        f"images/train~batch+step+{n}" for n in range(len(files))
    ]
    assert len(files) == min(3, len(keys) // 4)
    overrides = [f"data.root={root}", "detector.input_size=[96,96]", "data.batch_size=4", "data.num_workers=0"]
    data = build(compose("train", [*overrides, "augment=yolov4"])["data"])
    batch = next(iter(data.train_dataloader()))
    assert list(batch.keys) == keys[:4]
    with PIL.Image.open(runs.download(store, run_id, files[0], tmp_path)) as picture:
        assert np.array_equal(np.asarray(picture), sheet(batch, num_images=8, classes=classes))
