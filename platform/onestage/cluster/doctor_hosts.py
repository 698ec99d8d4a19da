"""Whom ``onestage doctor`` asks, the driver and every node, and what takes more than one of them to measure."""

import os
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from typing import Any, Final, TypeVar

from onestage.cluster import connection, doctor_node, resources
from onestage.cluster.doctor_node import Facts, Failure, Plan
from onestage.cluster.doctor_verdicts import CLUSTER, DRIVER, Row, capacity, dashboard
from onestage.cluster.preflight import num_gpus
from onestage.data.threads import num_cores

START_S: Final = 60.0
"""A node may first have to unpack the package, and a busy one takes long to start Python."""
CLOCK_S: Final = 5.0
STORAGE_S: Final = 20.0
TRACKING_S: Final = 15.0
MLFLOW_S: Final = 60.0
"""MLflow's own import takes long on a busy machine."""
THREADS: Final = 8
ROUND_TRIPS: Final = 8
MAX_PAIRS: Final = 24
PAIR_S: Final = 10.0
OTHER_SIDE_S: Final = 3.0
"""Both sides of a pair end together; but where one has failed, Gloo may let the other wait for a minute."""
PAIRS_S: Final = 60.0

_SOURCE_LINE: Final = re.compile(r"\[/\S+:\d+\] |\$\d+")
"""Where in its own code Gloo failed."""

Key = TypeVar("Key")
Measured = dict[str, Facts | Failure]


@dataclass(frozen=True, slots=True)
class Node:
    """A node of the cluster, with this examination's process on it."""

    name: str
    address: str
    beside_driver: bool
    """Whether it is on the driver's machine."""
    node_id: str
    num_gpus: int
    free_gpus: int
    """This examination's process has one of them to measure with."""
    actor: Any


class Hosts:
    """The driver and the nodes, to be asked: each question has an end, and who does not answer is named."""

    def __init__(self, nodes: Sequence[Node], *, summary: Sequence[Row] = ()) -> None:
        self.nodes = list(nodes)
        self.summary = list(summary)
        """What is known of the cluster before anybody is asked."""

    @property
    def num_elsewhere(self) -> int:
        """How many nodes are not on the driver's machine."""
        return sum(not node.beside_driver for node in self.nodes)

    def on_driver(self, look: Callable[[Plan], Facts], plan: Plan, limit_s: float) -> Facts | Failure:
        """What ``look`` finds in this process."""
        return self._beside(look, plan, limit_s)()

    def on_nodes(self, look: Callable[[Plan], Facts], plan: Plan, limit_s: float) -> dict[str, Facts | Failure]:
        """What ``look`` finds on each node, all asked at once."""
        return within({node.name: node.actor.look.remote(look, plan) for node in self.nodes}, limit_s)

    def everywhere(self, look: Callable[[Plan], Facts], plan: Plan, limit_s: float) -> dict[str, Facts | Failure]:
        """What ``look`` finds on the driver and on each node, all asked at once."""
        driver = self._beside(look, plan, limit_s)
        found = self.on_nodes(look, plan, limit_s)
        return {DRIVER: driver(), **found}

    def _beside(self, look: Callable[[Plan], Facts], plan: Plan, limit_s: float) -> Callable[[], Facts | Failure]:
        """Starts ``look`` in a thread, for a file system that hangs would hang us; returns what waits for it."""
        found: list[Facts | Failure] = []
        thread = threading.Thread(target=lambda: found.append(doctor_node.attempt(look, plan)), daemon=True)
        thread.start()
        end = time.monotonic() + limit_s

        def wait() -> Facts | Failure:
            thread.join(max(end - time.monotonic(), 0.0))
            return found[0] if found else Failure(f"no answer in {limit_s:g} s")

        return wait


def within(asked: Mapping[Key, Any], limit_s: float) -> dict[Key, Facts | Failure]:
    """The answers to Ray calls by name; a Failure for each that has not come after ``limit_s``, or never will."""
    if not asked:
        return {}
    import ray

    ready, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=limit_s)
    answers: dict[Key, Facts | Failure] = {}
    for name, one in asked.items():
        if one not in ready:
            answers[name] = Failure(f"no answer in {limit_s:g} s")
            continue
        try:
            answers[name] = ray.get(one, timeout=limit_s)
        except ray.exceptions.ActorUnschedulableError:
            answers[name] = Failure("the node was lost meanwhile")
        except Exception as error:
            answers[name] = Failure(connection.cause(str(error)) or type(error).__name__)
    return answers


@contextmanager
def connected(cluster: dict[str, Any], say: Callable[[str], None]) -> Iterator[Hosts]:
    """The driver and the nodes of ``cluster``, while this process is connected to it."""
    if cluster["kind"] == "none":
        yield Hosts([])
        return
    if cluster["kind"] == "local":
        say("starting Ray on this machine")
        with connection.local(cores=max(num_cores(), cluster["num_workers"]), gpus=num_gpus()):
            yield _inspected(cluster)
        return
    address = connection.resolved(cluster["address"])
    say(f"attaching to {address}")
    with connection.attached(cluster, wait_s=0, say=say):
        yield _inspected(cluster)


def _inspected(cluster: dict[str, Any]) -> Hosts:
    """A process of ours on each alive node of the cluster that this process is attached to."""
    import ray
    from ray._private.state import available_resources_per_node
    from ray._private.worker import get_dashboard_url

    listed, free = sorted(ray.nodes(), key=_name), available_resources_per_node()
    alive = [one for one in listed if one["Alive"]]
    own = ray.get_runtime_context().get_node_id()  # a driver is always on a node, if on one without workers
    here = next((one["NodeManagerAddress"] for one in alive if one["NodeID"] == own), None)
    sharing = Counter(_name(one) for one in alive)
    nodes, found = [], []
    for one in alive:
        node_id = one["NodeID"]
        name = _name(one) if sharing[_name(one)] == 1 else f"{_name(one)}/{node_id[:6]}"
        found.append(resources.Node(name, one["Resources"], free.get(node_id, {})))
        free_gpus = int(found[-1].free.get("GPU", 0))
        nodes.append(
            Node(
                name=name,
                address=one["NodeManagerAddress"],
                beside_driver=one["NodeManagerAddress"] == here,
                node_id=node_id,
                num_gpus=int(one["Resources"].get("GPU", 0)),
                free_gpus=free_gpus,
                actor=_inspector(node_id, with_gpu=free_gpus > 0),
            )
        )
    dead = [_name(one) for one in listed if not one["Alive"]]
    summary = capacity(found, dead=dead, cluster=cluster)
    asks_token = os.environ.get("RAY_AUTH_MODE", "").lower() == "token"
    return Hosts(nodes, summary=summary + dashboard(get_dashboard_url() or "", asks_token=asks_token))


def _name(node: Mapping[str, Any]) -> str:
    """What the node was called when it was started, else its host's name."""
    called = str(node.get("NodeName", ""))
    return called if called not in ("", node["NodeManagerAddress"]) else str(node["NodeManagerHostname"])


def _inspector(node_id: str, *, with_gpu: bool) -> Any:
    import ray

    # NCCL ends its process where it hangs: the next pair finds a new one.
    actor: Any = ray.remote(doctor_node.Inspector)
    return actor.options(
        num_gpus=int(with_gpu), max_concurrency=THREADS, max_restarts=MAX_PAIRS, **connection.on_node(node_id)
    ).remote()


def round_trips(hosts: Hosts, plan: Plan) -> Measured:
    """Each node's clock against the driver's: ``offset_s`` ahead, known to plus or minus ``within_s``.

    Of several questions the one that was answered soonest counts; the node read its clock within that round trip, in
    the middle of it as a guess (Cristian, Probabilistic clock synchronization, 1989).
    """
    best: Measured = {}
    for _ in range(ROUND_TRIPS):
        for node in hosts.nodes:
            if isinstance(best.get(node.name), Failure):
                continue  # not waiting for it again and again
            asked = time.time()
            answer = within({node.name: node.actor.now.remote()}, CLOCK_S)[node.name]
            trip = time.time() - asked
            if isinstance(answer, Failure):
                best[node.name] = answer
                continue
            before = best.get(node.name)
            if not isinstance(before, dict) or trip / 2 < before["within_s"]:
                best[node.name] = {"offset_s": answer["now"] - (asked + trip / 2), "within_s": trip / 2}
    return best


def through_storage(hosts: Hosts, plan: Plan) -> Measured:
    """The driver writes and each node reads it; each node writes and the driver sees it; all is deleted."""
    opened = hosts.on_driver(doctor_node.open_storage, plan, STORAGE_S)
    measured: Measured = {DRIVER: opened}
    try:
        if not isinstance(opened, Failure):
            measured |= hosts.on_nodes(doctor_node.touch_storage, plan, STORAGE_S)
            seen = hosts.on_driver(doctor_node.seen_in_storage, plan, STORAGE_S)
            names = [] if isinstance(seen, Failure) else seen["names"]
            for where, found in measured.items():
                if isinstance(found, dict) and found.get("name", "driver") not in names:
                    measured[where] = Failure(f"the driver does not see in {plan.shown_storage} what was written here")
    finally:
        hosts.on_driver(doctor_node.clear_storage, plan, STORAGE_S)
        if isinstance(opened, dict) and opened["made"]:
            hosts.on_driver(doctor_node.drop_storage, plan, STORAGE_S)
    return measured


def reach_tracking(hosts: Hosts, plan: Plan) -> Measured:
    """A server is asked from everywhere; a store that is none by the driver alone."""
    assert plan.tracking_uri is not None
    if plan.tracking_uri.startswith(("http://", "https://")):
        return hosts.everywhere(doctor_node.tracking_server, plan, TRACKING_S)
    found = hosts.on_driver(doctor_node.tracking_store, plan, MLFLOW_S)
    if isinstance(found, Failure):
        return {DRIVER: found}
    local = plan.tracking_uri.startswith(("sqlite:", "file:"))
    return {DRIVER: {**found, "elsewhere": hosts.num_elsewhere if local else 0}}


def between_pairs(hosts: Hosts, plan: Plan) -> Measured:
    """The all-reduce of each pair of nodes, one after another; of one node alone, that of two processes on it."""
    nodes = {node.name: node for node in hosts.nodes}
    if len(nodes) == 1:
        only = hosts.nodes[0]
        actor = _inspector(only.node_id, with_gpu=only.free_gpus > 1)
        beside = replace(only, actor=actor, num_gpus=only.num_gpus - 1, free_gpus=only.free_gpus - 1)
        within({only.name: beside.actor.look.remote(doctor_node.versions, plan)}, START_S)  # imports torch there
        return {f"{only.name}, two processes": _pair(only, beside)}
    measured: Measured = {}
    start = time.monotonic()
    drawn = pairs(list(nodes))
    for left, right in drawn:
        if time.monotonic() - start > PAIRS_S:
            break
        measured[f"{left} - {right}"] = _pair(nodes[left], nodes[right])
    left_out = len(nodes) * (len(nodes) - 1) // 2 - len(measured)
    if left_out:
        measured[CLUSTER] = {"left_out": left_out, "measured": len(measured)}
    return measured


def pairs(names: Sequence[str], *, most: int = MAX_PAIRS) -> list[tuple[str, str]]:
    """All pairs, or ``most`` of them at random, always the same; first a chain that has each name, if that is enough.

    >>> pairs(["a", "b", "c"])
    [('a', 'b'), ('b', 'c'), ('a', 'c')]
    """
    everyone = list(combinations(names, 2))
    chain = list(pairwise(names))
    others = [pair for pair in everyone if pair not in set(chain)]
    if len(everyone) > most:
        draw = random.Random(0)
        draw.shuffle(chain)
        draw.shuffle(others)
    return (chain + others)[:most]


def _pair(left: Node, right: Node) -> Facts | Failure:
    """The all-reduce of two nodes, with NCCL where both have a GPU free."""
    import ray

    met = within({left.name: left.actor.listen.remote(PAIR_S)}, START_S)[left.name]
    if isinstance(met, Failure):
        return Failure(f"{left.name}: {met.what}")
    backend = "nccl" if left.free_gpus > 0 and right.free_gpus > 0 else "gloo"
    sides = [
        node.actor.all_reduce.remote(rank, met["host"], met["port"], backend, PAIR_S)
        for rank, node in enumerate((left, right))
    ]
    ray.wait(sides, num_returns=1, timeout=2 * PAIR_S)
    both = within(dict(enumerate(sides)), OTHER_SIDE_S)
    failed = [one for one in both.values() if isinstance(one, Failure)]
    if failed:
        # Who was refused knows more than who waited for it.
        telling = min(failed, key=lambda one: ("no answer" in one.what, "wait timeout" in one.what))
        variable = f"{backend.upper()}_SOCKET_IFNAME={met['interface']}"
        remedy = (
            f"open all TCP ports between {left.name} and {right.name}; where hosts have several interfaces, set "
            f"{variable} (the one that joins them) where you start: cluster.env passes it on"
        )
        if "[127." in telling.what and not met["host"].startswith("127."):
            remedy = f"a host's name means 127.0.0.1 there: set {variable} where you start, cluster.env passes it on"
        listening = f"{left.name} ({met['host']} port {met['port']}, {met['interface']})"
        return Failure(
            f"{_SOURCE_LINE.sub('', telling.what)}; between {listening} and {right.name} ({right.address})", remedy
        )
    found = both[0]
    assert isinstance(found, dict)
    return {**found, "gpus_at_work": backend == "gloo" and left.num_gpus > 0 and right.num_gpus > 0}
