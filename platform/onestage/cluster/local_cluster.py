"""A Ray cluster of several nodes on this machine, for trying things out and for tests.

What ``up`` starts goes on without it. A cluster's folder below the cache (``clusters/NAME``) holds its token, its state
and its logs, all of them for the user's eyes only; ``down`` removes it.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any, Final, NamedTuple

import psutil
from filelock import FileLock, Timeout

from onestage.cluster.namespaces import INTERFACE, Network, refuse_taken, require
from onestage.data import cache
from onestage.errors import InputError

START_S: Final = 200.0
"""So long one node may take to start, and then the cluster to know it; both take 10 s on a quiet machine."""
START_ATTEMPTS: Final = 3
ASKED_S: Final = 5.0
"""So long processes may take to end when they are asked to; Ray's own would take 10 s."""
KILLED_S: Final = 10.0
LISTED_S: Final = 5.0
LOCK_S: Final = 30.0
POLL_S: Final = 0.5
ENDING_POLL_S: Final = 0.05
OBJECT_STORE_BYTES: Final = 512 * 2**20
"""Of each node. Ray would take 30 % of the memory, once for every node."""
HEAD: Final = "head"
NAME: Final = re.compile(r"[a-z0-9]{1,12}")
PORTS: Final = {"gcs": 6379, "dashboard": 8265, "client": 10001}

# Between hosts a lost one is noticed after 3 checks of at most 3 s, 1 s apart; with Ray's own after three times that.
HEALTH_CHECKS: Final = {
    "health_check_initial_delay_ms": 3000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 3000,
    "health_check_failure_threshold": 3,
}
# A node has the environment of a fresh login: what else this shell has set must reach workers by the config.
LOGIN: Final = re.compile(
    r"PATH|HOME|USER|LOGNAME|SHELL|LANG|LC_\w+|TZ|TMPDIR|XDG_CACHE_HOME|LD_LIBRARY_PATH|VIRTUAL_ENV|PYTHONPATH"
    r"|OMP_NUM_THREADS|CUDA_\w+|NVIDIA_\w+"
)

Say = Callable[[str], None]


def silent(_: str) -> None:
    """Says nothing."""


class Node(NamedTuple):
    """A node and whether the head counts it among the living."""

    name: str
    ip: str
    alive: bool


@dataclass
class Host:
    """What is asked of a node, and the process that started it: ``pid`` at ``started`` (seconds since the epoch)."""

    name: str
    ip: str
    cpus: float
    gpus: list[str] = field(default_factory=list)
    pid: int | None = None
    started: float = 0.0


@dataclass
class LocalCluster:
    """A cluster that ``up`` started. ``address`` is the head's, for ``cluster.address``; ``dashboard`` takes jobs.

    With ``subnet``, every node is a host of its own, and a driver has to run on one of them (``command``).
    """

    name: str
    temp: str
    ports: dict[str, int]
    subnet: int | None
    worker_cpus: float
    worker_gpus: int
    hosts: list[Host] = field(default_factory=list)

    @property
    def address(self) -> str:
        """HOST:PORT of the head."""
        return f"{self.host(HEAD).ip}:{self.ports['gcs']}"

    @property
    def dashboard(self) -> str:
        """Where jobs are submitted, from the head's host alone."""
        return f"http://127.0.0.1:{self.ports['dashboard']}"

    @property
    def folder(self) -> Path:
        """State, token and logs."""
        return _clusters() / self.name

    @property
    def token(self) -> Path:
        """The file with the token that a client must show."""
        return self.folder / "token"

    @property
    def environment(self) -> dict[str, str]:
        """What a driver's environment needs, besides its own."""
        needed = {
            "RAY_ADDRESS": self.address,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        return needed | ({} if self.subnet is None else {"GLOO_SOCKET_IFNAME": INTERFACE})

    @property
    def network(self) -> Network | None:
        """What joins the hosts, where each is one of its own."""
        return None if self.subnet is None else Network(_network(self.name), self.subnet)

    @property
    def running(self) -> bool:
        """Whether the head has processes."""
        return any(host.name == HEAD and self._processes(host) for host in self.hosts)

    @property
    def nodes(self) -> list[Node]:
        """All nodes as the head sees them now; none is alive for a head that does not answer."""
        alive = self._alive()
        return [Node(host.name, host.ip, host.name in alive) for host in self.hosts]

    def host(self, name: str) -> Host:
        """The node of that name. Raises InputError where there is none."""
        for host in self.hosts:
            if host.name == name:
                return host
        known = ", ".join(host.name for host in self.hosts)
        raise InputError(f"cluster {self.name} has no node {name!r}: it has {known}")

    def node_id(self, node: str) -> str | None:
        """Ray's id of the node as it runs now: one that was lost may still be listed as alive under the same name."""
        for process in self._processes(self.host(node)):
            with contextlib.suppress(psutil.NoSuchProcess):
                arguments: list[str] = process.cmdline()
                for argument in arguments:
                    if argument.startswith("--node_id="):
                        return argument.removeprefix("--node_id=")
        return None

    def command(self, node: str, argv: Sequence[str]) -> list[str]:
        """``argv`` as a command that runs on that node's host; to be given ``environment`` as well."""
        network, host = self.network, self.host(node)
        return list(argv) if network is None else network.command(host.name, argv)

    def processes(self, node: str) -> list[psutil.Process]:
        """The node's processes, and with namespaces whatever else runs on that host."""
        return self._processes(self.host(node))

    def kill_node(self, node: str) -> None:
        """SIGKILL for every process of the node, and with namespaces for whatever else runs on that host."""
        _end(lambda: self._processes(self.host(node)), gently=False)

    def cut(self, node: str) -> None:
        """Pulls the node's network cable. Its processes go on; the head gives them up after about ten seconds."""
        self._hosts_network("cut").cut(self.host(node).name)

    def mend(self, node: str) -> None:
        """Plugs the cable in again. A node that was given up ends itself then: ``start_node`` starts it again."""
        self._hosts_network("mend").mend(self.host(node).name)

    def add_node(self, *, say: Say = silent) -> str:
        """One more worker node; its name. Returns when the head knows it."""
        host = self._new_host()
        self._start([host], say)
        return host.name

    def start_node(self, node: str, *, say: Say = silent) -> None:
        """Starts a node again, and ends before what is left of it. Returns when the head knows it."""
        self._start([self.host(node)], say)

    def restart_head(self, *, say: Say = silent) -> None:
        """The head again, at the same address and with what it had stored: the nodes that live come back to it.

        Its drivers are lost, as when the host of a head restarts.
        """
        self._start([self.host(HEAD)], say)

    def down(self, *, say: Say = silent) -> None:
        """Ends every process, asked first and then made to, and removes all that ``up`` made."""
        say(f"ending cluster {self.name}")
        _end(lambda: [process for host in self.hosts for process in self._processes(host)], gently=True)
        if self.network is not None:
            self.network.remove()
        shutil.rmtree(self.temp, ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def save(self) -> None:
        """Writes the state; never half of it."""
        with tempfile.NamedTemporaryFile("w", dir=self.folder, delete=False, encoding="utf-8") as file:  # mode 0600
            json.dump(asdict(self), file)
        os.replace(file.name, self.folder / "state.json")

    def _new_host(self) -> Host:
        number = len(self.hosts)
        name = f"worker{number}" if number else HEAD
        first = self.worker_gpus * (number - 1)
        gpus = _visible_gpus()[first : first + self.worker_gpus] if number else []
        if number and len(gpus) < self.worker_gpus:
            raise InputError(
                f"{name} is to have {self.worker_gpus} GPUs, {len(gpus)} are left: lower --gpus or --workers"
            )
        ip = "127.0.0.1" if self.network is None else self.network.add(name, number + 1)
        host = Host(name, ip, self.worker_cpus, gpus)
        self.hosts.append(host)
        self.save()
        return host

    def _start(self, hosts: list[Host], say: Say) -> None:
        """Starts nodes side by side, and returns when the head counts all of them among the living."""
        say(f"starting {', '.join(host.name for host in hosts)}")
        starting = [(host, self._ray_start(host)) for host in hosts]
        end = time.monotonic() + START_S
        for host, process in starting:
            self._wait_for_start(host, process, end, say)
        while missing := self._missing(hosts):
            if time.monotonic() > end:
                raise InputError(
                    f"{', '.join(missing)} did not join the cluster within {START_S:g} s: is the head well?"
                )
            say(f"waiting for {', '.join(missing)}")
            time.sleep(POLL_S)

    def _missing(self, hosts: list[Host]) -> list[str]:
        alive = self._alive()
        return [host.name for host in hosts if self.node_id(host.name) not in alive[host.name]]

    def _wait_for_start(self, host: Host, process: "subprocess.Popen[bytes]", end: float, say: Say) -> None:
        for attempt in range(1, START_ATTEMPTS + 1):
            try:
                code = process.wait(timeout=max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise InputError(f"{host.name} did not start within {START_S:g} s{self._last_words(host)}") from None
            # Ray waits 30 s for a node that it started, then leaves it to itself: on a busy machine it may yet join.
            if code == 0 or self.node_id(host.name) is not None:
                return
            if attempt < START_ATTEMPTS:
                say(f"{host.name} did not start{self._last_words(host)}; trying again")
                process = self._ray_start(host)
        raise InputError(f"{host.name} did not start in {START_ATTEMPTS} attempts{self._last_words(host)}")

    def _ray_start(self, host: Host) -> "subprocess.Popen[bytes]":
        _end(lambda: self._processes(host), gently=False)
        temp = Path(self.temp) / host.name
        (temp / "ray_current_cluster").unlink(missing_ok=True)  # Ray takes it for a head that runs
        arguments = [
            f"--node-name={host.name}",
            f"--node-ip-address={host.ip}",
            f"--num-cpus={host.cpus:g}",
            f"--num-gpus={len(host.gpus)}",
            f"--temp-dir={temp}",
            f"--object-store-memory={OBJECT_STORE_BYTES}",
            # Fixed ports would be one node's alone on this machine.
            "--min-worker-port=0",
            "--max-worker-port=0",
            "--dashboard-agent-listen-port=0",
            "--log-style=record",
            *(self._head_arguments() if host.name == HEAD else [f"--address={self.address}"]),
        ]
        environment = {name: value for name, value in os.environ.items() if LOGIN.fullmatch(name)} | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            "RAY_gcs_rpc_server_reconnect_timeout_s": f"{START_S:g}",
        }
        if host.name == HEAD:  # what it knows survives its processes
            environment |= {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(Path(self.temp) / "gcs")}
        if self.worker_gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(host.gpus)
        command = self.command(host.name, [sys.executable, "-u", "-m", "ray.scripts.scripts", "start", *arguments])
        with open(self._log(host.name), "ab") as log:
            process = subprocess.Popen(
                command,
                env=environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # which holds all that the node will start
            )
        host.pid, host.started = process.pid, psutil.Process(process.pid).create_time()
        self.save()
        return process

    def _head_arguments(self) -> list[str]:
        arguments = [
            "--head",
            f"--port={self.ports['gcs']}",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-port={self.ports['dashboard']}",
            f"--ray-client-server-port={self.ports['client']}",
        ]
        return arguments + ([] if self.subnet is None else [f"--system-config={json.dumps(HEALTH_CHECKS)}"])

    def _alive(self) -> dict[str, set[str]]:
        """Ray's ids of the living nodes by name: two for a node that started again before the first was given up."""

        def ask() -> Any:
            request = urllib.request.Request(
                f"{self.dashboard}/api/v0/nodes?limit=1000&detail=false",
                headers={"Authorization": f"Bearer {self.token.read_text()}"},
            )
            with direct.open(request, timeout=LISTED_S) as answer:
                return json.load(answer)["data"]["result"]["result"]

        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        alive: dict[str, set[str]] = defaultdict(set)
        with contextlib.suppress(OSError, HTTPException, ValueError, TypeError, KeyError):
            for node in ask() if self.network is None else self.network.within(HEAD, ask):
                if node["state"] == "ALIVE":
                    alive[node["node_name"]].add(node["node_id"])
        return alive

    def _processes(self, host: Host) -> list[psutil.Process]:
        """The node's processes: those of the session in which it was started, and whatever is in its namespace.

        A session's number may be reused when its last process has ended. It is still ours if it has one from the time
        of the start: those that started later, in a session that is not ours, are somebody else's.
        """
        network = self.network
        found = [] if network is None else [_process(pid) for pid in network.pids(host.name)]
        if host.pid is not None:
            session = [_process(pid) for pid in psutil.pids() if _session(pid) == host.pid]
            if any(process is not None and process.create_time() <= host.started + START_S for process in session):
                found += session
        return list({process.pid: process for process in found if process is not None}.values())

    def _hosts_network(self, verb: str) -> Network:
        if self.network is None:
            raise InputError(f"cluster {self.name} has no cable to {verb}: its nodes share this machine (--namespaces)")
        return self.network

    def _log(self, node: str) -> Path:
        return self.folder / f"{node}.log"

    def _last_words(self, host: Host) -> str:
        lines = self._log(host.name).read_text(encoding="utf-8", errors="replace").splitlines()
        last = next((line.strip() for line in reversed(lines) if line.strip()), None)
        return "" if last is None else f": {last[:300]}"


def up(
    name: str = "default",
    *,
    workers: int,
    cpus: float = 1,
    gpus: int = 0,
    head_cpus: float = 0,
    namespaces: bool = False,
    say: Say = silent,
) -> LocalCluster:
    """Starts a head and ``workers`` nodes of ``cpus`` and ``gpus`` each, and returns when all are there.

    Raises InputError where a cluster of that name runs, or a node does not start; nothing is left of it then.
    """
    if namespaces:
        require()
    with _locked(name, wait_s=0):
        before = _load(_clusters() / name)
        if before is not None:
            if before.running:
                raise InputError(f"cluster {name} is up at {before.address}: use it, or `onestage cluster down` first")
            before.down()
        if namespaces:
            refuse_taken(_network(name))
        cluster = LocalCluster(
            name=name,
            # Short, since the path of a Unix socket below it may have 107 bytes at most.
            temp=tempfile.mkdtemp(prefix="onestage-", dir="/tmp"),
            ports=dict(PORTS) if namespaces else {use: _free_port(port) for use, port in PORTS.items()},
            subnet=_free_subnet() if namespaces else None,
            worker_cpus=cpus,
            worker_gpus=gpus,
        )
        try:
            shutil.rmtree(cluster.folder, ignore_errors=True)  # of one that was cut off before it had a state
            cluster.folder.mkdir(mode=0o700)
            cluster.save()  # first of all, so that `down` finds what is made next
            _write_secret(cluster.token)
            if cluster.network is not None:
                cluster.network.create()
            head = cluster._new_host()
            head.cpus = head_cpus
            others = [cluster._new_host() for _ in range(workers)]
            cluster._start([head], say)
            cluster._start(others, say)
        except BaseException:
            cluster.down()
            raise
    return cluster


def down(name: str = "default", *, say: Say = silent) -> bool:
    """Ends the cluster of that name; whether there was one."""
    with _locked(name, wait_s=LOCK_S):
        cluster = _load(_clusters() / name)
        if cluster is not None:
            cluster.down(say=say)
    return cluster is not None


def load(name: str = "default") -> LocalCluster:
    """The cluster of that name, running or not. Raises InputError where there is none."""
    cluster = _load(_clusters() / name)
    if cluster is None:
        raise InputError(f"there is no cluster {name}: start it with `onestage cluster up --name {name} --workers 2`")
    return cluster


def names() -> list[str]:
    """Of all clusters, running or not."""
    return [cluster.name for cluster in _all()]


def find(address: str) -> LocalCluster | None:
    """The running cluster of ours with that head (HOST:PORT), or with that dashboard (http://HOST:PORT).

    The dashboards of hosts have the same address, each on its own: `onestage cluster exec` says which is meant.
    """
    wanted = address.rstrip("/").replace("localhost", "127.0.0.1")
    for cluster in _all():
        if cluster.running and (wanted == cluster.address or (cluster.subnet is None and wanted == cluster.dashboard)):
            return cluster
    return None


def address() -> str | None:
    """The one running cluster of ours that this process can reach. Raises InputError where several run."""
    running = [cluster for cluster in _all() if cluster.subnet is None and cluster.running]
    if len(running) > 1:
        told = ", ".join(f"{cluster.name} at {cluster.address}" for cluster in running)
        raise InputError(f"several local clusters run ({told}): say which with cluster.address=HOST:PORT")
    return running[0].address if running else None


def _clusters() -> Path:
    return cache.folder(None) / "clusters"


def _network(name: str) -> str:
    return f"onestage-{name}"


def _all() -> list[LocalCluster]:
    found = []
    for path in sorted(_clusters().glob("*/state.json")):
        with contextlib.suppress(InputError):  # a broken one is told to who names it
            found.append(_load(path.parent))
    return [cluster for cluster in found if cluster is not None]


def _load(folder: Path) -> LocalCluster | None:
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return LocalCluster(**state | {"hosts": [Host(**host) for host in state["hosts"]]})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{folder / 'state.json'} can't be read ({error}): end the processes of this cluster by hand, "
            f"and remove {folder}"
        ) from error


@contextlib.contextmanager
def _locked(name: str, *, wait_s: float) -> Any:
    """One ``up`` or ``down`` at a time."""
    if not NAME.fullmatch(name):
        raise InputError(f"{name!r} is no name for a cluster: use 1 to 12 of a-z and 0-9")
    _clusters().mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        with FileLock(_clusters() / f"{name}.lock", timeout=wait_s):
            yield
    except Timeout:
        raise InputError(f"cluster {name} is being started or ended by another process: wait for that one") from None


def _write_secret(path: Path) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))


def _free_port(first: int) -> int:
    """``first`` or one of the hundred behind it: below those that the kernel gives to anybody."""
    for port in range(first, first + 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
            return port
    raise InputError(f"no port from {first} to {first + 99} is free: end what listens there")


def _free_subnet() -> int:
    taken = {cluster.subnet for cluster in _all()}
    return next(number for number in range(256) if number not in taken)


def _visible_gpus() -> list[str]:
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [one.strip() for one in chosen.split(",") if one.strip()]
    return [str(number) for number in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]


def _process(pid: int) -> psutil.Process | None:
    """None for one that is gone, a zombie among them."""
    try:
        process = psutil.Process(pid)
        process.create_time()  # read and kept
        return None if process.status() == psutil.STATUS_ZOMBIE else process
    except psutil.NoSuchProcess:
        return None


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except OSError:
        return None


def _end(living: Callable[[], list[psutil.Process]], *, gently: bool) -> None:
    """Ends processes until ``living`` finds none: one that is to end may still start another.

    Those that are children of this process stay zombies for whoever started them to wait for.
    """
    start = time.monotonic()
    if gently:
        _signal(living(), signal.SIGTERM)
        while living() and time.monotonic() - start < ASKED_S:
            time.sleep(ENDING_POLL_S)
        start = time.monotonic()
    while left := living():
        if time.monotonic() - start > KILLED_S:
            pids = ", ".join(str(process.pid) for process in left)
            raise InputError(f"processes {pids} can't be ended: see with `ps` what they wait for, and try again")
        _signal(left, signal.SIGKILL)
        time.sleep(ENDING_POLL_S)


def _signal(processes: list[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
