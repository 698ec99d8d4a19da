"""Batches of one split in an exact order, that can stop at any step and go on from there."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Final

import cv2
import torch
import webdataset as wds
from torch.utils.data import DataLoader, get_worker_info

from onestage.data.faults import Unreadable
from onestage.data.manifest import Manifest
from onestage.data.order import Share, Steps, in_order, shuffled
from onestage.data.samples import Prepare, RawShare
from onestage.data.shards import ShardReader
from onestage.errors import InputError
from onestage.types import Batch, Skipped


class Loader:
    """Iterates over one epoch's batches of this rank: shuffled by ``seed``, or as stored where it is None.

    ``batch_size`` is per rank; every rank has the same number of batches. Where ``global_batch`` is given, a step has
    that many images over all ranks, and a rank's share of it comes as several batches of at most ``batch_size``.
    ``state_dict`` says how far training has come in images, of whole steps, so that another batch size or world size
    goes on at the very next one: it keeps its own steps, and only finishes first the one that this image lies in.
    ``in_flight`` tells how many of the batches handed out are not trained yet.
    """

    def __init__(
        self,
        *,
        reader: ShardReader,
        manifest: Manifest,
        split: str,
        batch_size: int,
        num_workers: int,
        prepare: Prepare,
        seed: int | None,
        rank: int = 0,
        world_size: int = 1,
        global_batch: int | None = None,
        in_flight: Callable[[], int] = lambda: 0,
    ) -> None:
        self.reader = reader
        self.manifest = manifest
        self.split = split
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.prepare = prepare
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.global_batch = global_batch
        self.in_flight = in_flight
        self._next = (0, 0)  # epoch and image at which the next iteration starts
        # Of the running iteration: its epoch, the image it started at, and the batches of the epoch up to what it
        # handed out last.
        self._reached: tuple[int, int, int] | None = None

    batch_sampler: Final = None  # Lightning reads it beside ``sampler``

    @property
    def num_samples(self) -> int:
        """Images of the split, over all ranks."""
        return self.manifest.split(self.split).num_samples

    @property
    def sampler(self) -> "Loader":
        """Lightning calls ``set_epoch`` on a loader's sampler before each epoch; here that is the loader itself."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is over ``epoch``."""
        self._next = (epoch, self._next[1])

    @property
    def steps(self) -> Steps:
        """How the split falls into steps and batches."""
        return Steps(self.num_samples, self.batch_size, self.world_size, self.global_batch)

    def start_at(self, image: int) -> None:
        """The next iteration, and only that, leaves out the first ``image`` images of the global order."""
        self._next = (self._next[0], image)

    def __len__(self) -> int:
        """Batches of a whole epoch, wherever the next iteration starts."""
        return len(self.steps) * self.steps.num_parts

    def __iter__(self) -> Iterator[Batch]:
        # A generator, so that this is read with the first batch: Lightning asks for the iterator of a fit's first epoch
        # before it says which epoch that is.
        epoch, image = self._next
        self._next = (epoch, 0)
        before = image // self.steps.images * self.steps.num_parts
        self._reached = (epoch, image, before)
        pipeline = wds.DataPipeline(
            partial(_read, self.reader, self._shares(epoch, start=image)),
            wds.map(partial(_on_one_thread, self.prepare, epoch=epoch)),
            _hand_over_errors,
        )
        loader = DataLoader(
            pipeline,
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_one_thread_of_opencv,
            # Its own generator: the model's random numbers must not depend on how often a loader was started.
            generator=torch.Generator(),
        )
        for done, item in enumerate(loader, start=before + 1):
            if isinstance(item, InputError):
                raise item
            self._reached = (epoch, image, done)
            yield item

    def _shares(self, epoch: int, *, start: int) -> list[Share]:
        ranks = {"rank": self.rank, "world_size": self.world_size}
        if self.seed is None:
            keys = in_order(self.manifest, self.split, **ranks)
        else:
            keys = shuffled(self.manifest, self.split, seed=self.seed, epoch=epoch, **ranks)
        return self.steps.shares(keys, rank=self.rank, start=start)

    def state_dict(self) -> dict[str, int]:
        """What has been trained, the same on every rank: ``epoch``, and its ``images`` over all ranks."""
        epoch, images = self._next
        if self._reached is not None:
            epoch, started, done = self._reached
            # A step that was begun in its middle, and isn't trained, starts before what was trained already.
            # Neither is a step of which only some micro-batches have been taken: the optimizer has not stepped.
            trained = (done - self.in_flight()) // self.steps.num_parts
            images = max(started, min(trained * self.steps.images, self.num_samples))
        return {"epoch": epoch, "images": images}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on behind what ``state`` says has been trained; after an epoch's last image, with the next epoch."""
        done = state["images"] >= self.num_samples
        self._next = (state["epoch"] + 1, 0) if done else (state["epoch"], state["images"])
        self._reached = None


def _read(reader: ShardReader, shares: Sequence[Share]) -> Iterator[RawShare]:
    """The raw samples of every W-th share in loader worker w of W.

    DataLoader asks the workers in turn, so that the batches come in order.
    """
    worker = get_worker_info()
    first, every = (0, 1) if worker is None else (worker.id, worker.num_workers)
    mine = list(islice(shares, first, None, every))
    reader.expect([key for share in mine for key in share.keys])
    for share in mine:
        raws, skipped = [], []
        for key in share.keys:
            try:
                raws.append(reader.read(key))
            except Unreadable as error:
                skipped.append(Skipped(key, str(error)))
        yield RawShare(raws, share.step, share.global_images, skipped, share.part)


def _hand_over_errors(batches: Iterator[Batch]) -> Iterator[Batch | InputError]:
    """An error raised in a loader worker arrives wrapped in its traceback; one that is handed over stays one line."""
    try:
        yield from batches
    except InputError as error:
        yield error


def _on_one_thread(prepare: Prepare, share: RawShare, *, epoch: int) -> Batch:
    """What ``prepare`` makes of ``share``, with torch's threads held back meanwhile.

    An image is too small to share: where no core is free, threads that wait for each other made it take four times as
    long. In the training process torch gets its threads back for the model.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return prepare(share, epoch=epoch)
    finally:
        torch.set_num_threads(num_threads)


def _one_thread_of_opencv(worker: int) -> None:
    # Workers are the parallelism: threads of each would only fight for the same cores. Torch sees to its own.
    cv2.setNumThreads(0)
