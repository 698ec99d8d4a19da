"""Checkpoints: copied between two steps, written beside the training, and whole or not there at all."""

import copy
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch import Tensor

from onestage.errors import InputError
from onestage.training.checkpoint_files import BEST, LAST, Say, damage, kept_name, kept_steps, names_in, step_of
from onestage.types import Batch

WRITE_LIMIT_S: Final = 300.0
"""So long a write may take before the training goes on without it: less than ranks wait for each other."""
NICENESS: Final = 10


class Snapshot:
    """A copy of a state in CPU memory; ``take`` uses the memory of the one before again."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}
        self._buffers: list[Tensor] = []
        self._used = 0

    def take(self, state: Mapping[str, Any]) -> None:
        """Copies all of ``state``: what changes there later does not change here."""
        self._used = 0
        self.state = self._copied(state)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # copies into pinned memory run beside the program

    def _copied(self, node: Any) -> Any:
        if isinstance(node, Tensor):
            return self._kept(node.detach())
        if isinstance(node, dict):
            same = copy.copy(node)  # its kind, with what a state dict knows of its modules' versions
            same.update({key: self._copied(value) for key, value in node.items()})
            return same
        if type(node) in (list, tuple):
            return type(node)(self._copied(value) for value in node)
        return copy.deepcopy(node)

    def _kept(self, tensor: Tensor) -> Tensor:
        if self._used == len(self._buffers):
            self._buffers.append(torch.empty(0))
        buffer = self._buffers[self._used]
        if (buffer.shape, buffer.dtype, buffer.stride()) != (tensor.shape, tensor.dtype, tensor.stride()):
            buffer = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self._buffers[self._used] = buffer
        self._used += 1
        return buffer.copy_(tensor, non_blocking=tensor.is_cuda)


class Writer(TorchCheckpointIO):
    """Writes what Lightning saves, in a thread of its own: at most one checkpoint at a time.

    A file gets its name only when it is on the disk and its checksums have been read back. ``keep`` counts
    ``last.ckpt`` and those before it. In that thread, ``send`` is called after each, and behind it ``written`` with
    the step. What goes wrong is in ``notes``: it never ends a training, and what was written before stays as it was.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        send: Callable[[], None] = lambda: None,
        written: Callable[[int], None] = lambda step: None,
    ) -> None:
        super().__init__()
        self.folder = folder
        self.keep = keep
        self.send = send
        self.written = written
        self.notes: list[str] = []
        self.failed: str | None = None
        self.timings: list[tuple[float, float]] = []  # seconds of each copy and of its write
        self._snapshot = Snapshot()
        self._best = False
        self._left_out = False  # the newest checkpoint, behind a write that did not end
        self._last_step: int | None = None  # of last.ckpt, once it is known
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._thread is not None and self._thread.is_alive()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Copies ``checkpoint`` and begins to write it; waits for the one before.

        ``storage_options={"best": True}`` makes it ``best.ckpt`` as well.
        """
        self._left_out = not self.wait()
        if self._left_out:
            self.notes.append(
                f"checkpoint of step {checkpoint['global_step']} left out: {self.folder} has not taken the one before "
                f"in {WRITE_LIMIT_S:g} s"
            )
            return
        started = time.perf_counter()
        self._snapshot.take(checkpoint)
        self._best = bool((storage_options or {}).get("best"))
        self.failed = None
        copied_s = time.perf_counter() - started
        self._thread = threading.Thread(target=self._run, args=[copied_s], name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> bool:
        """Waits for the write under way, for ``WRITE_LIMIT_S``; whether there is none now."""
        if self._thread is not None:
            self._thread.join(WRITE_LIMIT_S)
        return not self.busy

    def finish(self) -> None:
        """Waits for the write under way, and tries one that failed again. Raises InputError where that fails too."""
        done = self.wait()
        if done and self.failed is not None:
            self._run(0.0)
        if not done or self.failed is not None or self._left_out:
            why = self.failed or f"no answer in {WRITE_LIMIT_S:g} s"
            raise InputError(
                f"the last checkpoint could not be written to {self.folder} ({why}): "
                f"make room or mend the disk, then go on with resume={self.folder.parent.name}"
            )

    def _run(self, copied_s: float) -> None:
        if threading.current_thread() is self._thread:  # Linux knows a niceness of each thread
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        started = time.perf_counter()
        step = int(self._snapshot.state["global_step"])
        try:
            self._write(step)
            self.send()
            self.written(step)
            self.failed = None
        except Exception as error:  # torch and stores raise errors of many kinds; none may end the training
            self.failed = _why(error)
            self.notes.append(f"checkpoint of step {step} not written to {self.folder} ({self.failed}): going on")
        self.timings.append((copied_s, time.perf_counter() - started))

    def _write(self, step: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        last = self.folder / LAST
        for left in self.folder.glob(".*.partial"):  # by a process that was killed
            left.unlink(missing_ok=True)
        partial = self.folder / f".{uuid4().hex}.partial"
        try:
            with partial.open("wb") as file:
                torch.save(self._snapshot.state, file)
                file.flush()
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # to read the disk, not its cache
            if (why := damage(partial)) is not None:
                raise OSError(0, f"read back, {why}")
            self._keep_last(last)
            if self._best:  # first: a training that goes on from the new last one would not save it again
                _link(partial, self.folder / BEST)
            partial.replace(last)
        finally:
            partial.unlink(missing_ok=True)
        self._last_step = step
        for old in kept_steps(names_in(self.folder))[max(self.keep - 1, 0) :]:
            (self.folder / kept_name(old)).unlink(missing_ok=True)
        _sync(self.folder)

    def _keep_last(self, last: Path) -> None:
        """Gives ``last.ckpt`` its second name, under which it stays when the new one takes its first."""
        if self.keep < 2 or not last.is_file():
            return
        if self._last_step is None:  # of a process before this one
            if damage(last) is not None:
                return
            self._last_step = step_of(last)
        _link(last, self.folder / kept_name(self._last_step))


def _link(path: Path, name: Path) -> None:
    """``name`` becomes the content of ``path`` in one step; a copy where the file system has no links."""
    partial = name.with_name(f".{uuid4().hex}.partial")
    try:
        os.link(path, partial)
    except OSError:
        shutil.copyfile(path, partial)
        _sync(partial)
        if (why := damage(partial)) is not None:
            raise OSError(0, f"copied to {name.name}, {why}") from None
    # Of two names for the same file, a rename would leave both.
    if name.exists() and name.samefile(partial):
        partial.unlink()
    else:
        partial.replace(name)


def _sync(path: Path) -> None:
    """Makes a file's content, or a folder's names, last through a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _why(error: BaseException) -> str:
    """In a few words; torch hides the system's error behind one of its own."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return next(iter(str(error).splitlines()), "") or type(error).__name__


class Checkpoints(Callback):
    """Saves after every epoch, and within it so often that at most ``every_steps`` and ``every_minutes`` are lost.

    To that comes the time of a write: while one is under way, none begins within an epoch. ``best.ckpt`` is that of the
    highest val/map. ``say`` gets what goes wrong, a line each. Goes behind all callbacks that change what is saved.
    """

    def __init__(self, writer: Writer, *, every_steps: int | None, every_minutes: float | None, say: Say) -> None:
        self.writer = writer
        self.every_steps = every_steps
        self.every_s = every_minutes * 60 if every_minutes else None
        self.say = say
        self.best = -float("inf")
        self._score: float | None = None  # of a validation since the last save
        self._best_before = self.best
        self._saved_step = 0
        self._saved_at = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = self._best_before = float(state_dict["best"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._saved_step, self._saved_at = trainer.global_step, time.monotonic()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        # Behind a resume from an epoch's end Lightning 2.6.6 would log each step under the number of the next.
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        # Behind an epoch's last step Lightning 2.6.6 counts an epoch too few: a second resume would repeat batches.
        if trainer.is_last_batch or not batch.ends_step:
            return
        due = bool(self.every_steps) and trainer.global_step - self._saved_step >= (self.every_steps or 0)
        if due or self.every_s is not None:
            due = due or (self.every_s is not None and time.monotonic() - self._saved_at >= self.every_s)
            # Clocks differ, and rank 0 alone writes: it decides.
            if trainer.strategy.broadcast(due and not self.writer.busy):
                self._save(trainer)
        self._tell()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        score = trainer.callback_metrics.get("val/map")
        self._score = None if score is None else float(score)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == 0:
            return
        self.writer.wait()
        if self.writer.failed is not None:
            self.best = self._best_before
        # That of rank 0, where alone is known what was written.
        best = bool(trainer.strategy.broadcast(self._score is not None and self._score > self.best))
        self._best_before = self.best
        if best and self._score is not None:
            self.best = self._score
        self._save(trainer, best=best)
        self._score = None
        self._tell()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        try:
            self.writer.finish()
        finally:
            self._tell()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.writer.wait()
        self._tell()

    def save_now(self, trainer: pl.Trainer) -> None:
        """Saves, and waits until it is written; on all ranks at the same step. Raises InputError where it can't be."""
        if self._saved_step != trainer.global_step:
            self._save(trainer)
        try:
            self.writer.finish()
        finally:
            self._tell()

    def _save(self, trainer: pl.Trainer, *, best: bool = False) -> None:
        trainer.save_checkpoint(self.writer.folder / LAST, weights_only=False, storage_options={"best": best})
        self._saved_step, self._saved_at = trainer.global_step, time.monotonic()

    def _tell(self) -> None:
        """In the training's own thread: what people read is not made for several."""
        while self.writer.notes:
            self.say(self.writer.notes.pop(0))
