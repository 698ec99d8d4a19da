"""Images that a training has to do without, made known to people."""

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from onestage.training.module import DetectionModule


class Skips(Callback):
    """Names the images that could not be read: all of them, each time, in ``file``; each once to ``sink``."""

    def __init__(self, file: Path, *, sink: Callable[[dict[str, Any]], None]) -> None:
        self.file = file
        self.sink = sink
        self.told: set[str] = set()

    def _tell(self, module: DetectionModule) -> None:
        skipped, module.skipped = module.skipped, []
        if not skipped:
            return
        with self.file.open("a", encoding="utf-8") as file:
            file.writelines(f"{datetime.now():%Y-%m-%d %H:%M:%S} {one.key}: {one.why}\n" for one in skipped)
        new = [one for one in skipped if one.key not in self.told]
        self.told.update(one.key for one in new)
        if new:
            self.sink({"skipped": [f"{one.key}: {one.why}" for one in new], "file": str(self.file)})

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, DetectionModule)
        self._tell(pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, DetectionModule)
        self._tell(pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        assert isinstance(pl_module, DetectionModule)
        self._tell(pl_module)
