"""The Lightning module with a detector of one weight, so that every number can be worked out by hand."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from onestage.errors import InputError
from onestage.training.divergence import BadBatch
from onestage.training.endings import Diverged
from onestage.training.logger import SinkLogger
from onestage.training.module import DetectionModule, Found, in_original, to_float
from onestage.types import AS_IT_IS, XYXY, Batch, Detections, Part, Placement, Skipped, Target


class Scale(nn.Module):
    """Loss: the mean over images of weight times the image's mean."""

    loss_parts = ("box", "class")

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


def batch(*values: float, skipped: int = 0) -> Batch:
    images = torch.stack([torch.full((3, 2, 2), value) for value in values])
    return Batch(
        images,
        [target(n) for n in range(len(values))],
        [f"{n:06d}" for n in range(len(values))],
        global_images=len(values) + skipped,
        skipped=[Skipped(f"{n:06d}", "its shard is missing") for n in range(900, 900 + skipped)],
    )


class Seen:
    """A metric that keeps what it was given."""

    def __call__(self, found: Sequence[Found]) -> dict[str, float]:
        self.found = list(found)
        return {"map": 0.5, "map_50": 0.75}


def quiet(folder: Path, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )


def made(detector: nn.Module, schedule: Any, lr: float = 0.5) -> DetectionModule:
    return DetectionModule(
        detector=detector,
        optimizer=lambda groups: torch.optim.SGD(groups, lr=lr, weight_decay=0.1),
        schedule=schedule,
        metric=Seen(),
        seed=0,
        card={"classes": ["a"]},
    )


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
    sink = SinkLogger(lambda metrics, step: logged.append((metrics, step)))
    trainer = quiet(tmp_path, max_epochs=1, logger=sink, enable_checkpointing=False)
    trainer.fit(module, Loader([batch(1.0, 3.0), batch(2.0)]), Loader([batch(5.0, 6.0)]))
    return module, metric, logged, trainer, tmp_path


def test_every_part_of_the_loss_is_logged_by_name(fitted: Any) -> None:
    first = next(metrics for metrics, step in fitted[2] if "train/loss" in metrics)
    assert first["train/loss/box"] == pytest.approx(2.0)
    assert first["train/loss/class"] == pytest.approx(4.0)
    assert first["train/loss"] == pytest.approx(6.0)
    assert first["train/lr"] == pytest.approx(0.5)
    assert first["train/grad_norm"] == pytest.approx((6.0**2 + 3.0**2) ** 0.5)  # of weight and bias


def micro_batches(*batches: Batch) -> list[Batch]:
    """Batches as the parts of one step."""
    num_images = sum(one.global_images for one in batches)
    return [
        replace(one, global_images=num_images, part=Part(number, len(batches))) for number, one in enumerate(batches)
    ]


NOTHING = Batch(torch.empty(0, 3, 2, 2), [], [])


def accumulated(folder: Path, batches: list[Batch], **options: Any) -> tuple[DetectionModule, list[dict[str, float]]]:
    """A training on two micro-batches a step with a rate of 0.5, and what it logged at each step."""
    logged: list[dict[str, float]] = []
    module = made(Scale(), lambda epoch, num_epochs: 1.0)
    module.max_skipped = 1
    trainer = quiet(
        folder,
        max_epochs=1,
        accumulate_grad_batches=2,
        logger=SinkLogger(lambda metrics, step: logged.append(metrics)),
        enable_checkpointing=False,
        **options,
    )
    trainer.fit(module, Loader(batches), Loader([batch(5.0)]))
    return module, [metrics for metrics in logged if "train/loss" in metrics]


def test_a_step_of_several_micro_batches_is_the_mean_over_its_images(tmp_path: Path) -> None:
    """Images 1, 3 and 8: their mean is 4, and the loss three times that, though the parts hold two and one.

    With a weight of 1 that decays by 0.1, a step of 0.5 leads to 1 - 0.5 * (3 * 4 + 0.1); the bias gets 3.
    """
    module, (first,) = accumulated(tmp_path, micro_batches(batch(1.0, 3.0), batch(8.0)))
    assert first["train/loss"] == pytest.approx(12.0)
    assert (first["train/loss/box"], first["train/loss/class"]) == pytest.approx((4.0, 8.0))
    assert first["train/grad_norm"] == pytest.approx((12.0**2 + 3.0**2) ** 0.5)
    assert module.detector.weight.item() == pytest.approx(1 - 0.5 * 12.1)
    assert module.images_seen == module.detector.seen.item() == 3
    assert module._epoch(module.global_step) == 1


@pytest.mark.parametrize("parts", [(batch(2.0, 6.0), NOTHING), (NOTHING, batch(2.0, 6.0))])
def test_an_empty_micro_batch_changes_nothing(tmp_path: Path, parts: tuple[Batch, Batch]) -> None:
    module, (first,) = accumulated(tmp_path, micro_batches(*parts))
    assert first["train/loss"] == pytest.approx(12.0)
    assert module.detector.weight.item() == pytest.approx(1 - 0.5 * 12.1)


def test_skipped_images_of_all_micro_batches_count_once(tmp_path: Path) -> None:
    parts = micro_batches(batch(2.0, skipped=1), batch(6.0))
    module, (first,) = accumulated(tmp_path, parts)
    assert first["data/skipped"] == 1.0
    assert [one.key for one in module.skipped] == ["000900"]
    assert first["train/loss"] == pytest.approx(3 * (2.0 + 6.0) / 3)  # of three images one counts as nothing
    with pytest.raises(InputError, match=r"2 images of epoch 0 could not be read .*data\.max_skipped=1"):
        accumulated(tmp_path, micro_batches(batch(2.0, skipped=1), batch(6.0, skipped=1)))


def test_a_diverged_step_names_the_micro_batch_that_did_it(tmp_path: Path) -> None:
    bad = replace(batch(float("nan")), keys=["000007"])
    with pytest.raises(Diverged, match=r"step 0: the loss is nan; .*, images 000007: "):
        accumulated(tmp_path, micro_batches(batch(1.0, 3.0), bad))
    assert BadBatch.load(tmp_path / "bad_batch" / "step-0-rank-0.safetensors").weights["seen"].item() == 0


class Steep(Scale):
    """Finite at zero, with a gradient that is not."""

    def losses(self, output: Tensor, targets: Sequence[Target]) -> dict[str, Tensor]:
        return {"box": (output - output.detach()).mean().sqrt()}


def test_where_no_loss_is_to_blame_all_micro_batches_are_saved_as_one(tmp_path: Path) -> None:
    module = made(Steep(), lambda epoch, num_epochs: 1.0)
    trainer = quiet(tmp_path, max_epochs=1, accumulate_grad_batches=2, logger=False, enable_checkpointing=False)
    with pytest.raises(Diverged, match=r"step 0: the gradient is not finite, the loss is 0; rank 0 \(box 0\)"):
        trainer.fit(module, Loader(micro_batches(batch(1.0, 3.0), batch(8.0))), Loader([]))
    saved = BadBatch.load(tmp_path / "bad_batch" / "step-0-rank-0.safetensors").batch
    assert saved.images[:, 0, 0, 0].tolist() == [1.0, 3.0, 8.0]
    assert [target.image_id for target in saved.targets] == [0, 1, 0]


class Drawing(Scale):
    """Notes what its random draws are."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[float] = []

    def losses(self, output: Tensor, targets: Sequence[Target]) -> dict[str, Tensor]:
        self.drawn.append(torch.rand(()).item())
        return super().losses(output, targets)


def test_every_micro_batch_draws_numbers_of_its_own(tmp_path: Path) -> None:
    drawn = []
    for _ in range(2):
        detector = Drawing()
        trainer = quiet(tmp_path, max_epochs=1, accumulate_grad_batches=2, logger=False, enable_checkpointing=False)
        parts = micro_batches(batch(1.0), batch(1.0))
        trainer.fit(made(detector, lambda epoch, num_epochs: 1.0), Loader(parts * 2), Loader([]))
        drawn.append(detector.drawn)
    assert len(set(drawn[0])) == 4
    assert drawn[0] == drawn[1]


class AsksToStop(pl.Callback):
    """Asks before the batch with number ``asked_at``, and notes behind each batch whether the ranks agreed."""

    def __init__(self, asked_at: int) -> None:
        self.asked_at = asked_at
        self.agreed: list[bool] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Batch, batch_idx: int) -> None:
        if batch_idx == self.asked_at:
            module.stop_asked = True

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Batch, idx: int) -> None:
        self.agreed.append(module.stop_agreed)


@pytest.mark.parametrize("asked_at", [2, 3])
def test_a_stop_that_is_asked_for_is_agreed_at_the_end_of_the_step(tmp_path: Path, asked_at: int) -> None:
    asking = AsksToStop(asked_at)
    accumulated(tmp_path, micro_batches(batch(1.0), batch(1.0)) * 3, callbacks=[asking])
    assert asking.agreed == [False, False, False, True, True, True]


def skipping(
    folder: Path, *, max_skipped: int, batches: list[Batch], val: list[Batch]
) -> tuple[list[str], list[dict[str, float]]]:
    """What a training over two epochs told of skipped images, and what it logged."""
    logged: list[dict[str, float]] = []
    module = DetectionModule(
        detector=Scale(),
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.0),
        schedule=lambda epoch, num_epochs: 1.0,
        metric=Seen(),
        seed=0,
        card={},
        max_skipped=max_skipped,
    )
    sink = SinkLogger(lambda metrics, step: logged.append(metrics))
    quiet(folder, max_epochs=2, logger=sink, enable_checkpointing=False).fit(module, Loader(batches), Loader(val))
    return [f"{one.key} {one.why}" for one in module.skipped], logged


def test_skipped_images_are_named_counted_for_each_epoch_and_weighed_out(tmp_path: Path) -> None:
    batches = [batch(1.0, 3.0, skipped=2), batch(2.0)]
    told, logged = skipping(tmp_path, max_skipped=2, batches=batches, val=[batch(5.0)])
    assert told == ["000900 its shard is missing", "000901 its shard is missing"] * 2
    counts = [metrics["data/skipped"] for metrics in logged if "data/skipped" in metrics]
    assert counts[-1] == 2.0 and max(counts) == 2.0
    # Box and class are 1 and 2 times the mean of 1 and 3; two of four images are there.
    assert next(metrics["train/loss"] for metrics in logged) == pytest.approx(6.0 * 2 / 4)


def test_more_skipped_images_than_allowed_end_the_training_with_one_line(tmp_path: Path) -> None:
    batches = [batch(1.0, skipped=1), batch(2.0, skipped=1)]
    with pytest.raises(
        InputError,
        match=r"2 images of epoch 0 .* \(such as 000900: its shard is missing\), more than data.max_skipped=1: mend",
    ):
        skipping(tmp_path, max_skipped=1, batches=batches, val=[batch(5.0)])


def test_skipped_images_of_a_validation_count_as_well(tmp_path: Path) -> None:
    told, logged = skipping(tmp_path, max_skipped=1, batches=[batch(1.0)], val=[batch(5.0, skipped=1)])
    assert told == ["000900 its shard is missing"] * 2
    assert [metrics["val/skipped"] for metrics in logged if "val/skipped" in metrics] == [1.0, 1.0]
    with pytest.raises(
        InputError,
        match=r"2 images to validate on .* \(such as 000900: its shard is missing\), more than data.max_skipped=1",
    ):
        skipping(tmp_path, max_skipped=1, batches=[batch(1.0)], val=[batch(5.0, skipped=2)])


def test_a_validation_without_any_image_left_ends_with_one_line(tmp_path: Path) -> None:
    nothing = Batch(
        torch.empty(0, 3, 2, 2),
        [],
        [],
        global_images=2,
        skipped=[Skipped(f"{n:06d}", "its shard is missing") for n in (1, 2)],
    )
    with pytest.raises(
        InputError, match=r"2 images to validate on .* \(such as 000001: its shard is missing\): mend the dataset"
    ):
        skipping(tmp_path, max_skipped=10, batches=[batch(1.0)], val=[nothing])


def test_a_bias_for_each_place_of_a_map_does_not_decay_either() -> None:
    """As a locally connected layer has, (channels, h, w)."""
    module = made(Scale(), lambda epoch, num_epochs: 1.0)
    module.detector.local = nn.Module()
    module.detector.local.bias = nn.Parameter(torch.zeros(2, 3, 3))
    module._trainer = SimpleNamespace(  # type: ignore[assignment]
        estimated_stepping_batches=4, num_training_batches=2, accumulate_grad_batches=1
    )
    decayed, free = module.configure_optimizers()["optimizer"].param_groups
    assert [p.shape for p in decayed["params"]] == [(1, 1)]
    assert [p.shape for p in free["params"]] == [(1,), (2, 3, 3)]


def test_a_resume_with_another_learning_rate_trains_with_it(tmp_path: Path) -> None:
    """The first step of 0.5 is halved by the schedule, as is the second, of 0.1."""
    first = quiet(tmp_path, max_epochs=1, logger=False, enable_checkpointing=False)
    first.fit(made(Scale(), lambda epoch, num_epochs: 0.5), Loader([batch(0.0)]), Loader([batch(0.0)]))
    first.save_checkpoint(tmp_path / "one.ckpt")
    rates: list[float] = []
    second = quiet(
        tmp_path,
        max_epochs=2,
        logger=SinkLogger(lambda metrics, step: rates.append(metrics.get("train/lr", -1.0))),
        enable_checkpointing=False,
    )
    second.fit(
        made(Scale(), lambda epoch, num_epochs: 0.5, lr=0.1),
        Loader([batch(0.0)]),
        Loader([batch(0.0)]),
        ckpt_path=tmp_path / "one.ckpt",
        weights_only=True,
    )
    (group, _) = second.optimizers[0].param_groups
    assert [rate for rate in rates if rate >= 0] == pytest.approx([0.05])
    assert (group["lr"], group["initial_lr"]) == pytest.approx((0.05, 0.1))


@pytest.mark.parametrize("num_batches", [4, 2, 8])
def test_the_schedule_goes_on_at_its_epoch_when_a_resume_has_other_steps(tmp_path: Path, num_batches: int) -> None:
    """One epoch of four steps, then one of more or fewer: another batch or world size."""
    seen: list[tuple[float, float]] = []

    def schedule(epoch: float, num_epochs: float) -> float:
        seen.append((epoch, num_epochs))
        return 1.0

    first = quiet(tmp_path, max_epochs=1, logger=False, enable_checkpointing=False)
    first.fit(made(Scale(), schedule), Loader([batch(1.0)] * 4), Loader([batch(1.0)]))
    first.save_checkpoint(tmp_path / "one.ckpt")
    seen.clear()
    second = quiet(tmp_path, max_epochs=2, logger=False, enable_checkpointing=False)
    second.fit(
        made(Scale(), schedule),
        Loader([batch(1.0)] * num_batches),
        Loader([batch(1.0)]),
        ckpt_path=tmp_path / "one.ckpt",
        weights_only=True,
    )
    epochs = [*dict.fromkeys(epoch for epoch, _ in seen)][-num_batches:]  # after each of its steps, that of the next
    assert epochs == [1 + (step + 1) / num_batches for step in range(1, num_batches + 1)]
    assert {num_epochs for _, num_epochs in seen} == {2.0}


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
    scores, best = loaded["onestage"].pop("metrics"), loaded["onestage"].pop("best_map")
    assert loaded["onestage"] == {"classes": ["a"], "images_seen": 3, "epoch": [1, 1], "skipped": 0}
    assert (scores["val/map"], scores["val/map_50"], best) == (0.5, 0.75, 0.5)
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


def test_the_best_so_far_is_kept_with_its_interval() -> None:
    """Three validations of 0.2, 0.1 and 0.4: the second is none to speak of, also after a restart."""
    asked: list[int] = []

    def interval(found: Any) -> tuple[float, float]:
        asked.append(1)
        return 0.1, 0.9

    module = made(Scale(), lambda epoch, num_epochs: 1.0)
    module.interval = interval
    told = []
    for score in (0.2, 0.1, 0.4):
        told.append(module._best_so_far(score, []))
        module.best_map = told[-1].get("best/map", module.best_map)
    bounds = {"best/map_low": 0.1, "best/map_high": 0.9}
    assert told == [{"best/map": 0.2, **bounds}, {}, {"best/map": 0.4, **bounds}]
    assert len(asked) == 2
