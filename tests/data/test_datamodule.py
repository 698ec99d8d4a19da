import shutil
from collections.abc import Callable
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torchvision.transforms import v2

from onestage.data import order
from onestage.data.datamodule import DetectionData
from onestage.errors import InputError
from onestage.types import Batch, Placement

DataOf = Callable[..., DetectionData]


def by_key(batches: list[Batch]) -> dict[str, tuple[torch.Tensor, Any]]:
    return {
        key: (image, target)
        for batch in batches
        for key, image, target in zip(batch.keys, batch.images, batch.targets, strict=True)
    }


def test_transform_set_to_none_is_left_out(dataset: Path) -> None:
    augment = {"placement": None, "flip": v2.RandomHorizontalFlip(p=1)}
    data = DetectionData(root=dataset, batch_size=4, input_size=[32, 48], augment=augment, seed=11, num_workers=0)
    boxes = by_key(list(data.train_dataloader()))["000004"][1].boxes
    # The original's 4 to 20 of 40 is 20 to 36 when flipped; letterboxed by 43 / 40 and moved by 2.
    torch.testing.assert_close(boxes[0, 0::2], torch.tensor([20 * 43 / 40 + 2, 36 * 43 / 40 + 2]))


def test_evaluation_leads_back_to_the_original(data_of: DataOf, dataset: Path) -> None:
    data = data_of(dataset)
    keys = [key for batch in data.val_dataloader() for key in batch.keys]
    assert keys == [f"{number:06d}" for number in range(19, 24)]
    for batch in data.dataloader("test"):
        for target in batch.targets:
            # 40x30 into 48x32: the height decides, 32 / 30, and the width becomes 43, which leaves 2 on the left.
            assert target.placement == Placement(scale=(43 / 40, 32 / 30), offset=(2.0, 0.0))
            boxes = [[4, 3, 20, 15], [10, 10, 40, 30]][: target.image_id % 3]
            back = target.placement.to_original(target.boxes)
            torch.testing.assert_close(back, torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))


class Interrupted(Exception):
    pass


class Recorder(pl.LightningModule):
    """Records the keys of each step that was begun, with those of all its micro-batches."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.steps: list[list[str]] = []

    def training_step(self, batch: Batch, index: int) -> torch.Tensor:
        if batch.part.number == 0:
            self.steps.append([])
        self.steps[-1] += batch.keys
        return (self.weight * batch.images.float().mean()).sum()

    def validation_step(self, batch: Batch, index: int) -> None:
        pass

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.start = self.trainer.datamodule.realign(checkpoint)  # type: ignore[attr-defined]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # As a schedule does, which makes Lightning build the loader before it has read the checkpoint's loops.
        assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.SGD(self.parameters(), lr=0.01)


class SaveAndStop(pl.Callback):
    """Saves a checkpoint in ``hook`` once ``after`` steps are trained, and lets the training die there."""

    def __init__(self, path: Path, *, hook: str, after: int) -> None:
        def save(trainer: pl.Trainer, *_: object) -> None:
            if trainer.global_step >= after and not trainer.sanity_checking:
                trainer.save_checkpoint(path)
                raise Interrupted

        setattr(self, hook, save)


def fit(
    data: DetectionData, *, callbacks: list[pl.Callback] | None = None, resume: Path | None = None, **settings: Any
) -> list[list[str]]:
    model = Recorder()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks or [],
        accumulate_grad_batches=data.accumulate(1),
        **settings,
    )
    with suppress(Interrupted):
        trainer.fit(model, datamodule=data, ckpt_path=resume, weights_only=True)
    return model.steps


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_sees_each_epochs_order(
    data_of: DataOf, dataset: Path, num_workers: int, expected_steps: list[list[str]]
) -> None:
    assert fit(data_of(dataset, num_workers=num_workers)) == expected_steps


@pytest.mark.parametrize(
    ("hook", "after", "settings"),
    [
        *[("on_train_batch_end", after, {}) for after in (1, 4, 5, 7, 10)],
        ("on_train_epoch_end", 5, {}),
        ("on_train_epoch_end", 10, {"limit_val_batches": 0}),
        ("on_validation_end", 5, {}),
        ("on_validation_end", 8, {"val_check_interval": 3}),
    ],
)
def test_resumed_training_sees_just_the_next_keys(
    data_of: DataOf,
    dataset: Path,
    tmp_path: Path,
    hook: str,
    after: int,
    settings: dict[str, Any],
    expected_steps: list[list[str]],
) -> None:
    path = tmp_path / "last.ckpt"
    seen = fit(data_of(dataset), callbacks=[SaveAndStop(path, hook=hook, after=after)], **settings)
    seen += fit(data_of(dataset), resume=path, **settings)
    assert seen == expected_steps


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 6, 19, 30])
@pytest.mark.parametrize(
    ("hook", "after"),
    [("on_train_batch_end", 2), ("on_train_batch_end", 8), ("on_train_epoch_end", 5), ("on_before_backward", 8)],
)
def test_resumed_with_another_batch_size_every_image_is_still_seen_once_an_epoch(
    data_of: DataOf, dataset: Path, tmp_path: Path, hook: str, after: int, batch_size: int
) -> None:
    path = tmp_path / "last.ckpt"
    first = fit(data_of(dataset), callbacks=[SaveAndStop(path, hook=hook, after=after)])[:after]
    second = fit(data_of(dataset, batch_size=batch_size), resume=path)
    seen = [key for step in first + second for key in step]
    assert seen == [
        key for n in range(3) for key in order.keys(dataset, "train", seed=11, epoch=n, rank=0, world_size=1)
    ]
    # All steps but the first and the epochs' last are whole, and as many as an undisturbed training would have.
    whole = -(-19 // batch_size)
    before, inside = divmod(after, 5)
    assert len(second) == (3 - before) * whole - inside * 4 // batch_size


def test_epochs_done_are_counted_in_the_new_steps(data_of: DataOf, dataset: Path, tmp_path: Path) -> None:
    """19 images: 7 steps of 3. After 8 images of the second epoch the third step is the next, from its third image."""
    path = tmp_path / "last.ckpt"
    fit(data_of(dataset), callbacks=[SaveAndStop(path, hook="on_train_batch_end", after=7)])
    data = data_of(dataset, batch_size=3)
    checkpoint = torch.load(path, weights_only=True)
    assert data.realign(checkpoint) == 1 + Fraction(2, 7)
    current = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
    assert current["processed"] == 2


def test_resumed_with_loader_workers(
    data_of: DataOf, dataset: Path, tmp_path: Path, expected_steps: list[list[str]]
) -> None:
    path = tmp_path / "last.ckpt"
    callbacks: list[pl.Callback] = [SaveAndStop(path, hook="on_train_batch_end", after=7)]
    seen = fit(data_of(dataset, num_workers=2), callbacks=callbacks)
    seen += fit(data_of(dataset, num_workers=2), resume=path)
    assert seen == expected_steps


def test_checkpoint_within_a_step_repeats_that_step(
    data_of: DataOf, dataset: Path, tmp_path: Path, expected_steps: list[list[str]]
) -> None:
    path = tmp_path / "last.ckpt"
    seen = fit(data_of(dataset), callbacks=[SaveAndStop(path, hook="on_before_backward", after=6)])
    assert len(seen) == 7
    assert seen[:6] + fit(data_of(dataset), resume=path) == expected_steps


@pytest.mark.parametrize(("second_hook", "second"), [("on_train_epoch_end", 5), ("on_train_batch_end", 8)])
@pytest.mark.parametrize(
    ("hook", "first"), [("on_train_batch_end", 3), ("on_validation_end", 5), ("on_train_epoch_end", 5)]
)
def test_resumed_twice(
    data_of: DataOf,
    dataset: Path,
    tmp_path: Path,
    hook: str,
    first: int,
    second_hook: str,
    second: int,
    expected_steps: list[list[str]],
) -> None:
    paths = tmp_path / "first.ckpt", tmp_path / "second.ckpt"
    seen = fit(data_of(dataset), callbacks=[SaveAndStop(paths[0], hook=hook, after=first)])
    callbacks: list[pl.Callback] = [SaveAndStop(paths[1], hook=second_hook, after=second)]
    seen += fit(data_of(dataset), resume=paths[0], callbacks=callbacks)
    seen += fit(data_of(dataset), resume=paths[1])
    assert seen == expected_steps


def in_steps_of(global_batch: int, data: DetectionData) -> DetectionData:
    data.global_batch = global_batch
    return data


@pytest.mark.parametrize(("first", "second"), [(4, 1), (1, 4), (1, 3), (3, 2)])
@pytest.mark.parametrize(
    ("hook", "after"),
    [
        ("on_train_batch_end", 2),
        ("on_train_batch_end", 8),
        ("on_train_epoch_end", 5),
        ("on_validation_end", 5),
        ("on_before_backward", 6),
    ],
)
def test_resumed_with_other_micro_batches_training_sees_just_the_next_steps(
    data_of: DataOf,
    dataset: Path,
    tmp_path: Path,
    hook: str,
    after: int,
    first: int,
    second: int,
    expected_steps: list[list[str]],
) -> None:
    """As where workers come or go: the step stays what it is, in one, two or four parts."""
    path = tmp_path / "last.ckpt"
    callbacks: list[pl.Callback] = [SaveAndStop(path, hook=hook, after=after)]
    seen = fit(in_steps_of(4, data_of(dataset, batch_size=first)), callbacks=callbacks)[:after]
    seen += fit(in_steps_of(4, data_of(dataset, batch_size=second)), resume=path)
    assert seen == expected_steps


@pytest.mark.parametrize("micro_batch", [4, 2])
def test_resumed_behind_an_epoch_without_validation_the_next_one_begins(
    data_of: DataOf, dataset: Path, tmp_path: Path, micro_batch: int, expected_steps: list[list[str]]
) -> None:
    """Also where steps are counted: Lightning alone would train a batch more of the epoch that has ended."""
    path, rare = tmp_path / "last.ckpt", {"check_val_every_n_epoch": 100, "max_steps": len(expected_steps)}
    callbacks: list[pl.Callback] = [SaveAndStop(path, hook="on_train_epoch_end", after=5)]
    seen = fit(in_steps_of(4, data_of(dataset, batch_size=micro_batch)), callbacks=callbacks, **rare)
    seen += fit(in_steps_of(4, data_of(dataset, batch_size=micro_batch)), resume=path, **rare)
    assert seen == expected_steps


class SaveWithinAStep(pl.Callback):
    """Saves behind a micro-batch with which the optimizer has not stepped, ``steps`` after the first, and stops."""

    def __init__(self, path: Path, *, steps: int, part: int) -> None:
        self.path = path
        self.place = (steps, part)

    def on_train_batch_end(self, trainer: pl.Trainer, module: object, outputs: object, batch: Batch, idx: int) -> None:
        if (trainer.global_step, batch.part.number) == self.place:
            trainer.save_checkpoint(self.path)
            raise Interrupted


@pytest.mark.parametrize("second", [1, 2, 4])
@pytest.mark.parametrize(("steps", "part"), [(0, 1), (2, 2), (4, 0), (5, 0), (7, 1)])
def test_a_checkpoint_between_micro_batches_repeats_their_step(
    data_of: DataOf, dataset: Path, tmp_path: Path, expected_steps: list[list[str]], second: int, steps: int, part: int
) -> None:
    path = tmp_path / "last.ckpt"
    fit(in_steps_of(4, data_of(dataset, batch_size=1)), callbacks=[SaveWithinAStep(path, steps=steps, part=part)])
    assert fit(in_steps_of(4, data_of(dataset, batch_size=second)), resume=path) == expected_steps[steps:]


def test_lightnings_counters_are_put_to_the_first_micro_batch_of_the_step(
    data_of: DataOf, dataset: Path, tmp_path: Path
) -> None:
    """Two steps into the second epoch of five: eight batches done with one worker, four with two, two with five."""
    path = tmp_path / "last.ckpt"
    fit(
        in_steps_of(4, data_of(dataset, batch_size=1)),
        callbacks=[SaveAndStop(path, hook="on_train_batch_end", after=7)],
    )
    for world_size, batches in ((1, 8), (2, 4), (5, 2)):
        data = in_steps_of(4, data_of(dataset, batch_size=1))
        data.trainer = SimpleNamespace(world_size=world_size)  # type: ignore[assignment]
        checkpoint = torch.load(path, weights_only=True)
        assert data.realign(checkpoint) == 1 + Fraction(2, 5)
        current = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
        assert current["processed"] == batches


def test_a_trainer_that_accumulates_otherwise_is_refused(data_of: DataOf, dataset: Path) -> None:
    data = in_steps_of(4, data_of(dataset, batch_size=1))
    data.trainer = SimpleNamespace(world_size=2, accumulate_grad_batches=1, global_rank=0)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"need Trainer\(accumulate_grad_batches=2\) for this data, got 1"):
        data.train_dataloader()


def test_evaluation_takes_no_global_batch(data_of: DataOf, dataset: Path) -> None:
    """Five images, three at once."""
    data = in_steps_of(40, data_of(dataset, batch_size=3))
    assert [len(batch) for batch in data.val_dataloader()] == [3, 2]


def test_a_global_batch_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"need cluster\.global_batch >= 1, got 0"):
        DetectionData(root="nowhere", batch_size=1, global_batch=0, input_size=[32, 32], augment={}, seed=0)


def test_folder_without_a_dataset(data_of: DataOf, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no dataset folder"):
        data_of(tmp_path).train_dataloader()


def test_examples_are_as_stored(data_of: DataOf, dataset: Path) -> None:
    examples = data_of(dataset).examples("val", 2)
    assert [image_id for image_id, _ in examples] == [19, 20]
    assert [(pixels.shape, int(pixels.min()), int(pixels.max())) for _, pixels in examples] == [
        ((30, 40, 3), 152, 152),
        ((30, 40, 3), 160, 160),
    ]


def test_examples_do_without_what_is_broken(data_of: DataOf, dataset: Path, tmp_path: Path) -> None:
    """Shards of four and one: what the validation may skip must not end the training before it."""
    root = Path(shutil.copytree(dataset, tmp_path / "copy"))
    (root / "val-000000.tar").unlink()
    assert [image_id for image_id, _ in data_of(root).examples("val", 5)] == [23]


def test_workers_are_automatic() -> None:
    data = DetectionData(root="nowhere", batch_size=1, input_size=[32, 32], augment={}, seed=0)
    assert data.num_workers == 0 or torch.cuda.is_available()
