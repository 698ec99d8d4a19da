"""The Lightning module with a detector of one weight, so that every number can be worked out by hand."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from onestage.training.logger import SinkLogger
from onestage.training.module import DetectionModule, Found, in_original, to_float
from onestage.types import AS_IT_IS, XYXY, Batch, Detections, Placement, Target


class Scale(nn.Module):
    """Loss: the mean over images of weight times the image's mean."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0]]))
        self.bias = nn.Parameter(torch.tensor([0.0]))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, images: Tensor) -> Tensor:
        return images.mean(dim=(1, 2, 3)) * self.weight.squeeze() + self.bias

    def losses(self, output: Tensor, targets: Sequence[Target]) -> dict[str, Tensor]:
        return {"box": output.mean(), "class": 2 * output.mean()}

    def detect(self, output: Tensor) -> list[Detections]:
        one = Detections(XYXY(torch.tensor([[0.0, 0, 4, 4]])), torch.ones(1), torch.zeros(1, dtype=torch.int64))
        return [one for _ in output]


class Loader:
    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        return iter(self.batches)


def target(image_id: int, placement: Placement = AS_IT_IS) -> Target:
    return Target(XYXY(torch.tensor([[0.0, 0, 2, 2]])), torch.zeros(1, dtype=torch.int64), image_id, placement)


def batch(*values: float) -> Batch:
    images = torch.stack([torch.full((3, 2, 2), value) for value in values])
    return Batch(images, [target(n) for n in range(len(values))], [f"{n:06d}" for n in range(len(values))])


class Seen:
    """A metric that keeps what it was given."""

    def __call__(self, found: Sequence[Found]) -> dict[str, float]:
        self.found = list(found)
        return {"map": 0.5, "map_50": 0.75}


@pytest.fixture
def fitted(tmp_path: Path) -> Any:
    logged: list[tuple[dict[str, float], int]] = []
    metric = Seen()
    module = DetectionModule(
        detector=Scale(),
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.5, weight_decay=0.1),
        schedule=lambda epoch, num_epochs: 1.0,
        metric=metric,
        seed=0,
        card={"classes": ["a"]},
    )
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        logger=SinkLogger(lambda metrics, step: logged.append((metrics, step))),
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, Loader([batch(1.0, 3.0), batch(2.0)]), Loader([batch(5.0, 6.0)]))
    return module, metric, logged, trainer, tmp_path


def test_every_part_of_the_loss_is_logged_by_name(fitted: Any) -> None:
    first = next(metrics for metrics, step in fitted[2] if "train/loss" in metrics)
    assert first["train/loss/box"] == pytest.approx(2.0)
    assert first["train/loss/class"] == pytest.approx(4.0)
    assert first["train/loss"] == pytest.approx(6.0)
    assert first["train/lr"] == pytest.approx(0.5)
    assert first["train/grad_norm"] == pytest.approx((6.0**2 + 3.0**2) ** 0.5)  # of weight and bias


def test_weights_decay_and_biases_do_not(fitted: Any) -> None:
    optimizer = fitted[3].optimizers[0]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1]


def test_the_detector_counts_the_images_it_was_trained_on(fitted: Any) -> None:
    assert fitted[0].detector.seen.item() == 3


def test_validation_hands_every_image_once_to_the_metric_and_logs_its_scores(fitted: Any) -> None:
    assert [one.image_id for one in fitted[1].found] == [0, 1]
    validated = next(metrics for metrics, _ in fitted[2] if "val/map" in metrics)
    assert (validated["val/map"], validated["val/map_50"]) == (0.5, 0.75)
    assert "val/loss" in validated


def test_a_checkpoint_is_plain_data_that_says_how_to_build_the_detector(fitted: Any) -> None:
    _, _, _, trainer, folder = fitted
    trainer.save_checkpoint(folder / "one.ckpt")
    loaded = torch.load(folder / "one.ckpt", weights_only=True)
    scores = loaded["onestage"].pop("metrics")
    assert loaded["onestage"] == {"classes": ["a"], "images_seen": 3}
    assert (scores["val/map"], scores["val/map_50"]) == (0.5, 0.75)
    assert set(loaded["state_dict"]) == {"detector.weight", "detector.bias", "detector.seen"}


def test_sizes_are_measured_in_the_original_image() -> None:
    placed = target(7, Placement(scale=(0.5, 0.5), offset=(1.0, 0.0)))
    (found,) = Scale().detect(torch.zeros(1))
    one = in_original(found, placed)
    assert one.detections.boxes.tolist() == [[-2.0, 0.0, 6.0, 8.0]]
    assert one.target.boxes.tolist() == [[-2.0, 0.0, 2.0, 4.0]]
    assert one.image_id == 7


def test_bytes_become_shares_of_one_and_floats_stay() -> None:
    assert to_float(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)).unique().tolist() == [1.0]
    assert to_float(torch.full((1, 3, 2, 2), 0.25)).unique().tolist() == [0.25]
