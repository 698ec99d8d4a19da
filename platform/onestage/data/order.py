"""Which images each rank reads, and when: a pure function of manifest, seed, epoch, rank and world size.

The global order knows nothing of ranks. Rank r takes every world_size-th image from the r-th on, so that the ranks'
k-th batches together are the k-th batch of the global order, however many ranks share it.
"""

from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from onestage.data.manifest import Manifest, Split

WINDOW_SHARDS: Final = 8
"""Images are mixed within this many consecutive shards of the shuffled list, so that reading stays local."""


class Share(NamedTuple):
    """One rank's part of one step: its ``keys`` (maybe none), and the images of the step over all ranks."""

    keys: list[str]
    global_images: int


def keys(root: Path | str, split: str, *, seed: int, epoch: int, rank: int, world_size: int) -> list[str]:
    """The keys that ``rank`` trains on in ``epoch``, in order, for the dataset folder ``root``."""
    manifest = Manifest.load(root)
    return shuffled(manifest, split, seed=seed, epoch=epoch, rank=rank, world_size=world_size)


def shuffled(manifest: Manifest, split: str, *, seed: int, epoch: int, rank: int, world_size: int) -> list[str]:
    """The same for a manifest at hand: shards are shuffled, then images within windows of shards."""
    generator = np.random.default_rng([seed, epoch])
    shards = manifest.split(split).shards
    shards = tuple(shards[index] for index in generator.permutation(len(shards)))
    order: list[str] = []
    for start in range(0, len(shards), WINDOW_SHARDS):
        window = Split(shards[start : start + WINDOW_SHARDS]).keys()
        order += [window[index] for index in generator.permutation(len(window))]
    return order[rank::world_size]


def in_order(manifest: Manifest, split: str, *, rank: int, world_size: int) -> list[str]:
    """The keys that ``rank`` evaluates: every world_size-th as stored."""
    return manifest.split(split).keys()[rank::world_size]


def shares(
    keys: list[str], *, num_samples: int, batch_size: int, rank: int, world_size: int, start: int = 0
) -> dict[int, Share]:
    """Cut one rank's ``keys`` into its shares of each step, by the step's number; the same steps on every rank.

    ``num_samples`` counts the split's images over all ranks, ``batch_size`` is per rank. Shares of a step differ by an
    image at most, and only in the last one; there a share may be empty. Of the global order, ``start`` images are
    trained already, maybe in a world of another size: they are left out, and the first step takes what is left of it.

    >>> shares(["1", "3"], num_samples=5, batch_size=2, rank=1, world_size=2)
    {0: Share(keys=['1', '3'], global_images=4), 1: Share(keys=[], global_images=1)}
    >>> shares(["1", "3"], num_samples=5, batch_size=2, rank=1, world_size=2, start=2)
    {0: Share(keys=['3'], global_images=2), 1: Share(keys=[], global_images=1)}
    """
    global_batch = batch_size * world_size
    cut: dict[int, Share] = {}
    for step in range(start // global_batch, num_steps(num_samples, batch_size=batch_size, world_size=world_size)):
        first, last = max(step * global_batch, start), min((step + 1) * global_batch, num_samples)
        # The rank's own keys are every world_size-th of the global order: how many of them lie before an image?
        mine = slice(*(-(-(place - rank) // world_size) for place in (first, last)))
        cut[step] = Share(keys[mine], last - first)
    return cut


def num_steps(num_samples: int, *, batch_size: int, world_size: int) -> int:
    """Steps of an epoch, a short last one included.

    >>> num_steps(205, batch_size=8, world_size=2)
    13
    """
    return -(-num_samples // (batch_size * world_size))
