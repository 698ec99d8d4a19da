"""`onestage server` as a person starts and ends it: a real process, over SQLite and over a real PostgreSQL."""

import base64
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import webbrowser
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import psutil
import pytest

from onestage.cli import main
from onestage.errors import InputError
from onestage.tracking import registry, runs, server_auth
from onestage.tracking import server as servers
from onestage.tracking.client import client
from onestage.tracking.mlflow_tracker import MlflowTracker

LIMIT_S = 200
SCREENS = ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")


class Started:
    """`onestage server --json`, which has told where it answers."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.words = [sys.executable, "-m", "onestage.cli", "server", "--port", "0", "--workers", "1", "--json", *words]
        self.process = subprocess.Popen(
            self.words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_clean()
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise AssertionError(self.process.communicate()[1])
        self.told: dict[str, Any] = json.loads(line)
        self.address: str = self.told["address"]

    def family(self) -> list[psutil.Process]:
        own = psutil.Process(self.process.pid)
        return [own, *own.children(recursive=True)]

    def end(self, number: int) -> tuple[int, list[psutil.Process]]:
        """Its exit code, and what is left of it."""
        family = self.family()
        self.process.send_signal(number)
        code = self.process.wait(60)
        return code, psutil.wait_procs(family, timeout=30)[1]


def _clean() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}


Start = Callable[..., Started]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    made: list[Started] = []

    def start(*words: str) -> Started:
        made.append(Started(tmp_path, *words))
        return made[-1]

    yield start
    for one in made:
        if one.process.poll() is None:
            one.end(signal.SIGKILL)


def get(address: str, *, user: str | None = None) -> bytes:
    headers = {} if user is None else {"Authorization": "Basic " + base64.b64encode(user.encode()).decode()}
    with urlopen(Request(address, headers=headers), timeout=30) as answer:
        body: bytes = answer.read()
        return body


@pytest.mark.slow
@pytest.mark.timeout(LIMIT_S)
def test_with_auth_over_the_store_that_trainings_left(
    start: Start, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(store.removeprefix("sqlite:///"), tmp_path / "mlflow.db")
    before = runs.tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    run_id = runs.open_run(before, "before", tags={})
    note = tmp_path / "note.txt"
    note.write_text("from a training without a server")
    client(before).log_artifact(run_id, str(note))

    one = start("--auth")
    password_file = Path(one.told["password_file"])
    assert stat.S_IMODE(password_file.stat().st_mode) == 0o600
    assert stat.S_IMODE(password_file.parent.stat().st_mode) == 0o700
    password = password_file.read_text().strip()
    assert len(password) >= 20 and password not in json.dumps(one.told)
    assert not [process for process in one.family() if password in " ".join(process.cmdline())]

    # As MLflow's page asks for it: the artifacts of a store's own folders are there as well.
    artifact = f"{one.address}/get-artifact?path=note.txt&run_uuid={run_id}"
    with pytest.raises(HTTPError, match="401"):
        get(artifact)
    with pytest.raises(HTTPError, match="401"):
        get(artifact, user="admin:wrong")
    assert get(artifact, user=f"admin:{password}") == note.read_bytes()
    with pytest.raises(InputError, match="asks for user and password: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACK"):
        runs.check(one.address)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
    runs.check(one.address)
    assert runs.find_run(one.address, run_id).experiment == "before"

    assert servers.running(before) == one.address
    assert one.end(signal.SIGINT) == (0, [])
    assert servers.running(before) is None
    assert one.process.stderr is not None and password not in one.process.stderr.read()
    assert start("--auth").told["password_file"] == str(password_file)
    assert password_file.read_text().strip() == password


@pytest.mark.slow
@pytest.mark.timeout(LIMIT_S)
def test_a_run_in_postgresql(start: Start, postgresql: str, tmp_path: Path) -> None:
    one = start("--backend", postgresql)
    secret = postgresql.partition("://")[2].partition("@")[0].partition(":")[2]
    assert secret and secret not in json.dumps(one.told)
    assert not [process for process in one.family() if secret in " ".join(process.cmdline())]
    assert one.told["artifacts"] == str(tmp_path / "mlartifacts")

    run_id = runs.open_run(one.address, "elephants", name="first", tags={})
    tracker = MlflowTracker(uri=one.address, run_id=run_id, folder=tmp_path / "spool")
    tracker.log_params({"detector": "yolov3_tiny"})
    for step in range(5):
        tracker.log_metrics({"train/loss": 1.0 / (step + 1)}, step)
    tracker.log_picture("val/0", np.full((8, 8, 3), 127, np.uint8), 4)
    tracker.log_text("six by nine", "notes/answer.txt")
    assert tracker.close(60)
    assert runs.end_run(one.address, run_id, "FINISHED")

    found = runs.find_run(one.address, run_id)
    assert (found.experiment, found.status, found.params) == ("elephants", "FINISHED", {"detector": "yolov3_tiny"})
    history = client(one.address).get_metric_history(run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(step, 1.0 / (step + 1)) for step in range(5)]
    assert found.artifact_uri.startswith("mlflow-artifacts:/")
    file = runs.download(one.address, run_id, "notes/answer.txt", tmp_path / "fetched")
    assert file.read_text() == "six by nine"
    assert list((tmp_path / "mlartifacts").rglob("answer.txt"))  # by way of the server, on its disk

    mlflow = client(one.address)
    made = mlflow.create_logged_model(mlflow.get_run(run_id).info.experiment_id, name="model", source_run_id=run_id)
    mlflow.finalize_logged_model(made.model_id, "READY")
    version = registry.register(one.address, "cells", run_id)
    registry.give(one.address, version, registry.CHAMPION)
    held = registry.holder(one.address, "cells")
    assert held is not None and (held.version, held.run_id) == ("1", run_id)
    assert registry.of_run(one.address, "cells", run_id) is not None
    assert one.end(signal.SIGTERM) == (0, [])


@pytest.mark.slow
@pytest.mark.timeout(LIMIT_S)
def test_a_server_is_found_by_the_dashboard_and_goes_with_its_killed_starter(
    start: Start, store: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = start("--backend", store)
    for name in SCREENS:
        monkeypatch.delenv(name, raising=False)
    assert main(["dashboard", f"tracking.uri={store}"]) == 0
    assert capsys.readouterr().out == f"no browser here: open {one.address}\n"
    code, left = one.end(signal.SIGKILL)
    assert (code, left) == (-signal.SIGKILL, [])
    assert servers.running(store) is None


def test_a_store_that_is_a_server_is_opened_before_a_screen(
    server: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(webbrowser, "open", lambda address: opened.append(address) or True)
    assert main(["dashboard", f"tracking.uri={server.uri}"]) == 0
    assert opened == [server.uri] and capsys.readouterr().out == f"opened {server.uri}\n"


def test_a_taken_port_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert main(["server", "--backend", f"sqlite:///{tmp_path}/m.db", "--port", str(port)]) == 2
    assert f"127.0.0.1:{port} can't be listened on (Address already in use)" in capsys.readouterr().err


def test_no_database_is_one_line_within_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    assert main(["server", "--backend", "postgresql://ann:secret@127.0.0.1:9/runs"]) == 2
    said = capsys.readouterr().err
    assert "no database at postgresql://***@127.0.0.1:9/runs: " in said and "secret" not in said
    assert time.monotonic() - began < 20


def test_a_server_is_no_store_for_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["server", "--backend", "http://ann:pw@host:5000"]) == 2
    assert "http://***@host:5000 is a server itself" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("missing", "words", "extra"),
    [("psycopg", ["--backend", "postgresql://host/runs"], "postgresql"), ("flask_wtf", ["--auth"], "auth")],
)
def test_what_is_not_installed_is_named(
    missing: str, words: list[str], extra: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (servers, server_auth):
        monkeypatch.setattr(module, "find_spec", lambda name: None if name == missing else object())
    assert main(["server", "--port", "0", *words]) == 2
    assert f"pip install 'onestage[{extra}]'" in capsys.readouterr().err


def test_a_password_of_users_that_are_there_is_not_made_anew(tmp_path: Path) -> None:
    server_auth.prepare(tmp_path)
    (tmp_path / server_auth.FOLDER / "users.db").touch()
    server_auth.password_file(tmp_path).unlink()
    with pytest.raises(InputError, match="is gone, but"):
        server_auth.prepare(tmp_path)
