"""What goes along with a training: averaged weights, timing, progress and pictures."""

import collections
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, WeightAveraging
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor

from onestage.drawing import draw, side_by_side
from onestage.training.endings import Stopped
from onestage.training.module import DetectionModule, Found
from onestage.types import Batch

COLUMNS: Final = 4
"""Images in a row of a sheet."""
NUM_BATCHES: Final = 3


class Ema(WeightAveraging):
    """Exponential moving average of the weights, which is what is validated and saved.

    The decay grows to its value as (1 + n) / (10 + n) over the n updates, so that a short training does not evaluate
    its first, random weights.
    """

    def __init__(self, *, decay: float) -> None:
        super().__init__(multi_avg_fn=self._update)
        self.decay = decay

    @torch.no_grad()
    def _update(self, averaged: list[Tensor], current: list[Tensor], num_averaged: Tensor) -> None:
        if averaged[0].is_floating_point():
            n = int(num_averaged)
            torch._foreach_lerp_(averaged, current, 1 - min(self.decay, (1 + n) / (10 + n)))
        else:  # counters, such as the images seen
            torch._foreach_copy_(averaged, current)


class StopWhenAsked(Callback):
    """Where ``asked`` says so on any rank, all of them stop behind the same step: ``save`` a checkpoint, then Stopped.

    Behind an epoch's last step that is before its validation, which may be long and is left out; where none is due,
    after the epoch's own checkpoint: goes behind the callback that saves it.
    """

    def __init__(self, asked: Callable[[], bool], *, save: Callable[[pl.Trainer], None]) -> None:
        self.asked = asked
        self.save = save
        self._saved = False

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, DetectionModule)
        if self._saved:
            self._stop(trainer)
        pl_module.stop_asked = self.asked()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, DetectionModule)
        if batch.ends_step and pl_module.stop_agreed and not trainer.is_last_batch:
            self.save(trainer)
            self._saved = True  # and stop when Lightning has logged this step, as it does behind this

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end_epoch(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end_epoch(trainer, pl_module)

    def _end_epoch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, DetectionModule)
        if pl_module.stop_agreed:
            self.save(trainer)
            self._stop(trainer)

    def _stop(self, trainer: pl.Trainer) -> None:
        raise Stopped(f"stopped at step {trainer.global_step}, checkpoint saved")


class Throughput(Callback):
    """Logs images per second over all ranks, the share of time that a step waited for its batch, and GPU memory."""

    def __init__(self) -> None:
        self.began = self.ended = time.perf_counter()  # of a step, and of the batch before
        self.waited = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.began = self.ended = time.perf_counter()
        self.waited = 0.0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        self.waited += time.perf_counter() - self.ended

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self.ended = time.perf_counter()
        if not batch.ends_step:
            return
        took = self.ended - self.began
        speeds = {
            "perf/images_per_s": batch.step_images(trainer.world_size) / took,
            "perf/data_wait": self.waited / took,
        }
        if pl_module.device.type == "cuda":  # the most of this rank until now, without what the allocator holds spare
            speeds["perf/gpu_memory_mb"] = torch.cuda.max_memory_allocated(pl_module.device) / 1e6
        pl_module.log_dict(speeds, batch_size=1)
        self.began, self.waited = self.ended, 0.0


class Progress(Callback):
    """Tells ``sink`` where the training stands: after every step, at most twice a second, and after validation,
    then with all its numbers.
    """

    def __init__(self, sink: Callable[[dict[str, Any]], None]) -> None:
        self.sink = sink
        self.told = 0.0
        self.num_steps = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Asked once and by every rank: it may wait for the others.
        self.num_steps = int(trainer.estimated_stepping_batches)

    def _tell(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, DetectionModule)
        self.told = time.perf_counter()
        metrics = trainer.callback_metrics
        shown = ("train/loss", "perf/images_per_s", "val/map", "val/map_50")
        self.sink(
            {
                "epoch": trainer.current_epoch,
                "num_epochs": trainer.max_epochs,
                "step": trainer.global_step,
                "num_steps": self.num_steps,
                "images": module.images_seen,
                **{name: float(metrics[name]) for name in shown if name in metrics},
            }
        )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if trainer.is_global_zero and batch.ends_step and time.perf_counter() - self.told > 0.5:
            self._tell(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self._tell(trainer, pl_module)
            metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(("val/", "best/"))}
            # Of a training that had ended before, the epochs are counted already.
            epochs = trainer.current_epoch + (trainer.state.fn == TrainerFn.FITTING)
            self.sink({"validated": {"epoch": epochs, "step": trainer.global_step, "metrics": metrics}})


class Pictures(Callback):
    """Draws the same few validation images after each validation, truth on the left and prediction on the right."""

    def __init__(
        self,
        images: Sequence[tuple[int, np.ndarray]],
        *,
        classes: Sequence[str],
        sink: Callable[[str, np.ndarray, int], None],
        threshold: float = 0.25,
    ) -> None:
        self.images = dict(images)
        self.classes = classes
        self.sink = sink
        self.threshold = threshold

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, DetectionModule)
        if not trainer.is_global_zero:
            return
        for one in pl_module.found:
            if one.image_id in self.images:
                image = self.images[one.image_id]
                truth = draw(image, one.target.boxes, one.target.labels, classes=self.classes)
                sure = one.detections.scores >= self.threshold
                guess = draw(
                    image,
                    one.detections.boxes[sure],
                    one.detections.labels[sure],
                    scores=one.detections.scores[sure],
                    classes=self.classes,
                )
                self.sink(f"val/image_{one.image_id:06d}", side_by_side(truth, guess), trainer.global_step)


class BestFound(Callback):
    """Keeps on rank 0 what the best validation ``found``, and its ``step`` and ``metrics``.

    A resume that finds no better one than the training before it has its newest. None where there was none.
    """

    def __init__(self) -> None:
        self.found: Sequence[Found] | None = None
        self.metrics: dict[str, float] = {}
        self.step = 0
        self.is_best = False

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, DetectionModule)
        best = "best/map" in pl_module.metrics
        if trainer.is_global_zero and (best or not self.is_best):
            self.found, self.metrics = pl_module.found, pl_module.metrics
            self.step, self.is_best = trainer.global_step, best


class ClassTable(Callback):
    """Gives ``sink`` the AP of every class at each validation that is the best so far: one row each, in their order.

    A class without truths has none; ``truths`` counts those of the split.
    """

    def __init__(self, *, classes: Sequence[str], sink: Callable[[list[dict[str, Any]]], None]) -> None:
        self.classes = classes
        self.sink = sink

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, DetectionModule)
        if not trainer.is_global_zero or "best/map" not in pl_module.metrics:
            return
        counts = collections.Counter(label for one in pl_module.found for label in one.target.labels.tolist())
        aps = [pl_module.metrics.get(f"val/ap/{name}") for name in self.classes]
        self.sink(
            [
                {"class": name, "AP": ap if ap is None else round(ap, 5), "truths": counts[label]}
                for label, (name, ap) in enumerate(zip(self.classes, aps, strict=True))
            ]
        )


class BatchPictures(Callback):
    """Draws the first ``NUM_BATCHES`` that a run trains on, augmented as they are, with their boxes: a sheet of each.

    At most ``num_images`` of rank 0's share, ``COLUMNS`` in a row. A resumed run has had its pictures. Nothing is drawn
    from any generator, and the batches are only looked at: the training is the same to the bit.
    """

    def __init__(
        self, *, classes: Sequence[str], sink: Callable[[str, np.ndarray, int], None], num_images: int = 8
    ) -> None:
        self.classes = classes
        self.sink = sink
        self.num_images = num_images
        self.num_drawn = NUM_BATCHES

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero and trainer.global_step == 0 and self.num_images > 0:
            self.num_drawn = 0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        if self.num_drawn == NUM_BATCHES or len(batch) == 0:  # a share may be empty, where no image could be read
            return
        self.sink("train/batch", sheet(batch, num_images=self.num_images, classes=self.classes), self.num_drawn)
        self.num_drawn += 1


def sheet(batch: Batch, *, num_images: int, classes: Sequence[str]) -> np.ndarray:
    """The first images of a batch with their boxes, row by row; what a short last row leaves is white."""
    images = batch.images[:num_images].detach().cpu()
    pixels = images if images.dtype == torch.uint8 else (images.float() * 255).round().clamp(0, 255).to(torch.uint8)
    drawn = [
        draw(image, target.boxes.cpu(), target.labels.cpu(), classes=classes)
        for image, target in zip(pixels.permute(0, 2, 3, 1).numpy(), batch.targets[:num_images], strict=True)
    ]
    columns = min(len(drawn), COLUMNS)
    drawn += [np.full_like(drawn[0], 255)] * (-len(drawn) % columns)
    rows = [functools.reduce(side_by_side, drawn[start : start + columns]) for start in range(0, len(drawn), columns)]
    line = np.full((4, rows[0].shape[1], 3), 255, np.uint8)
    return np.concatenate([part for row in rows for part in (row, line)][:-1])
