"""A SQLite store and a real MLflow server, both made once: a new store takes 5 s, a server 10."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from onestage.tracking import runs

START_LIMIT_S = 60.0


class Server:
    """`mlflow server` on one loopback port, which a test may stop, freeze and start again."""

    def __init__(self, *, folder: Path, database: Path) -> None:
        self._folder = folder
        self._database = database
        self._process: subprocess.Popen[bytes] | None = None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [Path(sys.executable).parent / "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self._database}"]
        command += ["--artifacts-destination", self._folder / "artifacts"]
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_LIMIT_S
        while True:
            try:
                urlopen(f"{self.uri}/health", timeout=1).close()
                return
            except (URLError, OSError):
                if time.monotonic() > deadline or self._process.poll() is not None:
                    raise
                time.sleep(0.2)

    def signal(self, number: int) -> None:
        """To the server and its workers, which are a process group of their own."""
        assert self._process is not None
        os.killpg(self._process.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        assert self._process is not None
        self._process.wait(timeout=10)


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URI of a SQLite store; tests keep apart by their experiments' names."""
    uri = runs.tracking_uri(f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db")
    runs.check(uri)
    return uri


@pytest.fixture(scope="session")
def server(store: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    database = folder / "mlflow.db"
    shutil.copy(store.removeprefix("sqlite:///"), database)
    server = Server(folder=folder, database=database)
    server.start()
    yield server
    server.kill()
