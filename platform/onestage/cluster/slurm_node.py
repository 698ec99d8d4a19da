"""What a Slurm job asks on its nodes: ``python -m onestage.cluster.slurm_node ports|address|wait …``."""

import importlib
import os
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

from onestage.cluster import connection

POLL_S: Final = 0.5
ANSWER_S: Final = 10.0


def ports(count: int) -> list[int]:
    """Free ports of this host, all different. Whoever takes one should do so soon."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def address(peer: str) -> str:
    """This host's address on the way to ``peer``, a host's name or address; nothing is sent.

    >>> address("127.0.0.1")
    '127.0.0.1'
    """
    family, kind, protocol, _, target = socket.getaddrinfo(peer, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as way:
        way.connect(target)
        return str(way.getsockname()[0])


def wait(head: str, nodes: int, limit_s: float, pid: int) -> int:
    """How many nodes live in the cluster whose head is at HOST:PORT, once there are ``nodes`` or ``limit_s`` is over.

    Does not wait longer than process ``pid`` lives, which is the head's; 0 where nobody answers.
    """
    end, alive = time.monotonic() + limit_s, 0
    while True:
        if connection.absence(head) is None:
            alive = _alive(head)
        if alive >= nodes or time.monotonic() > end or not _lives(pid):
            return alive
        time.sleep(POLL_S)


def _alive(head: str) -> int:
    connection.quiet()
    raylet: Any = importlib.import_module("ray._raylet")
    with suppress(Exception):  # it has only begun, or is about to end
        infos = raylet.GcsClient(address=head).get_all_node_info(timeout=ANSWER_S)
        return sum(info.state == 0 for info in infos.values())  # GcsNodeInfo.ALIVE
    return 0


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def main(arguments: Sequence[str]) -> int:
    """Prints the answer; of ``wait`` the exit code says whether all nodes are there."""
    match arguments:
        case ["ports", count]:
            print(*ports(int(count)))
        case ["address", peer]:
            print(address(peer))
        case ["wait", head, nodes, limit_s, pid]:
            alive = wait(head, int(nodes), float(limit_s), int(pid))
            print(alive)
            return 0 if alive >= int(nodes) else 1
        case _:
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
