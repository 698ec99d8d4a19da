"""A SQLite store, a real MLflow server and a real PostgreSQL, each made once: a new store takes 5 s, a server 10."""

import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from onestage.tracking import runs

START_LIMIT_S = 60.0


class Server:
    """`mlflow server` on one loopback port, which a test may stop, freeze and start again."""

    def __init__(self, *, folder: Path, database: Path) -> None:
        self.folder = folder
        self._database = database
        self._process: subprocess.Popen[bytes] | None = None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [Path(sys.executable).parent / "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self._database}"]
        command += ["--artifacts-destination", self.folder / "artifacts"]
        with (self.folder / "server.log").open("ab") as log:
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


class Proxy:
    """In front of a server: a test may have it answer 500 (``failing``), also after the server has done what it was
    asked to (``lose_answers``), or wait before each answer (``delay_s``).
    """

    def __init__(self, port: int) -> None:
        self.failing = False
        self.delay_s = 0.0
        self.lose_answers = False
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def forward(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                time.sleep(outer.delay_s)
                if outer.failing:
                    self.send_error(500)
                    return
                try:
                    upstream = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
                    upstream.request(self.command, self.path, body, dict(self.headers))
                    answer = upstream.getresponse()
                    content = answer.read()
                    upstream.close()
                except OSError:
                    self.close_connection = True  # as the server's own
                    return
                if outer.lose_answers:
                    self.send_error(500)  # the server has done it
                    return
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = forward

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: object) -> None:
                """Clients that did not wait for their answer are what the tests are about."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    proxy = Proxy(server.port)
    yield proxy
    proxy.close()


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
