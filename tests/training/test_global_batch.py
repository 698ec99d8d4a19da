"""A step is the same whatever the number of workers: a real detector on one, two and three processes."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy

from onestage.config import build, compose
from onestage.data.datamodule import DetectionData
from onestage.data.scenes import draw
from onestage.training.module import DetectionModule, Found
from onestage.types import Batch, Part

GLOBAL_BATCH = 4
NUM_IMAGES = 10  # steps of 4, 4 and 2: with three workers the last leaves one of them without an image
NUM_STEPS = 3
WORLDS = {1: 4, 2: 1, 3: 1}
"""Workers, and how many images each takes at once: all four, one of two, or one of its one or two."""


def detector_of(**settings: Any) -> Any:
    torch.manual_seed(1)
    common = {"width": 0.125, "num_classes": 10, "input_size": [64, 64], "freeze_norm": True}
    overrides = [f"detector.{key}={value}" for key, value in (common | settings).items()]
    return build(compose("train", ["detector=yolov3_tiny", *overrides])["detector"])


def data_of(root: Path, *, batch_size: int) -> DetectionData:
    return DetectionData(
        root=root,
        batch_size=batch_size,
        global_batch=GLOBAL_BATCH,
        input_size=[64, 64],
        augment={},
        seed=3,
        num_workers=0,
    )


class NoMetric:
    def __call__(self, found: Sequence[Found]) -> dict[str, float]:
        return {"map": 0.0}


class Epochs:
    """A constant schedule that notes what it is asked about, once where it is for several parameter groups."""

    def __init__(self) -> None:
        self.asked: list[tuple[float, float]] = []

    def __call__(self, epoch: float, num_epochs: float) -> float:
        if (epoch, num_epochs) not in self.asked[-1:]:
            self.asked.append((epoch, num_epochs))
        return 1.0


def module_of(detector: torch.nn.Module, schedule: Epochs) -> DetectionModule:
    return DetectionModule(
        detector=detector,
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9),
        schedule=schedule,
        metric=NoMetric(),
        seed=3,
        card={},
    )


def trainer_of(data: DetectionData, folder: Path, *, world_size: int = 1, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=DDPStrategy(gradient_as_bucket_view=True) if world_size > 1 else "auto",
        accumulate_grad_batches=data.accumulate(world_size),
        use_distributed_sampler=False,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )


class Notes(pl.Callback):
    """What each step logged, whether each micro-batch had its gradients averaged, and where the ranks agreed to stop.

    The last rank asks for it in the first micro-batch of the second step.
    """

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []
        self.averaged: list[bool] = []
        self.agreed: list[int] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Batch, batch_idx: int) -> None:
        if trainer.global_step == 1 and trainer.global_rank == trainer.world_size - 1:
            module.stop_asked = True

    def on_after_backward(self, trainer: pl.Trainer, module: Any) -> None:
        if trainer.world_size > 1:
            self.averaged.append(bool(trainer.model.require_backward_grad_sync))

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Batch, idx: int) -> None:
        if batch.ends_step:
            self.logged.append({name: float(value) for name, value in trainer.logged_metrics.items()})
        if module.stop_agreed:
            self.agreed.append(trainer.global_step)


def train(root: Path, folder: Path, world_size: int) -> None:
    """One worker of a training; started once, it starts the others."""
    torch.set_num_threads(1)
    notes, data = Notes(), data_of(root, batch_size=WORLDS[world_size])
    module = module_of(detector_of(), Epochs())
    trainer = trainer_of(data, folder, world_size=world_size, max_epochs=1, callbacks=[notes])
    trainer.fit(module, datamodule=data)
    told = {
        "logged": notes.logged,
        "averaged": notes.averaged,
        "agreed": notes.agreed,
        "steps": trainer.global_step,
        "images_seen": module.images_seen,
        "seen": int(module.detector.seen),  # type: ignore[arg-type, operator]
    }
    path = folder / f"{world_size}-{trainer.global_rank}"
    path.with_suffix(".json").write_text(json.dumps(told))
    torch.save(module.detector.state_dict(), path.with_suffix(".pt"))


Told = dict[int, tuple[dict[str, Any], dict[str, torch.Tensor]]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "digits"
    draw(folder, seed=1, num_train=NUM_IMAGES, num_val=1, num_test=1, size=64)
    return folder


@pytest.fixture(scope="module")
def trained(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Told]:
    """Of each number of workers: what every rank told, and its weights."""
    folder = tmp_path_factory.mktemp("trained")
    for world_size in WORLDS:
        subprocess.run([sys.executable, __file__, str(root), str(folder), str(world_size)], timeout=200, check=True)
    return {
        world_size: {
            rank: (
                json.loads((folder / f"{world_size}-{rank}.json").read_text()),
                torch.load(folder / f"{world_size}-{rank}.pt", weights_only=True),
            )
            for rank in range(world_size)
        }
        for world_size in WORLDS
    }


@pytest.mark.slow
@pytest.mark.timeout(600)  # three trainings, of which each imports everything anew
class TestWorkers:
    """One that takes the whole step, two that take it in two parts each, and three that take two, one and one."""

    def test_end_with_the_same_weights(self, trained: dict[int, Told]) -> None:
        alone = trained[1][0][1]
        start = detector_of().state_dict()
        moved = [name for name, value in alone.items() if not torch.equal(value, start[name])]
        assert len(moved) > 20
        for world_size in (2, 3):
            for _, weights in trained[world_size].values():
                assert weights.keys() == alone.keys()
                for name, value in alone.items():
                    torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-6)

    def test_log_the_means_over_the_whole_step(self, trained: dict[int, Told]) -> None:
        alone = trained[1][0][0]["logged"]
        assert len(alone) == NUM_STEPS
        assert {"train/loss", "train/loss/box", "train/loss/class", "train/grad_norm"} <= alone[0].keys()
        for world_size in (2, 3):
            for told, _ in trained[world_size].values():
                assert told["logged"] == [pytest.approx(step, rel=1e-3) for step in alone]

    def test_count_every_image_once(self, trained: dict[int, Told]) -> None:
        for told, _ in (one for ranks in trained.values() for one in ranks.values()):
            assert (told["steps"], told["images_seen"], told["seen"]) == (NUM_STEPS, NUM_IMAGES, NUM_IMAGES)

    def test_average_gradients_once_a_step(self, trained: dict[int, Told]) -> None:
        for world_size in (2, 3):
            for told, _ in trained[world_size].values():
                assert told["averaged"] == [False, True] * NUM_STEPS

    def test_agree_on_the_step_to_stop_behind(self, trained: dict[int, Told]) -> None:
        for told, _ in (one for ranks in trained.values() for one in ranks.values()):
            assert told["agreed"][0] == 2


class Stopped(Exception):
    pass


class StopBehind(pl.Callback):
    def __init__(self, path: Path, *, step: int) -> None:
        self.path = path
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Batch, idx: int) -> None:
        if trainer.global_step == self.step and batch.ends_step:
            trainer.save_checkpoint(self.path)
            raise Stopped


def test_schedules_go_by_epochs_done_in_however_many_micro_batches(root: Path, tmp_path: Path) -> None:
    """Two epochs of three steps, in one part, then in four, then in two: step n comes to n / 3 epochs of 2."""
    path, resume, before = tmp_path / "last.ckpt", None, 0
    asked: list[tuple[float, float]] = []
    for batch_size, step in ((4, 2), (1, 5), (3, 6)):
        data, schedule = data_of(root, batch_size=batch_size), Epochs()
        trainer = trainer_of(data, tmp_path, max_epochs=2, callbacks=[StopBehind(path, step=step)])
        with pytest.raises(Stopped):
            trainer.fit(module_of(detector_of(), schedule), datamodule=data, ckpt_path=resume, weights_only=True)
        # Behind each of its steps, the next one's.
        asked += schedule.asked[-(step - before) :]
        resume, before = path, step
    assert asked == [(pytest.approx((step + 1) / 3), 2.0) for step in range(1, 7)]
    assert torch.load(path, weights_only=True)["onestage"]["images_seen"] == 2 * NUM_IMAGES


class TestSynchronisedNorm:
    """What Lightning makes of a detector for ``cluster.sync_norm``; it runs on GPUs alone."""

    def test_stays_frozen_and_channels_last(self) -> None:
        detector = detector_of().to(memory_format=torch.channels_last)
        converted: Any = torch.nn.SyncBatchNorm.convert_sync_batchnorm(detector).train()
        norms = [one for one in converted.modules() if isinstance(one, torch.nn.SyncBatchNorm)]
        assert len(norms) > 5
        assert not any(norm.training for norm in norms)
        kernels = [one.weight for one in converted.modules() if isinstance(one, torch.nn.Conv2d)]
        assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)
        images = torch.rand(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
        expected = detector_of().to(memory_format=torch.channels_last).train().raw_maps(images)
        for one, other in zip(converted.raw_maps(images), expected, strict=True):
            torch.testing.assert_close(one, other)

    @pytest.mark.parametrize(("part", "expected"), [(0, True), (1, True), (2, False)])
    def test_a_rank_without_an_image_takes_part_as_long_as_others_have_one(self, part: int, expected: bool) -> None:
        """Two ranks share three images, in three parts of which no rank has the last."""
        detector = torch.nn.SyncBatchNorm.convert_sync_batchnorm(detector_of(freeze_norm=False))
        called: list[tuple[int, ...]] = []

        def raw_maps(images: torch.Tensor) -> list[torch.Tensor]:
            called.append(tuple(images.shape))
            return [images]

        detector.raw_maps = raw_maps
        module = module_of(detector, Epochs())
        module._trainer = SimpleNamespace(world_size=2)  # type: ignore[assignment]
        nothing = Batch(torch.empty(0, 3, 64, 64), [], [], global_images=3, part=Part(part, 3))
        loss = module._loss_of_none(nothing)
        assert loss.item() == 0
        assert called == ([(0, 3, 64, 64)] if expected else [])

    def test_an_empty_batch_goes_through_a_detector_forth_and_back(self) -> None:
        detector = detector_of()
        sum(one.sum() for one in detector.raw_maps(torch.empty(0, 3, 64, 64))).backward()
        assert all(parameter.grad is not None for parameter in detector.parameters())


if __name__ == "__main__":
    train(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
