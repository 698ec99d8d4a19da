"""Work on many files at once, in threads: reading, hashing and decoding leave the interpreter to the others."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_threads(call: Callable[[T], R], items: Sequence[T], *, num_threads: int, items_per_task: int = 1) -> Iterator[R]:
    """What ``call`` makes of each item, in order; what is not begun when nobody asks any more is not begun.

    >>> list(in_threads(abs, [-1, 2, -3], num_threads=2, items_per_task=2))
    [1, 2, 3]
    """
    tasks = [items[start : start + items_per_task] for start in range(0, len(items), items_per_task)]
    pool = ThreadPoolExecutor(num_threads)
    try:
        for group in pool.map(lambda task: [call(item) for item in task], tasks):
            yield from group
    finally:
        pool.shutdown(cancel_futures=True)
