"""Clusters on this machine: what is started is protected, can be lost and brought back, and leaves nothing."""

import argparse
import json
import os
import stat
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.error import HTTPError

import psutil
import pytest
from filelock import FileLock

from onestage.cli import cluster as verb
from onestage.cluster import local_cluster, namespaces
from onestage.cluster.local_cluster import Host, LocalCluster
from onestage.errors import InputError

from .hosts import hosts  # noqa: F401

COMMAND_S = 120
VERB = (
    "import argparse, sys; from onestage.cli import cluster; parser = argparse.ArgumentParser(); "
    "cluster.add(parser.add_subparsers()); options = parser.parse_args(sys.argv[1:]); sys.exit(options.run(options))"
)
# Where tasks ran that had to be spread over all CPUs: the name of the node of each.
SPREAD = """
import sys, time, ray
ray.init(address=sys.argv[1], log_to_driver=False)

@ray.remote(num_cpus=1)
def where(started=time.time()):
    time.sleep(2)  # so that no CPU serves two
    return ray.get_runtime_context().get_node_id()

names = {node["NodeID"]: node["NodeManagerHostname"] and node["NodeName"] for node in ray.nodes()}
print(*sorted(names[one] for one in ray.get([where.remote() for _ in range(int(sys.argv[2]))], timeout=60)))
"""


def run(command: list[str], **environment: str) -> "subprocess.CompletedProcess[str]":
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.run(
        command, env={**clean, **environment}, capture_output=True, text=True, timeout=COMMAND_S, check=False
    )


def spread(cluster: LocalCluster, tasks: int) -> list[str]:
    """Runs so many tasks of one CPU at once from the head's host; the names of the nodes that took them."""
    command = cluster.command("head", [sys.executable, "-c", SPREAD, cluster.address, str(tasks)])
    done = run(command, **cluster.environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def wait_until(true: Callable[[], bool], *, within_s: float) -> float:
    """The seconds that it took."""
    start = time.monotonic()
    while not true():
        assert time.monotonic() - start < within_s
        time.sleep(0.3)
    return time.monotonic() - start


def alive(cluster: LocalCluster) -> list[str]:
    return [node.name for node in cluster.nodes if node.alive]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def processes_with(text: str) -> list[int]:
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        if process.info["status"] != psutil.STATUS_ZOMBIE and any(text in one for one in process.info["cmdline"] or []):
            found.append(process.pid)
    return found


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, so that no cluster of the user's is in sight."""
    monkeypatch.setenv("ONESTAGE_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def sleeper() -> Iterator[psutil.Process]:
    """A process that leads a session, as the one that starts a node does."""
    child = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        yield psutil.Process(child.pid)
    finally:
        child.kill()
        child.wait()


def written(name: str, head: psutil.Process, *, port: int = 6379, started: float | None = None) -> LocalCluster:
    """A cluster's state with ``head`` as the only process of its head."""
    host = Host("head", "127.0.0.1", 0, pid=head.pid, started=head.create_time() if started is None else started)
    ports = {"gcs": port, "dashboard": port + 1, "client": port + 2}
    cluster = LocalCluster(name, f"/tmp/onestage-none-{name}", ports, None, 1, 0, [host])
    cluster.folder.mkdir(parents=True)
    cluster.save()
    return cluster


class TestState:
    def test_is_for_the_users_eyes_only(self, home: Path, sleeper: psutil.Process) -> None:
        cluster = written("a", sleeper)
        assert mode(cluster.folder / "state.json") == 0o600
        assert list(home.glob("clusters/a/*")) == [cluster.folder / "state.json"]

    def test_is_read_as_it_was_written(self, home: Path, sleeper: psutil.Process) -> None:
        assert written("a", sleeper) == local_cluster.load("a")

    def test_a_cluster_is_found_by_its_address_and_by_its_dashboards(self, home: Path, sleeper: psutil.Process) -> None:
        cluster = written("a", sleeper)
        for address in ("127.0.0.1:6379", "localhost:6379", "http://127.0.0.1:6380", "http://127.0.0.1:6380/"):
            found = local_cluster.find(address)
            assert found is not None and found.token == cluster.token
        assert local_cluster.find("127.0.0.1:6380") is None
        assert local_cluster.find("10.0.0.1:6379") is None

    def test_the_dashboard_of_hosts_is_not_this_machines(self, home: Path, sleeper: psutil.Process) -> None:
        cluster = written("a", sleeper)
        cluster.subnet = 7
        cluster.host("head").ip = "10.77.7.1"
        cluster.save()
        found = local_cluster.find("10.77.7.1:6379")
        assert found is not None and found.environment["GLOO_SOCKET_IFNAME"] == "eth0"
        assert local_cluster.find("http://127.0.0.1:6380") is None
        assert local_cluster.address() is None

    def test_the_address_of_the_only_one_that_runs(self, home: Path, sleeper: psutil.Process) -> None:
        assert local_cluster.address() is None
        cluster = written("a", sleeper)
        assert local_cluster.address() == "127.0.0.1:6379"
        cluster.kill_node("head")
        assert local_cluster.address() is None
        assert local_cluster.find("127.0.0.1:6379") is None

    def test_of_several_one_has_to_be_named(self, home: Path, sleeper: psutil.Process) -> None:
        written("a", sleeper)
        written("b", sleeper, port=7000)
        with pytest.raises(InputError, match=r"a at 127\.0\.0\.1:6379, b at 127\.0\.0\.1:7000.*cluster\.address"):
            local_cluster.address()

    def test_that_is_broken_hides_no_other(self, home: Path, sleeper: psutil.Process) -> None:
        cluster = written("b", sleeper)
        (home / "clusters" / "a").mkdir()
        (home / "clusters" / "a" / "state.json").write_text('{"name": "a"')
        assert local_cluster.address() == cluster.address
        with pytest.raises(InputError, match=r"a/state\.json can't be read"):
            local_cluster.load("a")

    def test_of_a_cluster_that_was_never_started(self, home: Path) -> None:
        with pytest.raises(InputError, match="onestage cluster up --name none"):
            local_cluster.load("none")
        assert local_cluster.down("none") is False


class TestProcesses:
    def test_that_are_the_nodes_are_ended_with_all_of_their_session(self, home: Path) -> None:
        leader = psutil.Process(
            subprocess.Popen(["bash", "-c", "sleep 61 & sleep 62; true"], start_new_session=True).pid
        )
        wait_until(lambda: len(leader.children()) == 2, within_s=10)
        both = leader.children()
        written("a", leader).kill_node("head")
        assert not any(lives(process) for process in (leader, *both))

    def test_with_a_reused_pid_are_left_alone(self, home: Path, sleeper: psutil.Process) -> None:
        long_ago = sleeper.create_time() - 3600
        cluster = written("a", sleeper, started=long_ago)
        assert not cluster.running
        cluster.down()
        assert lives(sleeper)

    def test_down_ends_them_and_removes_what_was_written(self, home: Path, sleeper: psutil.Process) -> None:
        cluster = written("a", sleeper)
        assert local_cluster.down("a") is True
        assert not cluster.folder.exists()
        assert not lives(sleeper)
        assert local_cluster.down("a") is False


class TestRefused:
    @pytest.mark.parametrize("name", ["", "../up", "a b", "Big", "a" * 13])
    def test_names_that_are_none(self, home: Path, name: str) -> None:
        with pytest.raises(InputError, match="1 to 12 of a-z and 0-9"):
            local_cluster.up(name, workers=1)

    def test_a_second_cluster_of_that_name(self, home: Path, sleeper: psutil.Process) -> None:
        written("a", sleeper)
        with pytest.raises(InputError, match=r"cluster a is up at 127\.0\.0\.1:6379.*cluster down"):
            local_cluster.up("a", workers=1)

    def test_nodes_that_do_not_start_after_three_attempts(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        attempts = []

        def fail(cluster: LocalCluster, host: Host) -> "subprocess.Popen[bytes]":
            attempts.append(host.name)
            (cluster.folder / "head.log").write_text("starting\nno room\n\n")
            return subprocess.Popen(["false"])

        monkeypatch.setattr(LocalCluster, "_ray_start", fail)
        with pytest.raises(InputError, match="head did not start in 3 attempts: no room"):
            local_cluster.up("a", workers=1)
        assert attempts == ["head"] * 3
        assert not (home / "clusters" / "a").exists()

    def test_while_another_process_is_at_it(self, home: Path) -> None:
        (home / "clusters").mkdir()
        with FileLock(home / "clusters" / "a.lock"), pytest.raises(InputError, match="by another process"):
            local_cluster.up("a", workers=1)

    def test_gpus_that_are_not_there(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7")
        with pytest.raises(InputError, match="worker2 is to have 2 GPUs, 1 are left"):
            local_cluster.up("a", workers=2, gpus=2)
        assert list((home / "clusters").iterdir()) == [home / "clusters" / "a.lock"]

    def test_namespaces_without_root(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        with pytest.raises(InputError, match="need root"):
            local_cluster.up("a", workers=1, namespaces=True)

    def test_namespaces_without_ip(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        monkeypatch.setenv("PATH", str(home))
        with pytest.raises(InputError, match="iproute2"):
            namespaces.require()

    def test_namespaces_that_are_anothers(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(namespaces, "NAMESPACES", home)
        monkeypatch.setattr(local_cluster, "require", lambda: None)
        (home / "onestage-a-switch").touch()
        with pytest.raises(InputError, match="onestage-a-switch are there already: choose another --name"):
            local_cluster.up("a", workers=1, namespaces=True)
        assert (home / "onestage-a-switch").exists()

    def test_cables_of_nodes_that_share_the_machine(self, home: Path, sleeper: psutil.Process) -> None:
        with pytest.raises(InputError, match="no cable to cut"):
            written("a", sleeper).cut("head")

    def test_nodes_that_are_none(self, home: Path, sleeper: psutil.Process) -> None:
        with pytest.raises(InputError, match="no node 'worker7': it has head"):
            written("a", sleeper).kill_node("worker7")


class TestCommandLine:
    def parsed(self, *words: str) -> argparse.Namespace:
        parser = argparse.ArgumentParser()
        verb.add(parser.add_subparsers())
        return parser.parse_args(["cluster", *words])

    def test_exec_gives_a_command_the_address_and_the_token(self, home: Path, sleeper: psutil.Process) -> None:
        cluster = written("a", sleeper)
        command = ["cluster", "exec", "--name", "a", "head", "--", "env", "--null"]
        done = run([sys.executable, "-c", VERB, *command])
        seen = dict(line.split("=", 1) for line in done.stdout.split("\0") if line)
        assert seen["RAY_ADDRESS"] == "127.0.0.1:6379"
        assert seen["RAY_AUTH_MODE"] == "token"
        assert seen["RAY_AUTH_TOKEN_PATH"] == str(cluster.token)

    def test_exec_returns_what_the_command_returned(self, home: Path, sleeper: psutil.Process) -> None:
        written("default", sleeper)
        assert run([sys.executable, "-c", VERB, "cluster", "exec", "--", "bash", "-c", "exit 7"]).returncode == 7

    @pytest.mark.parametrize("words", [[], ["--"], ["ray", "status"], ["head", "worker1", "--", "ls"]])
    def test_exec_without_a_command(self, home: Path, words: list[str]) -> None:
        options = self.parsed("exec", *words)
        with pytest.raises(InputError, match=r"exec \[NODE\] -- COMMAND"):
            options.run(options)

    def test_exec_of_what_is_not_installed(self, home: Path, sleeper: psutil.Process) -> None:
        written("default", sleeper)
        options = self.parsed("exec", "--", "no-such-program")
        with pytest.raises(InputError, match="no-such-program can't be run"):
            options.run(options)

    def test_down_twice_is_fine(self, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
        options = self.parsed("down", "--name", "a", "--json")
        assert options.run(options) == 0
        assert json.loads(capsys.readouterr().out) == {"name": "a", "ended": False}

    def test_status_of_a_dead_cluster(
        self, home: Path, sleeper: psutil.Process, capsys: pytest.CaptureFixture[str]
    ) -> None:
        written("a", sleeper).token.write_text("token")
        options = self.parsed("status", "--name", "a")
        assert options.run(options) == 0
        assert capsys.readouterr().out.split()[-3:] == ["head", "127.0.0.1", "dead"]


@pytest.mark.slow
def test_an_up_that_was_killed_halfway_is_cleaned_by_down(home: Path) -> None:
    starting = subprocess.Popen([sys.executable, "-c", VERB, "cluster", "up", "--name", "a", "--workers", "1"])
    try:
        state = home / "clusters" / "a" / "state.json"
        wait_until(lambda: state.exists() and local_cluster.load("a").running, within_s=60)
        temp = local_cluster.load("a").temp
        wait_until(lambda: len(processes_with(temp)) > 1, within_s=60)  # the head's first, beside `ray start`
    finally:
        starting.kill()
        starting.wait()
        assert local_cluster.down("a")
    assert processes_with(temp) == []
    assert not Path(temp).exists() and not (home / "clusters" / "a").exists()


@pytest.mark.slow
def test_what_could_not_be_started_leaves_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temps = set(Path("/tmp").glob("onestage-*"))
    monkeypatch.setattr(local_cluster, "START_S", 3.0)
    with pytest.raises(InputError, match="head did not start within 3 s"):
        local_cluster.up("a", workers=1)
    assert processes_with(str(home)) == []
    assert set(Path("/tmp").glob("onestage-*")) <= temps
    assert not (home / "clusters" / "a").exists()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """A head and two workers, by the command, whose process ends before the first test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONESTAGE_CACHE", str(tmp_path_factory.mktemp("home")))
        try:
            start = time.monotonic()
            done = run([sys.executable, "-c", VERB, "cluster", "up", "--name", "a", "--workers", "2", "--json"])
            print(f"head and two workers: {time.monotonic() - start:.1f} s")
            assert done.returncode == 0, done.stderr
            described = json.loads(done.stdout)
            cluster = local_cluster.load("a")
            assert described["address"] == cluster.address and all(node["alive"] for node in described["nodes"])
            yield cluster
        finally:
            local_cluster.down("a")


@pytest.mark.slow
class TestNodesOnThisMachine:
    def test_take_a_task_each_and_the_head_none(self, plain: LocalCluster) -> None:
        assert spread(plain, 2) == ["worker1", "worker2"]

    @pytest.mark.parametrize(
        "credentials",
        [{"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}],
        ids=["no token", "a wrong token"],
    )
    def test_refuse_a_driver_without_their_token(self, plain: LocalCluster, credentials: dict[str, str]) -> None:
        done = run([sys.executable, "-c", SPREAD, plain.address, "1"], **credentials)
        assert done.returncode != 0
        assert done.stdout == ""

    def test_keep_their_secrets(self, plain: LocalCluster) -> None:
        assert mode(plain.token) == 0o600
        assert mode(plain.folder) == 0o700 and mode(Path(plain.temp)) == 0o700
        token = plain.token.read_text()
        assert len(token) == 64
        assert all(token not in log.read_text() for log in plain.folder.glob("*.log"))
        for process in psutil.process_iter(["cmdline"]):
            assert all(token not in one for one in process.info["cmdline"] or [])

    def test_show_their_dashboard_on_the_loopback_alone_and_to_those_with_the_token(self, plain: LocalCluster) -> None:
        port = plain.ports["dashboard"]
        listening = [
            connection.laddr.ip
            for connection in psutil.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
        ]
        assert listening == ["127.0.0.1"]
        with pytest.raises(HTTPError, match=r"401|403"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/api/jobs/", timeout=10)

    def test_are_found_without_an_address(self, plain: LocalCluster) -> None:
        assert local_cluster.address() == plain.address

    def test_have_no_settings_of_the_shell_that_started_them(self, plain: LocalCluster) -> None:
        (process,) = {one for one in plain._processes(plain.host("worker1")) if one.name() == "raylet"}
        assert "PYTEST_CURRENT_TEST" not in process.environ()

    def test_come_back_to_a_head_that_was_killed(self, plain: LocalCluster) -> None:
        plain.kill_node("head")
        assert alive(plain) == []
        plain.restart_head()
        assert spread(plain, 2) == ["worker1", "worker2"]

    def test_are_started_again_and_added(self, plain: LocalCluster) -> None:
        plain.kill_node("worker1")
        wait_until(lambda: alive(plain) == ["head", "worker2"], within_s=60)
        plain.start_node("worker1")
        assert plain.add_node() == "worker3"
        assert alive(plain) == ["head", "worker1", "worker2", "worker3"]
        assert spread(plain, 3) == ["worker1", "worker2", "worker3"]

    def test_leave_nothing_behind(self, plain: LocalCluster) -> None:
        assert len(processes_with(plain.temp)) > 3
        done = run([sys.executable, "-c", VERB, "cluster", "down", "--name", "a"])
        assert done.returncode == 0
        assert processes_with(plain.temp) == []
        assert not Path(plain.temp).exists() and not plain.folder.exists()


@pytest.mark.cluster
@pytest.mark.slow
class TestHosts:
    def test_see_each_other_and_this_machine_sees_none(self, hosts: LocalCluster) -> None:  # noqa: F811
        assert {node.ip.rpartition(".")[2] for node in hosts.nodes} == {"1", "2", "3"}
        listed = run(hosts.command("worker1", ["ip", "-json", "address"])).stdout
        assert [one["ifname"] for one in json.loads(listed)] == ["lo", "eth0"]
        connect = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=5)"
        head, port = hosts.address.split(":")
        assert run(hosts.command("worker2", [sys.executable, "-c", connect, head, port])).returncode == 0
        here = run(["ip", "address"]).stdout + run(["ip", "route"]).stdout
        assert head not in here and "br0" not in here
        assert spread(hosts, 2) == ["worker1", "worker2"]

    def test_that_are_cut_off_are_given_up_and_can_come_back(self, hosts: LocalCluster) -> None:  # noqa: F811
        hosts.cut("worker2")
        print(f"cut off, noticed after {wait_until(lambda: alive(hosts) == ['head', 'worker1'], within_s=30):.1f} s")
        hosts.mend("worker2")
        hosts.start_node("worker2")
        assert spread(hosts, 2) == ["worker1", "worker2"]

    def test_that_are_killed_have_no_process_left(self, hosts: LocalCluster) -> None:  # noqa: F811
        beside = subprocess.Popen(hosts.command("worker1", ["sleep", "60"]))
        hosts.kill_node("worker1")
        assert beside.wait(timeout=5) == -9
        assert run(["ip", "netns", "pids", f"onestage-{hosts.name}-worker1"]).stdout == ""
        print(f"killed, noticed after {wait_until(lambda: alive(hosts) == ['head', 'worker2'], within_s=30):.1f} s")
        hosts.start_node("worker1")
        assert spread(hosts, 2) == ["worker1", "worker2"]

    def test_come_back_to_a_head_that_was_killed(self, hosts: LocalCluster) -> None:  # noqa: F811
        hosts.kill_node("head")
        hosts.restart_head()
        assert spread(hosts, 2) == ["worker1", "worker2"]

    def test_are_joined_by_another(self, hosts: LocalCluster) -> None:  # noqa: F811
        assert hosts.add_node() == "worker3"
        assert spread(hosts, 3) == ["worker1", "worker2", "worker3"]

    def test_are_in_sight_of_no_other_process(self, hosts: LocalCluster) -> None:  # noqa: F811
        found = local_cluster.find(hosts.address)
        assert found is not None and found.token == hosts.token
        assert local_cluster.address() != hosts.address
