"""The Ray that a sweep runs on, and how many trials it has room for."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import ray
from hydra.errors import HydraException

Resources = Mapping[str, float]

TRIFLE = 2**20  # bytes of memory, asked for only because Ray Tune wants a trial to ask for something


@contextmanager
def connected() -> Iterator[None]:
    """The Ray that this process is connected to, else that of RAY_ADDRESS, else one of our own that ends with us."""
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS") or "local"
    try:
        ray.init(address=address, include_dashboard=False if address == "local" else None)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise HydraException(f"no Ray at RAY_ADDRESS={address}: {error}") from None
    try:
        yield
    finally:
        ray.shutdown()


def nodes() -> list[Resources]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def room(nodes: Sequence[Resources], bundles: Sequence[Resources], limit: int = 10_000) -> int:
    """How many trials of these bundles fit on the nodes at once; a bundle lies on one node, the largest first."""
    free = [dict(node) for node in nodes]
    ordered = sorted(bundles, key=lambda bundle: sorted(bundle.values(), reverse=True), reverse=True)
    for count in range(limit):
        for bundle in ordered:
            place = next((n for n in free if all(n.get(k, 0) >= v - 1e-9 for k, v in bundle.items() if v)), None)
            if place is None:
                return count
            for key, amount in bundle.items():
                place[key] = place.get(key, 0) - amount
    return limit


def named(resources: Resources) -> str:
    """Resources as one says them, memory last, without Ray's own entries for nodes, groups and its object store."""
    own = ("node:", "bundle_group", "object_store_memory", "accelerator_type:")
    said = [
        f"{amount / 2**30:.3g} GiB of memory" if key == "memory" else f"{amount:g} {key}"
        for key, amount in sorted(resources.items(), key=lambda one: one[0] == "memory")
        if amount and not key.startswith(own) and not (key == "memory" and amount < TRIFLE)
    ]
    return ", ".join(said) or "nothing"
