"""Hosts of a network that exists in this machine's kernel alone: namespaces, joined by a bridge in one of their own."""

import ctypes
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, TypeVar

from onestage.errors import InputError

IP_S: Final = 20.0
INTERFACE: Final = "eth0"
"""Of every host, so that one GLOO_SOCKET_IFNAME fits all."""
BRIDGE: Final = "br0"
NAMESPACES: Final = Path("/run/netns")
CLONE_NEWNET: Final = 0x40000000  # <sched.h>

T = TypeVar("T")


def require() -> None:
    """Raises InputError where this machine or this user can't make network namespaces."""
    if os.geteuid() != 0:
        raise InputError("network namespaces need root: run it with sudo, or leave --namespaces out")
    if shutil.which("ip") is None:
        raise InputError("network namespaces need the command `ip`: install iproute2, or leave --namespaces out")


def refuse_taken(network: str) -> None:
    """Raises InputError where namespaces of a network of that name are there: not ours to use or to remove."""
    taken = sorted(path.name for path in NAMESPACES.glob(f"{network}-*"))
    if taken:
        raise InputError(
            f"network namespaces {', '.join(taken)} are there already: choose another --name, or end the other cluster"
        )


class Network:
    """Hosts at ``10.77.SUBNET.1`` and on, which reach each other and nothing else.

    ``name`` begins the names of the namespaces. What is made lasts until ``remove``, beyond this process.
    """

    def __init__(self, name: str, subnet: int) -> None:
        self.name = name
        self.subnet = subnet

    def create(self) -> None:
        """The switch: a namespace with a bridge. Raises InputError where the kernel refuses it."""
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", BRIDGE, "type", "bridge")
        _ip("-n", self._switch, "link", "set", BRIDGE, "up")

    def add(self, host: str, number: int) -> str:
        """A host with a cable to the switch; its address."""
        namespace, address = self.namespace(host), f"10.77.{self.subnet}.{number}"
        _ip("netns", "add", namespace)
        _ip("-n", self._switch, "link", "add", host, "type", "veth", "peer", "name", INTERFACE, "netns", namespace)
        _ip("-n", self._switch, "link", "set", host, "master", BRIDGE, "up")
        _ip("-n", namespace, "address", "add", f"{address}/24", "dev", INTERFACE)
        _ip("-n", namespace, "link", "set", "lo", "up")
        _ip("-n", namespace, "link", "set", INTERFACE, "up")
        return address

    def cut(self, host: str) -> None:
        """Pulls the host's cable: packets both ways vanish, and nobody is told."""
        _ip("-n", self._switch, "link", "set", host, "down")

    def mend(self, host: str) -> None:
        """Plugs the cable in again."""
        _ip("-n", self._switch, "link", "set", host, "up")

    def command(self, host: str, argv: Sequence[str]) -> list[str]:
        """``argv`` as a command that runs on that host."""
        return ["ip", "netns", "exec", self.namespace(host), *argv]

    def pids(self, host: str) -> list[int]:
        """Every process that is on the host now."""
        if not (NAMESPACES / self.namespace(host)).exists():
            return []
        return [int(pid) for pid in _ip("netns", "pids", self.namespace(host)).split()]

    def within(self, host: str, act: Callable[[], T]) -> T:
        """``act()`` in a thread of this process that is on the host: sockets that it opens are the host's."""
        done: list[T] = []
        raised: list[BaseException] = []

        def run() -> None:
            try:
                with open(NAMESPACES / self.namespace(host), "rb") as namespace:
                    libc = ctypes.CDLL(None, use_errno=True)
                    if libc.setns(namespace.fileno(), CLONE_NEWNET) != 0:
                        raise OSError(ctypes.get_errno(), f"setns to {self.namespace(host)} failed")
                done.append(act())
            except BaseException as error:
                raised.append(error)

        thread = threading.Thread(target=run, name=f"on-{host}", daemon=True)
        thread.start()
        thread.join()
        if raised:
            raise raised[0]
        return done[0]

    def remove(self) -> None:
        """The switch and all hosts, the processes on which have ended."""
        for path in sorted(NAMESPACES.glob(f"{self.name}-*")):
            _ip("netns", "delete", path.name)

    def namespace(self, host: str) -> str:
        """The name of the host's namespace, as `ip netns list` shows it."""
        return f"{self.name}-{host}"

    @property
    def _switch(self) -> str:
        return self.namespace("switch")


def _ip(*arguments: str) -> str:
    command = ["ip", *arguments]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=IP_S).stdout
    except subprocess.CalledProcessError as error:
        why = (error.stderr.strip().splitlines() or [f"exit code {error.returncode}"])[-1]
        raise InputError(
            f"`{' '.join(command)}` was refused ({why}): run as root where namespaces are allowed"
        ) from None
    except subprocess.TimeoutExpired:
        raise InputError(f"`{' '.join(command)}` did not end within {IP_S:g} s: try again") from None
