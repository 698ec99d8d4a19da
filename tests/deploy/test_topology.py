"""The services of compose.yaml as processes of this machine, by the very commands and environment that it holds.

What differs is what containers bring: names become 127.0.0.1 with ports of the tests' own, `/run/secrets` the folder
of make_secrets.sh, and each Ray node has its temporary folder and agent's port. PostgreSQL is Debian's, S3 is moto's.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import psutil
import psycopg
import pytest

from onestage.tracking.client import client

from ..conftest import free_port
from .conftest import clean, compose

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SMALL = [
    "detector=yolov3_tiny", "detector.width=0.125", "detector.input_size=[64,64]", "augment=none", "data.batch_size=8",
    "trainer.num_pictures=0", "data.num_workers=0", "trainer.max_epochs=1", "storage=s3://onestage/runs",
]  # fmt: skip


class Topology:
    """compose.yaml's services, started in order; ``outside`` is the environment of a user of the machine."""

    def __init__(self, folder: Path, secrets: Path, postgresql: str, s3: str) -> None:
        self.folder, self.services = folder, compose()["services"]
        self.started: list[tuple[list[str], subprocess.Popen[bytes]]] = []
        self.mlflow, self.gcs, self.dashboard = (free_port() for _ in range(3))
        database = urlsplit(postgresql)
        self.database = database._replace(path="/mlflow").geturl()
        self.places = {
            "/run/secrets": str(secrets),
            "0.0.0.0": "127.0.0.1",
            "mlflow:5000": f"127.0.0.1:{self.mlflow}",
            "--port=5000": f"--port={self.mlflow}",
            "postgresql://postgres/mlflow": f"postgresql://127.0.0.1:{database.port}/mlflow",
            "http://s3:8333": s3,
            "ray-head:6379": f"127.0.0.1:{self.gcs}",
            "--port=6379": f"--port={self.gcs}",
            "--dashboard-port=8265": f"--dashboard-port={self.dashboard}",
            "--num-cpus=2": "--num-cpus=1",
        }
        self.outside = {
            **clean(),
            "RAY_AUTH_TOKEN_PATH": str(secrets / "ray_token"),
            "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{self.mlflow}",
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{self.dashboard}",
        }

    def here(self, text: str) -> str:
        """What stands in the file, as it is called on this machine."""
        for there, here in self.places.items():
            text = text.replace(there, here)
        return text

    def start(self, service: str, *more: str) -> subprocess.Popen[bytes]:
        held = self.services[service]
        command = [*map(self.here, held["command"]), *more]
        process = self.run(command, held)
        self.started.append((command, process))
        return process

    def run(self, command: Sequence[str], held: Mapping[str, Any]) -> subprocess.Popen[bytes]:
        environment = {key: self.here(value) for key, value in held["environment"].items()}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        with (self.folder / f"{time.monotonic_ns()}.log").open("w") as log:
            return subprocess.Popen(
                command,
                env={**clean(), "PATH": path, **environment},
                cwd=self.folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def ray(self, service: str) -> subprocess.Popen[bytes]:
        temporary = tempfile.mkdtemp(prefix="ray-", dir=self.folder)
        ports = ["--dashboard-agent-listen-port=0", "--min-worker-port=0", "--max-worker-port=0"]
        ports.append(f"--metrics-export-port={free_port()}")  # instead of the file's own, as with all that comes last
        memory = "--object-store-memory=100000000"
        return self.start(service, "--node-ip-address=127.0.0.1", f"--temp-dir={temporary}", memory, *ports)

    def is_healthy(self, service: str) -> bool:
        """What the service's own health check asks."""
        address = self.here(self.services[service]["healthcheck"]["test"][-1])
        try:
            with urlopen(address.replace(":5000/", f":{self.mlflow}/"), timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def nodes(self) -> int:
        """Those of the cluster that live, as its dashboard has them; one that ended is started again, as Docker does.

        Ray gives a node 30 s to start, and ends it where a busy machine takes longer.
        """
        for place, (command, process) in enumerate(self.started):
            if command[0] == "ray" and process.poll() is not None:
                self.started[place] = (command, self.run(command, self.services["ray-worker"]))
        token = Path(self.outside["RAY_AUTH_TOKEN_PATH"]).read_text()
        address = f"http://127.0.0.1:{self.dashboard}/api/v0/nodes?filter_keys=state&filter_predicates=%3D&filter_values=ALIVE"
        try:
            with urlopen(Request(address, headers={"Authorization": f"Bearer {token}"}), timeout=5) as answer:
                return int(json.load(answer)["data"]["result"]["num_filtered"])
        except OSError:
            return 0

    def held(self) -> list[str]:
        """The keys in the bucket."""
        import boto3

        keys = {"aws_access_key_id": "any", "aws_secret_access_key": "any", "region_name": "us-east-1"}
        pages = boto3.client("s3", endpoint_url=self.places["http://s3:8333"], **keys).get_paginator("list_objects_v2")
        return [one["Key"] for page in pages.paginate(Bucket="onestage") for one in page.get("Contents", [])]

    def log(self) -> str:
        return "\n".join(f"{file.name}: {file.read_text()[-2000:]}" for file in sorted(self.folder.glob("*.log")))

    def end(self) -> None:
        for _, process in reversed(self.started):
            with suppress(psutil.NoSuchProcess):
                for one in [*psutil.Process(process.pid).children(recursive=True), process]:
                    with suppress(psutil.NoSuchProcess):
                        one.kill()
            process.wait(30)


def until(condition: Callable[[], Any], topology: Topology, *, within_s: float = 120) -> None:
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, topology.log()
        time.sleep(0.5)


@pytest.fixture(scope="module")
def topology(secrets: Path, postgresql: str, s3_server: str) -> Iterator[Topology]:
    password = (secrets / "postgres_password").read_text()
    with psycopg.connect(postgresql, autocommit=True) as connection:  # as the image does at its first start
        connection.execute(f"CREATE USER mlflow PASSWORD '{password}'")
        connection.execute("CREATE DATABASE mlflow OWNER mlflow")
    folder = Path(tempfile.mkdtemp(prefix="onestage-"))  # Ray's sockets want a short path
    all_of_it = Topology(folder, secrets, postgresql, s3_server)
    try:
        assert all_of_it.start("bucket").wait(60) == 0, all_of_it.log()
        all_of_it.start("mlflow")
        until(lambda: all_of_it.is_healthy("mlflow"), all_of_it)
        all_of_it.ray("ray-head")
        until(lambda: all_of_it.nodes() == 1, all_of_it)
        for number in range(all_of_it.services["ray-worker"]["deploy"]["replicas"]):
            all_of_it.ray("ray-worker")
            until(lambda: all_of_it.nodes() == 2 + number, all_of_it)  # noqa: B023
        yield all_of_it
    finally:
        all_of_it.end()
        shutil.rmtree(folder, ignore_errors=True)


def onestage(topology: Topology, folder: Path, *words: str, code: int = 0, **more: str) -> str:
    """What a user of the machine is told by a command."""
    done = subprocess.run(
        [sys.executable, "-m", "onestage.cli", *words],
        cwd=folder,
        env={**topology.outside, **more},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr + topology.log()
    return done.stdout + done.stderr


def test_a_training_and_a_sweep_from_outside_are_found_in_mlflow(
    topology: Topology, digits: Path, tmp_path: Path
) -> None:
    uri = topology.outside["MLFLOW_TRACKING_URI"]
    small = [*SMALL, f"data.root={digits}"]
    onestage(topology, tmp_path, "submit", "train", *small, "cluster.num_workers=2", "--follow")
    swept = ["optimizer.lr=1e-3,1e-4", "sweep.name=rates"]
    onestage(topology, tmp_path, "submit", "sweep", *small, *swept, "--follow")

    experiments = [one.experiment_id for one in client(uri).search_experiments(filter_string="name = 'onestage'")]
    runs = client(uri).search_runs(experiments)
    assert [run.info.status for run in runs] == ["FINISHED"] * 4  # the training, the sweep and its two trials
    trained = [run for run in runs if "val/map" in run.data.metrics]
    assert len(trained) == 3
    for run in trained:
        assert run.info.artifact_uri.startswith("mlflow-artifacts:/")
        assert "config.json" in [file.path for file in client(uri).list_artifacts(run.info.run_id)]
    board = json.loads(onestage(topology, tmp_path, "leaderboard", "--sweep", "rates", "--json").splitlines()[-1])
    assert {float(one["point"]["optimizer.lr"]) for one in board["runs"]} == {1e-3, 1e-4}

    held = topology.held()
    assert any(key.startswith("artifacts/") and key.endswith("model.safetensors") for key in held)
    assert sum(key.startswith("runs/") and key.endswith("/last.ckpt") for key in held) == 3
    with psycopg.connect(topology.database) as connection:
        assert connection.execute("SELECT count(*) FROM runs").fetchone() == (4,)


def test_who_has_no_token_or_a_wrong_one_is_told_so(topology: Topology, tmp_path: Path) -> None:
    (tmp_path / "wrong").write_text("0" * 64)
    told = onestage(topology, tmp_path, "list", code=2, RAY_AUTH_TOKEN_PATH=str(tmp_path / "wrong"))
    assert told.count("\n") == 1 and "refuses the token" in told


def test_no_secret_is_seen_in_ps_or_in_a_log(topology: Topology, secrets: Path) -> None:
    key = re.search(r"aws_secret_access_key=(\w+)", (secrets / "aws_credentials").read_text())
    assert key is not None
    private = [(secrets / name).read_text().strip() for name in ("postgres_password", "ray_token")] + [key[1]]
    shown = topology.log() + subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert not [one for one in private if one in shown]
