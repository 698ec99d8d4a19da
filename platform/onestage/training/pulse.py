"""Signs of life of a training: where it stands, since when, and from where it started."""

import socket
import threading
import time
from collections.abc import Callable
from typing import Any, TypedDict

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from onestage.training.module import DetectionModule


class Now(TypedDict):
    """Where a training stands: ``step`` steps are done, and since ``since`` (monotonic seconds) it is ``doing`` that.

    ``marks`` grows with any progress. ``place`` is the step and a count of what happened since, the same on all ranks
    that stand at the same point: a rank behind the others has the smaller one. ``warm``: this process has done a step.
    """

    marks: int
    step: int
    place: tuple[int, int]
    doing: str
    since: float
    warm: bool


class Pulse(Callback):
    """Marks the progress of the training in the thread that makes this: numbers and a time, never a look at a device.

    ``now`` may be asked from another thread.
    """

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self._first_step: int | None = None
        self._now = Now(marks=0, step=0, place=(0, 0), doing="setting up", since=time.monotonic(), warm=False)

    def now(self) -> Now:
        """Where the training stands at this moment."""
        return self._now

    def _mark(self, trainer: pl.Trainer, doing: str, *, common: bool = True) -> None:
        """``common`` marks come in the same number on all ranks; batches of a validation, for one, do not."""
        before, step = self._now, trainer.global_step
        count = before["place"][1] + common if step == before["step"] else 0
        # One assignment, so that the other thread never sees half of it.
        self._now = Now(
            marks=before["marks"] + 1,
            step=step,
            place=(step, count),
            doing=doing,
            since=time.monotonic(),
            warm=self._first_step is not None and step > self._first_step,
        )

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._mark(trainer, "setting up")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._first_step = trainer.global_step
        self._mark(trainer, "starting")

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._mark(trainer, f"waiting for data of step {trainer.global_step + 1}")

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._mark(trainer, f"forward of step {trainer.global_step + 1}")

    def on_before_backward(self, trainer: pl.Trainer, *_: Any) -> None:
        self._mark(trainer, f"all-reduce/backward of step {trainer.global_step + 1}")

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._mark(trainer, f"update of step {trainer.global_step + 1}")

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._mark(trainer, f"waiting for data of step {trainer.global_step + 1}")

    def on_save_checkpoint(self, trainer: pl.Trainer, *_: Any) -> None:
        # Nothing tells when it is written: what comes next is in the words.
        step = trainer.global_step
        self._mark(trainer, f"checkpoint of step {step}, then waiting for data of step {step + 1}", common=False)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._mark(trainer, "validation, waiting for data of its batch 1")

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._mark(trainer, f"validation, batch {batch_idx + 1}", common=False)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._mark(trainer, f"validation, waiting for data of its batch {batch_idx + 2}", common=False)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._mark(trainer, "scores of the validation")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._mark(trainer, "end of the validation")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._mark(trainer, f"end of epoch {trainer.current_epoch + 1}")

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._mark(trainer, "ending")

    def on_exception(self, trainer: pl.Trainer, *_: Any) -> None:
        self._mark(trainer, "ending after an error", common=False)


class Start(Callback):
    """Tells ``sink`` from which step this rank trains, as ``{"started": ...}``: ``cluster.board.StartedMessage``.

    ``batch_size`` is per rank; ``global_batch`` the images of a step over all ranks, None where that is their sum.
    ``host`` is what people call this machine, None for its own name.
    """

    def __init__(
        self,
        sink: Callable[[dict[str, Any]], None],
        *,
        batch_size: int,
        global_batch: int | None,
        host: str | None = None,
    ) -> None:
        self.sink = sink
        self.host = host or socket.gethostname()
        self.batch_size = batch_size
        self.global_batch = global_batch

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, DetectionModule)
        start = {
            "rank": trainer.global_rank,
            "host": self.host,
            "world_size": trainer.world_size,
            "global_batch": self.global_batch or self.batch_size * trainer.world_size,
            "step": trainer.global_step,
            "images": pl_module.images_seen,
        }
        self.sink({"started": start})
