"""This process's connection to Ray: started on this machine, or attached to a cluster that runs."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from onestage.cluster.resources import Node
from onestage.errors import InputError

CONNECT_S: Final = 5.0
POLL_S: Final = 1.0
REACH_S: Final = 20.0
TOKEN_FILE: Final = (
    "the file with its token (of a cluster by `onestage cluster up`: clusters/NAME/token below its ~/.cache/onestage)"
)


def quiet() -> None:
    """Ray's settings for every process of ours; to be called before Ray is imported, which reads them then."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 starves a training beside any other process
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")


@contextmanager
def local(*, cores: int, gpus: int) -> Iterator[None]:
    """A Ray of this process's own, which ends with it."""
    quiet()
    if "RAY_AUTH_MODE" not in os.environ:  # a token of this process; Ray would leave one in the home folder
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    import ray

    with _own_sigterm():
        ray.init(
            address="local",
            num_cpus=cores,
            num_gpus=gpus,
            include_dashboard=False,
            configure_logging=False,
            log_to_driver=False,
        )
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def attached(
    cluster: Mapping[str, Any], *, wait_s: float, say: Callable[[str], None], checked: bool = False
) -> Iterator[None]:
    """Attached to the cluster at ``cluster.address``; waits ``wait_s`` for a head that is away.

    Raises InputError where there is none by then, or it refuses the token. ``checked``: `check_head` has been asked.
    """
    from onestage.cluster import jobs

    quiet()
    address = resolved(cluster["address"])
    show_token(address)
    _wait_for_head(address, wait_s=wait_s, say=say)
    if not checked:
        check_head(address)
    import ray

    with _own_sigterm():
        try:
            ray.init(
                address=address,
                runtime_env=jobs.runtime_env(dict(cluster), driver_env=os.environ),
                configure_logging=False,
                log_to_driver=False,
            )
        except Exception as error:
            raise InputError(f"no way into the cluster at {address}: {first_line(error)}") from error
    try:
        yield
    finally:
        ray.shutdown()


def show_token(address: str) -> None:
    """Has Ray show the token of the local cluster at ``address``, where it is ours and the environment names none."""
    from onestage.cluster import local_cluster

    if "RAY_AUTH_MODE" not in os.environ and (mine := local_cluster.find(address)) is not None:
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(mine.token)}


def resolved(address: str | None) -> str:
    """``auto`` as HOST:PORT: RAY_ADDRESS, else the one local cluster that ``onestage cluster up`` started."""
    from onestage.cluster import local_cluster

    if address in (None, "auto"):
        address = os.environ.get("RAY_ADDRESS") or local_cluster.address()
        if address is None:
            raise InputError(
                "cluster.address=auto finds no cluster: set RAY_ADDRESS=HOST:PORT, or start one "
                "(`onestage cluster up --workers 2`)"
            )
    if "://" in address or ":" not in address:
        raise InputError(
            f"cluster.address={address} is none to attach to: write HOST:PORT (a head's GCS, 6379 by default), "
            f"or http://HOST:8265 to send it a job"
        )
    return address


def nodes() -> list[Node]:
    """The machines that the cluster of this process can use: alive, and not being drained."""
    import ray
    from ray._private.state import available_resources_per_node, state

    free, leaving = available_resources_per_node(), state.get_draining_nodes()
    return [
        Node(node["NodeManagerHostname"], node["Resources"], free.get(node["NodeID"], {}))
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in leaving
    ]


def check_head(address: str, *, limit_s: float = REACH_S) -> None:
    """Raises InputError where what listens at ``address`` is no Ray head, or refuses the token; nobody may listen.

    Ray would try for minutes at what is no head, and then end its process: so another process tries first (0.6 s).
    """
    quiet()
    show_token(address)
    if absence(address) is not None:
        return
    code = "import sys; from ray._raylet import GcsClient; GcsClient(address=sys.argv[1]).get_all_node_info(timeout=10)"
    command = [sys.executable, "-c", code, address]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        raise InputError(
            f"what listens at {address} does not answer as a Ray head in {limit_s:.0f} s: set cluster.address to the "
            f"head's HOST:PORT (6379 by default)"
        ) from None
    if any(words in done.stderr for words in ("InvalidAuthToken", "couldn't find an authentication token")):
        raise InputError(
            f"the cluster at {address} refuses the token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE, "
            f"{TOKEN_FILE}"
        )
    if done.returncode:
        said = cause(done.stderr) or f"exit code {done.returncode}"
        raise InputError(f"no way into the cluster at {address} ({said}): is it of another version of Ray?")


def _wait_for_head(address: str, *, wait_s: float, say: Callable[[str], None]) -> None:
    """Ray itself would wait a minute in silence, and end this process."""
    start = time.monotonic()
    while (error := absence(address)) is not None:
        waited = time.monotonic() - start
        if waited >= wait_s or not isinstance(error, OSError):
            raise InputError(f"no Ray head at {address} ({error}): is the cluster up?") from error
        say(f"no Ray head at {address}; waiting {waited:.0f} s of {wait_s:.0f} s")
        time.sleep(POLL_S)


def absence(address: str) -> Exception | None:
    """Why nobody can be talked to at HOST:PORT; None where somebody listens."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except (OSError, ValueError, OverflowError) as error:
        return error
    return None


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Ray's start takes SIGTERM over, to exit on it, and again in C++, to print a stack: it stays ours."""
    from ray._private import utils

    before, theirs = signal.getsignal(signal.SIGTERM), utils.set_sigterm_handler
    utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = theirs
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def on_node(node_id: str) -> Any:
    """For ``.options`` of a task or an actor that takes no CPU: on that node, by its id, and on no other."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=False)}


def first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def cause(story: str) -> str:
    """The last sentence that tells of an error: Ray's stories are pages."""
    lines = [line.strip() for line in story.splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line.lower()] or lines
    return telling[-1].partition(". ")[0][:300] if telling else ""
