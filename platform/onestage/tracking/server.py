"""An MLflow server for the project's store: MLflow's own, started as it should be, watched, and ended whole."""

import ctypes
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final
from urllib.error import HTTPError
from urllib.request import urlopen

from onestage.errors import InputError
from onestage.tracking import server_auth
from onestage.tracking.client import DEFAULTS, SQLITE, is_server
from onestage.tracking.origin import is_alive, process_tags
from onestage.tracking.redaction import redact

PORT: Final = 5000
START_LIMIT_S: Final = 180.0
"""MLflow's import, and the tables of a new store."""
STOP_LIMIT_S: Final = 10.0
CONNECT_LIMIT_S: Final = 5
LOOPBACK: Final = frozenset({"127.0.0.1", "localhost", "::1"})
ANY_HOST: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}
POSTGRESQL: Final = re.compile(r"postgres(?:ql)?(?:\+psycopg)?://")
REASON: Final = re.compile(r"\b(error|exception|refus|denied|fail)", re.IGNORECASE)
KEPT_LINES: Final = 200
PR_SET_PDEATHSIG: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """``backend`` is the store's absolute URI, ``artifacts`` a folder or an address, ``folder`` what is kept beside."""

    backend: str
    artifacts: str
    folder: Path
    host: str = "127.0.0.1"
    port: int = PORT
    workers: int = 2
    auth: bool = False
    allowed_hosts: str | None = None

    @property
    def is_public(self) -> bool:
        return self.host not in LOOPBACK


def settings_of(backend: str, artifacts: str | None, **others: object) -> Settings:
    """Raises InputError for a backend that no server keeps runs in, or whose driver is not installed."""
    if is_server(backend):
        raise InputError(f"{redact(backend)} is a server itself: name a database with --backend")
    folder = Path(backend.removeprefix(SQLITE)).parent if backend.startswith(SQLITE) else Path.cwd()
    if POSTGRESQL.match(backend):
        if find_spec("psycopg") is None:
            raise InputError("PostgreSQL needs a driver that is not installed: pip install 'onestage[postgresql]'")
        backend = POSTGRESQL.sub("postgresql+psycopg://", backend)  # whatever driver this SQLAlchemy would take
    place = artifacts if artifacts and "://" in artifacts else str((folder / (artifacts or "mlartifacts")).resolve())
    return Settings(backend=backend, artifacts=place, folder=folder, **others)  # type: ignore[arg-type]


def has_password(backend: str) -> bool:
    """Whether a store's URI holds one."""
    return redact(backend) != backend


class Server:
    """One server process with its workers, in a process group of their own."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._port = settings.port
        self._process: subprocess.Popen[bytes] | None = None
        self._said: deque[str] = deque(maxlen=KEPT_LINES)

    @property
    def address(self) -> str:
        host = ANY_HOST.get(self.settings.host, self.settings.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self._port}"

    def start(self) -> None:
        """Returns when the server answers. Raises InputError where it can't be had, and leaves nothing behind then."""
        settings = self.settings
        _check_backend(settings.backend)
        self._port = _free(settings.host, settings.port)
        environment = {**os.environ, **DEFAULTS, **_environment(settings)}
        self._process = subprocess.Popen(
            self._command(),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is ours to pass on
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
        threading.Thread(target=self._listen, daemon=True, name="mlflow-server").start()
        try:
            self._until_it_answers()
        except BaseException:
            self.stop()
            raise
        with suppress(OSError):  # where it can't be written, dashboard does not find the server
            _record(settings.backend).write_text(json.dumps({"address": self.address, **process_tags()}))

    def wait(self) -> int:
        """The server's exit code, once it has ended by itself."""
        assert self._process is not None
        return self._process.wait()

    def stop(self) -> None:
        """Ends it with all that it started."""
        if self._process is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_LIMIT_S)
        _record(self.settings.backend).unlink(missing_ok=True)

    def last_words(self) -> str:
        """The last thing that it said that reads as a reason."""
        lines = list(self._said)
        reasons = [line for line in lines if REASON.search(line)]
        return redact(next(reversed(reasons or lines), "it said nothing"))

    def _listen(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        for line in self._process.stdout:
            if text := line.decode(errors="replace").strip():
                self._said.append(text)

    def _command(self) -> list[str]:
        settings = self.settings
        command = [sys.executable, "-m", "mlflow", "server", "--host", settings.host, "--port", str(self._port)]
        command += ["--workers", str(settings.workers), "--serve-artifacts"]
        command += ["--app-name", "basic-auth"] if settings.auth else []
        return command + (["--allowed-hosts", settings.allowed_hosts] if settings.allowed_hosts else [])

    def _until_it_answers(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise InputError(f"MLflow's server ended at its start: {self.last_words()}")
            if answers(self.address):
                return
            time.sleep(0.2)
        raise InputError(f"MLflow's server did not answer within {START_LIMIT_S:.0f} s: {self.last_words()}")


def answers(address: str) -> bool:
    """Whether a server gives a sign of life."""
    try:
        urlopen(f"{address}/health", timeout=2).close()
    except HTTPError as error:
        return error.code in (401, 403)  # it knows neither us nor the name that we call it by, but it's there
    except (OSError, ValueError):
        return False
    return True


def running(backend: str) -> str | None:
    """The address of the server that this host runs for a store; None where there is none."""
    try:
        told = json.loads(_record(backend).read_text())
    except (OSError, ValueError):
        return None
    return str(told["address"]) if is_alive(told) and answers(told["address"]) else None


def _record(backend: str) -> Path:
    """Where a running server is written down."""
    if backend.startswith(SQLITE):
        file = Path(backend.removeprefix(SQLITE))
        return file.with_name(f".{file.name}.server")
    return Path.cwd() / ".mlflow.server"


def _environment(settings: Settings) -> dict[str, str]:
    """What `ps` would show among the arguments: a database's URI may hold its password."""
    told = {
        "MLFLOW_BACKEND_STORE_URI": settings.backend,
        "MLFLOW_REGISTRY_STORE_URI": settings.backend,
        "MLFLOW_ARTIFACTS_DESTINATION": settings.artifacts,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # seven processes, for what detectors have no use for
        "MLFLOW_TRACKING_URI": "",  # of the clients here, who may mean another store
    }
    if settings.auth:
        told |= {
            "MLFLOW_AUTH_CONFIG_PATH": str(server_auth.prepare(settings.folder)),
            "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),
        }
    return told


def _check_backend(backend: str) -> None:
    """Raises InputError, within seconds, where no database answers; MLflow tries it for minutes."""
    if not POSTGRESQL.match(backend):
        return
    import psycopg

    try:
        psycopg.connect(POSTGRESQL.sub("postgresql://", backend), connect_timeout=CONNECT_LIMIT_S).close()
    except psycopg.Error as error:
        reason = redact(" ".join(str(error).split()))
        raise InputError(f"no database at {redact(POSTGRESQL.sub('postgresql://', backend))}: {reason}") from None


def _free(host: str, port: int) -> int:
    """The port, where nobody listens on it; a free one for 0. Raises InputError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with closing(socket.socket(family)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
        try:
            probe.bind((host, port))
        except socket.gaierror as error:
            raise InputError(f"no host {host!r}: {error.strerror}") from error
        except OSError as error:
            what = f"{host}:{port} can't be listened on ({error.strerror})"
            raise InputError(f"{what}: choose another port with --port, 0 for any") from error
        return int(probe.getsockname()[1])


def _end_with_parent() -> None:
    """In the server, before it starts: SIGTERM when the process that started it is gone, however it went."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def shown(settings: Settings) -> Mapping[str, str]:
    """What a person may read of the settings."""
    return {"store": redact(POSTGRESQL.sub("postgresql://", settings.backend)), "artifacts": redact(settings.artifacts)}
