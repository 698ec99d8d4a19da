"""Train, val and test out of one set: each with its share of every class.

Iterative stratification (Sechidis et al., On the Stratification of Multi-Label Data, ECML PKDD 2011, alg. 1): images
of the rarest class are dealt out first, each to the split that lacks that class most.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from onestage.data.formats.record import Record, Source
from onestage.data.threads import in_threads
from onestage.errors import InputError

NUM_THREADS: Final = 8
IMAGES_PER_TASK: Final = 16
NO_BOXES: Final = -1
"""The class of images that have none: they are dealt out evenly as well."""


@dataclass(frozen=True, slots=True)
class _Group:
    """Images of the same bytes, which must not come apart: how many, and how many of them have each class."""

    digest: str
    size: int
    counts: dict[int, int]


def split(
    source: Source,
    *,
    val: float = 0.0,
    test: float = 0.0,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Source:
    """Shares of the images for "val" and "test", the rest for "train".

    What goes where depends on the images' bytes, their classes, the shares and ``seed``, never on names, folders or
    order. Equal images stay together. ``InputError`` where there are splits already, or too few images for these.
    """
    shares = {"train": 1 - val - test, "val": val, "test": test}
    if not (0 <= val < 1 and 0 <= test < 1 and 0 < val + test < 1):
        raise InputError(f"val {val:g} and test {test:g} leave no train: give shares that sum to between 0 and 1")
    if set(source.splits) != {"train"}:
        have = ", ".join(source.splits)
        raise InputError(f"{source.name} has splits already ({have}): leave out --val and --test to keep them")
    records = source.splits["train"]
    digests = _digests([record.path for record in records], progress)
    dealt = _deal(_groups(records, digests), {name: share for name, share in shares.items() if share > 0}, seed=seed)
    splits: dict[str, list[Record]] = {name: [] for name, share in shares.items() if share > 0}
    for record, digest in zip(records, digests, strict=True):
        splits[dealt[digest]].append(record)
    if empty := [name for name, members in splits.items() if not members]:
        few = f"{len(set(digests)):,} different images are too few"
        raise InputError(f"{few} for a {' and a '.join(empty)} of {source.name}: give larger shares, or fewer splits")
    return replace(source, splits=splits)


def _digests(paths: list[Path], progress: Callable[[int, int], None] | None) -> list[str]:
    """sha256 of each file, in order."""
    digests: list[str] = []
    for digest in in_threads(_digest, paths, num_threads=NUM_THREADS, items_per_task=IMAGES_PER_TASK):
        digests.append(digest)
        if progress is not None:
            progress(len(digests), len(paths))
    return digests


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _groups(records: list[Record], digests: list[str]) -> list[_Group]:
    sizes: dict[str, int] = defaultdict(int)
    counts: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for record, digest in zip(records, digests, strict=True):
        sizes[digest] += 1
        for label in set(record.labels) or {NO_BOXES}:
            counts[digest][label] += 1
    return [_Group(digest, size, dict(counts[digest])) for digest, size in sizes.items()]


def _deal(groups: list[_Group], shares: dict[str, float], *, seed: int) -> dict[str, str]:
    """The split of each group, by digest."""
    # The seed decides the order in which a class's images come up, and so which of them go where.
    groups = sorted(groups, key=lambda group: hashlib.sha256(f"{seed}/{group.digest}".encode()).digest())
    left: dict[int, int] = defaultdict(int)
    for group in groups:
        for label, count in group.counts.items():
            left[label] += count
    num_images = sum(group.size for group in groups)
    lacking = {name: {label: share * count for label, count in left.items()} for name, share in shares.items()}
    lacking_images = {name: share * num_images for name, share in shares.items()}
    dealt: dict[str, str] = {}
    for rarest, group in _rarest_first(groups, left, dealt):
        need = {name: (lacking[name][rarest], lacking_images[name]) for name in shares}
        name = max(need, key=lambda one: need[one])
        dealt[group.digest] = name
        lacking_images[name] -= group.size
        for label, count in group.counts.items():
            lacking[name][label] -= count
            left[label] -= count
    return dealt


def _rarest_first(groups: list[_Group], left: dict[int, int], dealt: dict[str, str]) -> Iterator[tuple[int, _Group]]:
    """A class and a group that has it, until all are dealt; again and again the class with the fewest images left."""
    members: dict[int, list[_Group]] = defaultdict(list)
    for group in groups:
        for label in group.counts:
            members[label].append(group)
    while members:
        rarest = min(members, key=lambda label: (left[label], label))
        for group in members.pop(rarest):
            if group.digest not in dealt:
                yield rarest, group
