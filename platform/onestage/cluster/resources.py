"""How many workers a cluster can take now, and the wait for them: with a limit, and never in silence."""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, NamedTuple

POLL_S: Final = 1.0
SETTLE_S: Final = 10.0
"""An elastic training waits so long for what is taken to be free again, before it starts with fewer workers."""

Resources = Mapping[str, float]


class TooFewResources(Exception):
    """The cluster could not take the workers within ``cluster.wait``; the message says what is missing."""


class Node(NamedTuple):
    """An alive machine of the cluster: what it has, and what of that is free."""

    name: str
    total: Resources
    free: Resources


def num_fitting(nodes: Iterable[Node], worker: Resources, *, empty: bool = False) -> int:
    """Workers of that size that fit into what is free, or into the ``empty`` nodes; none is split over two nodes.

    >>> num_fitting([Node("a", {"CPU": 4.0}, {"CPU": 3.0}), Node("b", {"CPU": 1.0}, {})], {"CPU": 2.0})
    1
    """
    held = (node.total if empty else node.free for node in nodes)
    return sum(min(int(have.get(name, 0.0) / need + 1e-9) for name, need in worker.items() if need) for have in held)


def counted_gpus(cluster: Mapping[str, Any]) -> float:
    """The GPUs that GPU-hours count for a training; a worker without one counts as one.

    >>> counted_gpus({"num_workers": 4, "gpus_per_worker": 0.0})
    4.0
    """
    return float(cluster["num_workers"] * max(cluster["gpus_per_worker"] or 0, 1))


def of_worker(cluster: Mapping[str, Any]) -> dict[str, float]:
    """What Ray sets aside for one worker."""
    gpus = cluster["gpus_per_worker"]
    return {"CPU": cluster["cpus_per_worker"], **({"GPU": gpus} if gpus else {})}


def wait_for_workers(
    cluster: Mapping[str, Any],
    *,
    nodes: Callable[[], list[Node]],
    say: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """The number of workers to start: ``num_workers``, or as many as fit, where that is at least ``min_workers``.

    ``say`` gets one line a poll while there are too few. Raises TooFewResources after ``wait`` minutes.
    """
    wanted, least = cluster["num_workers"], cluster["min_workers"] or cluster["num_workers"]
    worker, limit_s = of_worker(cluster), cluster["wait"] * 60
    start = clock()
    while True:
        seen = nodes()
        fitting, waited = num_fitting(seen, worker), clock() - start
        if fitting >= wanted:
            return int(wanted)
        if fitting >= least and (fitting == num_fitting(seen, worker, empty=True) or waited >= SETTLE_S):
            return fitting
        missing = shortage(seen, wanted=wanted, least=least, worker=worker, fitting=fitting)
        if waited >= limit_s:
            raise TooFewResources(f"{missing}; waited {waited:.0f} s (cluster.wait={cluster['wait']:g} minutes)")
        say(f"{missing}; waiting {waited:.0f} s of {limit_s:.0f} s")
        sleep(POLL_S)


def shortage(nodes: list[Node], *, wanted: int, least: int, worker: Resources, fitting: int) -> str:
    """What is asked and what is there, in one line."""
    size = " and ".join(f"{amount:g} {name}" for name, amount in worker.items())
    count = f"{least} to {wanted}" if least < wanted else str(wanted)
    have = ", ".join(
        f"{sum(node.free.get(name, 0.0) for node in nodes):g} of {sum(node.total.get(name, 0.0) for node in nodes):g} "
        f"{name} free"
        for name in worker
    )
    text = f"asked for {count} workers of {size} each, {fitting} fit: {len(nodes)} nodes have {have}"
    if num_fitting(nodes, worker, empty=True) < least:
        text += ", and even empty they hold fewer: lower cluster.num_workers or cluster.cpus_per_worker, or add nodes"
    return text
