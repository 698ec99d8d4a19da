"""The driver's process and the one that watches it: what it says, how it ends, and what starts it again."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from onestage.cluster import supervisor
from onestage.cluster.job import Job
from onestage.cluster.stop import Preempted, Stop
from onestage.errors import InputError
from onestage.training.endings import Diverged

Play = Callable[[str], tuple[Job, list[dict[str, Any]]]]

DRIVER = """
import json, os, pathlib, signal, sys, time
job = json.loads(sys.stdin.readline())
out = os.fdopen(int(os.environ["ONESTAGE_DRIVER_MESSAGES"]), "w", buffering=1)
runs = pathlib.Path(job["folder"]) / "runs"
number = len(runs.read_text()) if runs.exists() else 0
runs.write_text("x" * (number + 1))
def say(message):
    out.write(json.dumps(message) + "\\n")
def error(kind, message):
    say({"error": {"kind": kind, "message": message, "story": "Traceback of the driver"}})
"""


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Play:
    """A driver that does what is written here; the number of its starts is ``number``."""
    package = tmp_path / "path" / "played"
    package.mkdir(parents=True)

    def write(script: str) -> tuple[Job, list[dict[str, Any]]]:
        (package / "driver.py").write_text(DRIVER + textwrap.dedent(script))
        monkeypatch.setattr(supervisor, "DRIVER", [sys.executable, str(package / "driver.py")])
        cluster = {"max_failures": 2, "backoff_s": 0.01, "address": "auto"}
        return Job(config={"cluster": cluster}, run_id="r", folder=str(tmp_path), tracking_uri=None), []

    return write


def test_what_the_driver_says_arrives_in_order_and_its_result_is_the_end(play: Play) -> None:
    job, said = play("""
        print("noise on stdout")
        for step in range(3): say({"step": step})
        say({"result": {"metrics": {"val/map": 0.5}}})
    """)
    assert supervisor.run(job, show=said.append, stop=Stop()) == {"metrics": {"val/map": 0.5}}
    assert said == [{"step": 0}, {"step": 1}, {"step": 2}]


@pytest.mark.parametrize(
    ("kind", "error"), [("input", InputError), ("diverged", Diverged), ("failed", supervisor.DriverFailed)]
)
def test_an_error_that_another_try_would_not_mend_is_raised_here(play: Play, kind: str, error: type[Exception]) -> None:
    job, said = play(f"error({kind!r}, 'as the driver said it')")
    with pytest.raises(error, match="as the driver said it"):
        supervisor.run(job, show=said.append, stop=Stop())
    assert (Path(job["folder"]) / "runs").read_text() == "x", "started once"


def test_a_driver_that_dies_is_started_again(play: Play) -> None:
    job, said = play("""
        say({"step": 3 + number})
        if number < 2: os.kill(os.getpid(), signal.SIGKILL)
        say({"result": {"starts": number + 1}})
    """)
    assert supervisor.run(job, show=said.append, stop=Stop()) == {"starts": 3}
    lost = [message["lost"] for message in said if "lost" in message]
    assert len(lost) == 2 and "exit code -9" in lost[0]


def test_a_driver_that_gets_no_further_is_given_up_at_the_limit(play: Play) -> None:
    job, said = play("error('lost', 'the head is gone')")
    with pytest.raises(supervisor.DriverFailed, match="the head is gone"):
        supervisor.run(job, show=said.append, stop=Stop())
    assert (Path(job["folder"]) / "runs").read_text() == "xxx", "started, and twice again"


def test_a_wish_to_stop_reaches_the_driver_as_its_signal(play: Play) -> None:
    job, said = play("""
        def saved(*_):
            say({"note": "saved"})
            error("preempted", "")
            sys.exit()
        signal.signal(signal.SIGTERM, saved)
        say({"step": 1})
        time.sleep(60)
    """)
    stop = Stop()

    def ask(message: dict[str, Any]) -> None:
        said.append(message)
        if "step" in message:
            threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()

    started = time.monotonic()
    with pytest.raises(Preempted), stop.signals():
        supervisor.run(job, show=ask, stop=stop)
    assert {"note": "saved"} in said
    assert time.monotonic() - started < 30


def test_a_driver_that_was_begun_takes_the_first_job_alone(play: Play) -> None:
    job, said = play("say({'result': {'pid': os.getpid()}})")
    with supervisor.begun("auto") as run:
        first, second = (run(job, said.append, Stop())["pid"] for _ in range(2))
    assert first != second


def test_a_driver_without_a_job_ends_with_its_block(play: Play) -> None:
    play("")
    before = psutil.Process().children()
    with supervisor.begun("auto"):
        (began,) = set(psutil.Process().children()) - set(before)
    assert not began.is_running()


def test_a_driver_knows_its_clusters_token_before_it_imports_ray() -> None:
    """Ray reads it then, and a cluster of ours refuses whoever shows none."""
    code = """
import sys
from onestage.cluster import connection, driver
connection.resolved = lambda address: address
connection.show_token = lambda address: sys.exit("ray" in sys.modules or address != "here:1")
sys.argv = ["driver", "here:1"]
driver.main()
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
