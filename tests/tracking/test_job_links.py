"""The MLflow runs of jobs: found in a store and on a server, and given up where nobody answers."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from onestage.tracking import runs
from onestage.tracking.client import client
from onestage.tracking.job_links import runs_of_jobs

LONG_S = 60.0


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def test_of_two_runs_of_a_job_the_newer_and_only_of_the_jobs_asked_for(store: str) -> None:
    runs.open_run(store, "links", tags={"onestage.job": "links-1"})
    runs.open_run(store, "links", tags={"onestage.job": "links-2"})
    time.sleep(0.01)  # their starts are told apart by milliseconds
    newer = runs.open_run(store, "other-links", tags={"onestage.job": "links-1"})
    assert runs_of_jobs({store: ["links-1", "links-3"]}, limit_s=LONG_S) == {"links-1": newer}


def test_a_run_that_was_resumed_belongs_to_several_jobs(store: str) -> None:
    run = runs.open_run(store, "links", tags={"onestage.job": "links-4 links-5"})
    assert runs_of_jobs({store: ["links-4", "links-5"]}, limit_s=LONG_S) == {"links-4": run, "links-5": run}


def test_a_servers_link_is_the_address_of_the_runs_page_without_the_password(server: Any) -> None:
    run = runs.open_run(server.uri, "links", tags={"onestage.job": "links-6"})
    experiment = client(server.uri).get_run(run).info.experiment_id
    uri = server.uri.replace("http://", "http://ann:pw@")
    page = f"{server.uri}/#/experiments/{experiment}/runs/{run}"
    assert runs_of_jobs({uri: ["links-6"]}, limit_s=LONG_S) == {"links-6": page}


def test_a_store_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    assert runs_of_jobs({f"sqlite:///{tmp_path}/mlflow.db": ["links-7"]}, limit_s=LONG_S) == {}
    assert list(tmp_path.iterdir()) == []


def test_one_store_that_is_silent_takes_no_links_of_another(store: str, silent: str) -> None:
    run = runs.open_run(store, "links", tags={"onestage.job": "links-8"})
    assert runs_of_jobs({silent: ["links-9"], store: ["links-8"]}, limit_s=3.0) == {"links-8": run}


def test_a_silent_server_holds_neither_the_answer_nor_the_end_of_the_process(silent: str) -> None:
    code = (
        "import mlflow, time\nfrom onestage.tracking.job_links import runs_of_jobs\nstart = time.time()\n"
        f"assert runs_of_jobs({{{silent!r}: ['job']}}, limit_s=1.0) == {{}}\nprint(start)"
    )
    environment = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "60", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    ran = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=150, check=True
    )
    assert time.time() - float(ran.stdout) < 10
