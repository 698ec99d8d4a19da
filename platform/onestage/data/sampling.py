"""A set's labels in little time: whole shards, evenly spread, until the time is up."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain, zip_longest
from typing import Final, NamedTuple

from onestage.data.contents import Contents, Entry
from onestage.data.faults import Unreadable
from onestage.data.manifest import Manifest, Shard
from onestage.data.shards import ShardReader
from onestage.data.truth import truth_of

LIMIT_S: Final = 2.0


class Sample(NamedTuple):
    """The labels of ``num_images`` out of ``of_images``; its ``contents`` have no pictures."""

    contents: Contents
    num_images: int
    of_images: int

    def __str__(self) -> str:
        whole = self.num_images == self.of_images
        return (
            f"{self.of_images:,} images" if whole else f"a sample of {self.num_images:,} of {self.of_images:,} images"
        )


def sample(
    manifest: Manifest, readers: Mapping[str, ShardReader], *, limit_s: float = LIMIT_S, most_shards: int | None = None
) -> Sample:
    """What ``readers`` of the splits can read within ``limit_s``, of at most ``most_shards`` each.

    Images that can't be read are left out: who goes through the whole set counts them.
    """
    end = time.monotonic() + limit_s
    shards = {name: manifest.split(name).shards for name in readers}
    splits: dict[str, list[Entry]] = {name: [] for name in readers}
    for name, shard in _in_turns(shards, most=most_shards):
        keys = shard.keys()
        for key in keys:
            if time.monotonic() > end:
                break
            with suppress(Unreadable):
                splits[name].append(_entry(readers[name], name, key, num_classes=len(manifest.classes)))
    contents = Contents(manifest.name, manifest.classes, splits, findings=[], packed=True)
    return Sample(
        contents,
        num_images=sum(map(len, splits.values())),
        of_images=sum(shard.num_samples for own in shards.values() for shard in own),
    )


def _in_turns(shards: Mapping[str, Sequence[Shard]], *, most: int | None) -> Iterator[tuple[str, Shard]]:
    """Each split's shards, at ``most`` so many, from all over the split; the splits take turns."""
    turns = [[(name, shard) for shard in _spread(own)[:most]] for name, own in shards.items()]
    return (one for one in chain.from_iterable(zip_longest(*turns)) if one is not None)


def _spread(shards: Sequence[Shard]) -> list[Shard]:
    """In an order of which each beginning lies evenly over all: by the reversed bits of their places."""
    bits = max(len(shards) - 1, 1).bit_length()
    order = sorted(range(len(shards)), key=lambda place: f"{place:0{bits}b}"[::-1])
    return [shards[place] for place in order]


def _entry(reader: ShardReader, split: str, key: str, *, num_classes: int) -> Entry:
    truth = truth_of(reader.read(key, members=("json",)), num_classes=num_classes, sized=True)
    width, height = truth.size
    return Entry(
        split=split,
        where=key,
        width=width,
        height=height,
        boxes=truth.boxes,
        labels=truth.labels,
        orientation=truth.orientation,
        content=lambda: b"",
    )
