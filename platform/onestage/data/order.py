"""Which images each rank reads, and when: a pure function of manifest, seed, epoch, rank and world size.

The global order knows nothing of ranks. Rank r takes every world_size-th image from the r-th on, so that the ranks'
k-th steps together are the k-th slice of the global order, however many ranks share it, and in however many
micro-batches each takes its share.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from onestage.data.manifest import Manifest, Split
from onestage.types import WHOLE, Part

WINDOW_SHARDS: Final = 8
"""Images are mixed within this many consecutive shards of the shuffled list, so that reading stays local."""


class Share(NamedTuple):
    """What one rank takes at once: its ``keys`` (maybe none), and the images of the whole step over all ranks.

    ``part`` says which micro-batch of its ``step`` it is.
    """

    keys: list[str]
    global_images: int
    step: int
    part: Part = WHOLE


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


def num_micro_batches(global_batch: int, *, batch_size: int, world_size: int) -> int:
    """In how many parts of at most ``batch_size`` images the largest of the ranks' shares of a step is taken.

    >>> [num_micro_batches(64, batch_size=8, world_size=world) for world in (8, 5, 3, 1)]
    [1, 2, 3, 8]
    """
    return -(-global_batch // (world_size * batch_size))


@dataclass(frozen=True, slots=True)
class Steps:
    """How ``num_samples`` images over all ranks fall into steps, and each rank's share of a step into micro-batches.

    A step is ``global_batch`` images, or ``batch_size`` of each rank where that is None; the epoch's last one takes
    what is left. All steps have as many micro-batches on all ranks, of at most ``batch_size`` images.
    """

    num_samples: int
    batch_size: int
    world_size: int
    global_batch: int | None = None

    @property
    def images(self) -> int:
        """Images of a whole step, over all ranks."""
        return self.global_batch or self.batch_size * self.world_size

    @property
    def num_parts(self) -> int:
        """Micro-batches of a step."""
        return num_micro_batches(self.images, batch_size=self.batch_size, world_size=self.world_size)

    def __len__(self) -> int:
        """Steps of an epoch, a short last one included.

        >>> len(Steps(num_samples=205, batch_size=8, world_size=2))
        13
        """
        return -(-self.num_samples // self.images)

    def shares(self, keys: list[str], *, rank: int, start: int = 0) -> list[Share]:
        """Cut one rank's ``keys`` into what it takes at once, in the order of steps; as many on every rank.

        Shares of a step differ by an image at most from rank to rank, and so do the parts of one share, the first being
        the larger: a part that is empty on a rank with the larger share is empty on all. Of the global order, ``start``
        images are trained already, maybe in a world of another size: they are left out, and the first step takes what
        is left of it.

        >>> steps = Steps(num_samples=5, batch_size=2, world_size=2)
        >>> [(share.keys, share.global_images) for share in steps.shares(["1", "3"], rank=1)]
        [(['1', '3'], 4), ([], 1)]
        >>> [(share.keys, share.global_images) for share in steps.shares(["1", "3"], rank=1, start=2)]
        [(['3'], 2), ([], 1)]
        """
        cut: list[Share] = []
        for step in range(start // self.images, len(self)):
            first, last = max(step * self.images, start), min((step + 1) * self.images, self.num_samples)
            # The rank's own keys are every world_size-th of the global order: how many of them lie before an image?
            mine = keys[slice(*(-(-(place - rank) // self.world_size) for place in (first, last)))]
            size, larger = divmod(len(mine), self.num_parts)
            for part in range(self.num_parts):
                begin = part * size + min(part, larger)
                end = begin + size + (part < larger)
                cut.append(Share(mine[begin:end], last - first, step, Part(part, self.num_parts)))
        return cut
