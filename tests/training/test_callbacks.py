"""Averaged weights, progress and pictures, with values by hand."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from onestage.drawing import COLOURS
from onestage.training.callbacks import BatchPictures, BestFound, ClassTable, Ema, StopWhenAsked, sheet
from onestage.training.endings import Stopped
from onestage.training.module import DetectionModule, Found
from onestage.types import XYXY, Batch, Target


def test_the_decay_grows_from_a_tenth_to_its_value() -> None:
    ema = Ema(decay=0.5)
    weights = [torch.tensor([0.0])]
    ema._update(weights, [torch.tensor([1.0])], torch.tensor(0))  # decay 1/10
    assert torch.allclose(weights[0], torch.tensor([0.9]))
    ema._update(weights, [torch.tensor([0.0])], torch.tensor(1000))  # decay 0.5
    assert torch.allclose(weights[0], torch.tensor([0.45]))


def test_counters_are_copied_not_averaged() -> None:
    seen = [torch.tensor(10)]
    Ema(decay=0.9)._update(seen, [torch.tensor(7)], torch.tensor(3))
    assert seen[0].item() == 7


GREYS = [0.0, 0.2, 0.4, 0.6, 0.8]


def batch_of(greys: Sequence[float], *, floats: bool = False, height: int = 480, width: int = 640) -> Batch:
    """Grey images, each with a box of its number's label from (100, 50) to (300, 250)."""
    levels = torch.tensor(greys) if floats else (torch.tensor(greys) * 255).round().to(torch.uint8)
    images = levels[:, None, None, None].expand(-1, 3, height, width).contiguous()
    box = XYXY(torch.tensor([[100.0, 50, 300, 250]]))
    targets = [Target(box, torch.tensor([n]), image_id=n) for n in range(len(greys))]
    return Batch(images, targets, [f"{n:06d}" for n in range(len(greys))])


CLASSES = ["a", "b", "c", "d", "e"]


class TestSheet:
    @pytest.mark.parametrize("floats", [False, True])
    def test_four_in_a_row_with_their_boxes_where_they_are(self, floats: bool) -> None:
        picture = sheet(batch_of(GREYS, floats=floats), num_images=8, classes=CLASSES)
        assert picture.shape == (2 * 480 + 4, 4 * 640 + 3 * 4, 3)
        assert picture.dtype == np.uint8
        for number, grey in enumerate(GREYS):
            top, left = (number // 4) * 484, (number % 4) * 644
            assert (picture[top + 400, left + 500] == round(grey * 255)).all()
            assert (picture[top + 150, left + 200] == round(grey * 255)).all()  # inside of the box
            assert tuple(picture[top + 150, left + 100]) == COLOURS[number]
            assert tuple(picture[top + 250, left + 200]) == COLOURS[number]
        assert (picture[484:, 644:] == 255).all()  # no sixth to eighth image
        assert (picture[480:484] == 255).all()

    def test_no_more_than_asked_for(self) -> None:
        assert sheet(batch_of(GREYS), num_images=2, classes=CLASSES).shape == (480, 2 * 640 + 4, 3)

    def test_half_precision_and_values_beyond_white_are_shown(self) -> None:
        batch = batch_of([1.5, -0.5], floats=True)
        batch = Batch(batch.images.bfloat16(), batch.targets, batch.keys)
        picture = sheet(batch, num_images=8, classes=CLASSES)
        assert (picture[400, 500] == 255).all()
        assert (picture[400, 644 + 500] == 0).all()

    def test_the_batch_stays_as_it_was(self) -> None:
        batch = batch_of(GREYS)
        before = batch.images.clone()
        sheet(batch, num_images=8, classes=CLASSES)
        assert torch.equal(batch.images, before)


class Noisy(nn.Module):
    """Loss: the mean of a weight times what dropout leaves of the image."""

    loss_parts = ("box",)

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.dropout(images * self.weight, 0.5)

    def losses(self, output: Tensor, targets: Sequence[Target]) -> dict[str, Tensor]:
        return {"box": output.square().mean()}


class Loader:
    """Batches drawn from torch's global generator: whoever else draws from it changes them."""

    def __init__(self, *, empty: Sequence[int] = ()) -> None:
        self.empty = empty

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Any:
        for number in range(len(self)):
            greys = [] if number in self.empty else torch.rand(2).tolist()
            yield batch_of(greys, floats=True, height=32, width=32)


def trained(
    folder: Path, *callbacks: pl.Callback, loader: Loader | None = None, max_epochs: int = 2, resume: Path | None = None
) -> tuple[pl.Trainer, DetectionModule]:
    torch.manual_seed(0)
    module = DetectionModule(
        detector=Noisy(),
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1),
        schedule=lambda epoch, num_epochs: 1.0,
        metric=lambda found: {},
        seed=0,
        card={},
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=max_epochs,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, loader or Loader(), ckpt_path=resume, weights_only=True)
    return trainer, module


class TestBatchPicture:
    @pytest.fixture
    def drawn(self) -> list[tuple[str, np.ndarray, int]]:
        return []

    @pytest.fixture
    def callback(self, drawn: list[tuple[str, np.ndarray, int]]) -> BatchPictures:
        return BatchPictures(classes=CLASSES, sink=lambda *one: drawn.append(one))

    def test_the_first_batches_of_a_run_are_drawn_and_no_other(
        self, drawn: list[Any], callback: BatchPictures, tmp_path: Path
    ) -> None:
        torch.manual_seed(0)
        first = torch.rand(2).tolist()
        trained(tmp_path, callback)
        assert [(name, step) for name, _, step in drawn] == [("train/batch", number) for number in range(3)]
        picture = drawn[0][1]
        # 32 px are drawn three times as large.
        assert picture.shape == (96, 2 * 96 + 4, 3)
        assert [int(picture[90, 90 + 100 * n, 0]) for n in range(2)] == [round(grey * 255) for grey in first]

    def test_a_resumed_run_has_had_its_picture(self, drawn: list[Any], callback: BatchPictures, tmp_path: Path) -> None:
        trainer, _ = trained(tmp_path)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        trained(tmp_path, callback, max_epochs=3, resume=tmp_path / "last.ckpt")
        assert drawn == []

    def test_an_empty_share_is_passed_over(self, drawn: list[Any], callback: BatchPictures, tmp_path: Path) -> None:
        trained(tmp_path, callback, loader=Loader(empty=[0]), max_epochs=1)
        assert [step for _, _, step in drawn] == [0, 1]

    def test_other_ranks_draw_nothing(
        self, drawn: list[Any], callback: BatchPictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pl.Trainer, "is_global_zero", False)
        trained(tmp_path, callback)
        assert drawn == []

    def test_no_image_asked_for_none_drawn(self, drawn: list[Any], tmp_path: Path) -> None:
        trained(tmp_path, BatchPictures(classes=CLASSES, sink=lambda *one: drawn.append(one), num_images=0))
        assert drawn == []

    def test_the_training_is_the_same_to_the_bit(
        self, drawn: list[Any], callback: BatchPictures, tmp_path: Path
    ) -> None:
        """Weights, and the state of the generator that data and dropout draw from."""
        _, without = trained(tmp_path)
        state = torch.get_rng_state()
        _, having = trained(tmp_path, callback)
        assert len(drawn) == 3
        assert torch.equal(torch.get_rng_state(), state)
        assert not torch.equal(having.detector.weight, torch.ones(3, 1, 1))  # type: ignore[arg-type]
        assert torch.equal(having.detector.weight, without.detector.weight)  # type: ignore[arg-type]


class TestStopWhenAsked:
    """Three steps an epoch."""

    @pytest.mark.parametrize(("asked_at", "stopped_at"), [(0, 1), (1, 2), (2, 3), (3, 4)])
    def test_stops_behind_the_step_with_a_checkpoint(self, asked_at: int, stopped_at: int, tmp_path: Path) -> None:
        """Asked before the step after ``asked_at``; behind an epoch's last step too, where a resume starts an epoch."""
        saved: list[int] = []
        steps: list[int] = []
        done: list[int] = []

        class Count(pl.Callback):
            def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
                steps.append(trainer.global_step)

            def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
                done.append(trainer.global_step)

        callback = StopWhenAsked(lambda: steps[-1] >= asked_at, save=lambda trainer: saved.append(trainer.global_step))
        with pytest.raises(Stopped, match=f"stopped at step {stopped_at}, checkpoint saved"):
            trained(tmp_path, Count(), callback)
        assert saved == [stopped_at]
        assert done[-1] == stopped_at

    def test_not_asked_it_ends_as_ever(self, tmp_path: Path) -> None:
        trainer, _ = trained(tmp_path, StopWhenAsked(lambda: False, save=lambda trainer: pytest.fail("saved")))
        assert trainer.global_step == 6


class TestBestFound:
    class At:
        """As much of a trainer as is asked for."""

        is_global_zero = True

        def __init__(self, step: int) -> None:
            self.global_step = step

    @staticmethod
    def validated(*rounds: dict[str, float]) -> BestFound:
        """After validations with these metrics, at steps 1, 2, …; each finds its step."""
        kept = BestFound()
        module = DetectionModule.__new__(DetectionModule)
        for step, metrics in enumerate(rounds, start=1):
            object.__setattr__(module, "found", [step])
            object.__setattr__(module, "metrics", metrics)
            kept.on_validation_end(TestBestFound.At(step), module)  # type: ignore[arg-type]
        return kept

    def test_the_best_validation_is_kept_not_the_last(self) -> None:
        kept = self.validated({"best/map": 0.1}, {"best/map": 0.3}, {"val/map": 0.2})
        assert (kept.found, kept.step, kept.metrics) == ([2], 2, {"best/map": 0.3})

    def test_without_a_better_one_since_a_resume_it_is_the_newest(self) -> None:
        kept = self.validated({"val/map": 0.2}, {"val/map": 0.1})
        assert (kept.found, kept.step) == ([2], 2)

    def test_before_any_there_is_none(self) -> None:
        assert self.validated().found is None


class TestClassTable:
    class Trainer:
        is_global_zero = True

    def validated(self, metrics: dict[str, float]) -> list[list[dict[str, Any]]]:
        """What a validation of one image with two cats tells of cats, dogs and owls."""
        told: list[list[dict[str, Any]]] = []
        module = DetectionModule.__new__(DetectionModule)
        found = Found(1, None, Target(torch.zeros(2, 4), torch.tensor([0, 0]), 1))  # type: ignore[arg-type]
        object.__setattr__(module, "found", [found])
        object.__setattr__(module, "metrics", metrics)
        table = ClassTable(classes=["cat & dog", "dog", "owl"], sink=told.append)
        table.on_validation_end(self.Trainer(), module)  # type: ignore[arg-type]
        return told

    def test_it_has_every_class_by_its_full_name_with_its_truths(self) -> None:
        [rows] = self.validated({"best/map": 0.25, "val/ap/cat & dog": 0.123456789})
        assert [tuple(row.values()) for row in rows] == [("cat & dog", 0.12346, 2), ("dog", None, 0), ("owl", None, 0)]

    def test_a_validation_that_is_not_the_best_keeps_the_table_before(self) -> None:
        assert self.validated({"val/map": 0.25}) == []
