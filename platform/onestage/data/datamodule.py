"""The data of a training or an evaluation, as Lightning asks for it."""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from fractions import Fraction
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from onestage.data.colour import recoloured_batch
from onestage.data.faults import Unreadable
from onestage.data.images import Pixels
from onestage.data.input_sizes import InputSizes
from onestage.data.loader import Loader
from onestage.data.manifest import Manifest, key_of
from onestage.data.order import Steps, in_order, num_micro_batches
from onestage.data.samples import EvaluationBatch, TrainingBatch, decode
from onestage.data.sampling import Sample, sample
from onestage.data.shards import ShardReader
from onestage.data.store import Store, StoreSettings, open_store
from onestage.data.transforms import Augment, Transform, pixels_of
from onestage.errors import InputError
from onestage.types import Batch

GPU_WORKERS = 8
"""Loader workers that keep one GPU fed with augmented images; a CPU that trains needs its cores itself."""


class DetectionData(pl.LightningDataModule):
    """Loaders over the dataset at ``root``, a folder or an address.

    ``batch_size`` is per rank. Where ``global_batch`` is given, a step of the training is that many images over all
    ranks: a rank takes its share in micro-batches of at most ``batch_size``, for which the trainer has to accumulate as
    ``accumulate`` says. ``input_size`` is [H, W] in pixels, ``augment`` the transforms of training samples by name, in
    their order; one that is None is left out. ``input_sizes`` may give training batches another size.
    ``num_workers`` None means none without a GPU, else ``GPU_WORKERS``. ``max_skipped`` images of an epoch may turn out
    to be unreadable before who trains or evaluates should stop. Images are brought to the input's size as ``fit`` says,
    "letterbox" or "stretch". ``cache``, ``cache_gib``, ``timeout_s`` and ``retries`` are those of ``StoreSettings``.
    Rank and world size are the trainer's.
    """

    def __init__(
        self,
        *,
        root: str | Path | None,
        batch_size: int,
        input_size: Sequence[int],
        augment: Mapping[str, Transform | None],
        seed: int,
        global_batch: int | None = None,
        num_workers: int | None = None,
        input_sizes: InputSizes | None = None,
        max_skipped: int = 0,
        fit: str = "letterbox",
        cache: str | None = None,
        cache_gib: float = 50.0,
        timeout_s: float = 60.0,
        retries: int = 4,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"need data.batch_size >= 1, got {batch_size}")
        if global_batch is not None and global_batch < 1:
            raise ValueError(f"need cluster.global_batch >= 1, got {global_batch}")
        if max_skipped < 0:
            raise ValueError(f"need data.max_skipped >= 0, got {max_skipped}")
        if root is None:
            raise InputError("data.root is not set: give the dataset folder, data.root=FOLDER")
        self.root = root
        self.settings = StoreSettings(cache=cache, cache_gib=cache_gib, timeout_s=timeout_s, retries=retries)
        self.fit = fit
        self.batch_size = batch_size
        self.global_batch = global_batch
        self.input_size = tuple(input_size)
        self.input_sizes = input_sizes or InputSizes(size=input_size)
        self.augment = Augment(transforms=[one for one in augment.values() if one is not None])
        self.seed = seed
        self.max_skipped = max_skipped
        self._resumed: dict[str, int] | None = None
        self.num_workers = _automatic_workers() if num_workers is None else num_workers

    @cached_property
    def manifest(self) -> Manifest:
        """The dataset's manifest; ``InputError`` where ``root`` holds none."""
        return Manifest.load(self.root, settings=self.settings)

    def accumulate(self, world_size: int) -> int:
        """Micro-batches of a step with ``world_size`` ranks: the trainer's ``accumulate_grad_batches``."""
        if self.global_batch is None:
            return 1
        return num_micro_batches(self.global_batch, batch_size=self.batch_size, world_size=world_size)

    def train_dataloader(self) -> Loader:
        """Shuffled, augmented batches of "train"; ValueError where the trainer accumulates another number of them."""
        prepare = TrainingBatch(
            augment=self.augment,
            input_sizes=self.input_sizes,
            num_classes=len(self.manifest.classes),
            seed=self.seed,
            fit=self.fit,
        )
        loader = self._loader("train", prepare=prepare, seed=self.seed, global_batch=self.global_batch)
        if self._resumed is not None:
            loader.load_state_dict(self._resumed)
        if self.trainer is not None:
            parts, accumulated = self.accumulate(self._world_size), self.trainer.accumulate_grad_batches
            if parts != accumulated:
                raise ValueError(f"need Trainer(accumulate_grad_batches={parts}) for this data, got {accumulated}")
            loader.in_flight = partial(_in_flight, self.trainer)
        return loader

    def val_dataloader(self) -> Loader:
        """Batches of "val", as stored."""
        return self.dataloader("val")

    def test_dataloader(self) -> Loader:
        """Batches of "test", as stored."""
        return self.dataloader("test")

    def dataloader(self, split: str) -> Loader:
        """Batches of any split, as stored: nothing random."""
        prepare = EvaluationBatch(size=self.input_size, num_classes=len(self.manifest.classes), fit=self.fit)
        return self._loader(split, prepare=prepare, seed=None)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Colours that were left to the training device are changed there, for a batch at once."""
        if batch.colour is None or not len(batch):
            return batch
        return replace(batch, images=recoloured_batch(batch.images, batch.colour), colour=None)

    def examples(self, split: str, num_images: int) -> list[tuple[int, Pixels]]:
        """The first images of a split with their ids, as stored: (H, W, 3) RGB; fewer where some are broken."""
        keys = in_order(self.manifest, split, rank=0, world_size=1)[:num_images]
        return list(self._pictures(split, keys).items())

    def images(self, split: str, image_ids: Sequence[int]) -> dict[int, Pixels]:
        """The images of a split with these ids, as stored: (H, W, 3) RGB; broken ones are left out."""
        return self._pictures(split, [key_of(image_id) for image_id in image_ids])

    def _pictures(self, split: str, keys: Sequence[str]) -> dict[int, Pixels]:
        reader = self._reader(split)
        found = {}
        for key in keys:
            with suppress(Unreadable):  # whoever goes through the whole split counts it
                decoded = decode(reader.read(key), num_classes=len(self.manifest.classes))
                found[decoded["image_id"]] = pixels_of(decoded["image"])
        return found

    def labels(self) -> Sample:
        """What the labels are like, in two seconds; of a remote set one shard each of what a training reads."""
        splits = [split for split in self.manifest.splits if split in ("train", "val") or not self.is_remote]
        readers = {split: self._reader(split) for split in splits}
        return sample(self.manifest, readers, most_shards=1 if self.is_remote else None)

    @property
    def is_remote(self) -> bool:
        """Whether the dataset lies behind an address."""
        return self._store.is_remote

    def _loader(
        self,
        split: str,
        *,
        prepare: TrainingBatch | EvaluationBatch,
        seed: int | None,
        global_batch: int | None = None,
    ) -> Loader:
        return Loader(
            reader=self._reader(split),
            manifest=self.manifest,
            split=split,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            prepare=prepare,
            seed=seed,
            rank=0 if self.trainer is None else self.trainer.global_rank,
            world_size=self._world_size,
            global_batch=global_batch,
        )

    def realign(self, checkpoint: dict[str, Any]) -> Fraction:
        """Make a checkpoint count in the steps of this batch and world size, whatever it was taken with.

        The loader goes on at the very next image; what counts batches is put to the first of the step that this image
        lies in. Returns the epochs done in these steps.

        Lightning gives a loader its state only where nobody asked for the number of steps before, as schedules do.
        """
        loops = checkpoint["loops"]["fit_loop"]
        reached: dict[str, int] = loops["state_dict"]["combined_loader"][0]
        self._resumed = reached
        num_samples = self.manifest.split("train").num_samples
        steps = Steps(num_samples, self.batch_size, self._world_size, self.global_batch)
        ended = reached["images"] >= num_samples
        done = len(steps) if ended else reached["images"] // steps.images
        current = loops["epoch_loop.batch_progress"]["current"]
        shift = done * steps.num_parts - current["processed"]
        for name in current:
            current[name] += shift
        if ended:
            # As if the next epoch were about to begin. Lightning 2.6.6 would go through the end of the one that has
            # ended again, and where that had no validation, through a batch more.
            loops["epoch_loop.batch_progress"] |= {"current": dict.fromkeys(current, 0), "is_last_batch": False}
            for epochs in loops["epoch_progress"].values():
                epochs |= dict.fromkeys(epochs, epochs["ready"])
        return Fraction(reached["epoch"]) + Fraction(done, len(steps))

    @cached_property
    def _store(self) -> Store:
        """One for all readers: they share what they learn of its failures."""
        return open_store(self.root, settings=self.settings)

    def _reader(self, split: str) -> ShardReader:
        return ShardReader(self.root, split, manifest=self.manifest, store=self._store)

    @property
    def _world_size(self) -> int:
        return 1 if self.trainer is None else self.trainer.world_size


def _in_flight(trainer: pl.Trainer) -> int:
    """Batches that the trainer has taken but not trained yet: 1 within a step, 0 between steps."""
    progress = trainer.fit_loop.epoch_loop.batch_progress.state_dict()["current"]
    return int(progress["ready"] - progress["processed"])


def _automatic_workers() -> int:
    return min(GPU_WORKERS, os.cpu_count() or 1) if torch.cuda.is_available() else 0
