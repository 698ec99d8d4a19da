"""The process that watches a sweep on a cluster, and what it makes of the end of the one that sweeps."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from onestage.cluster.restarts import Restarts
from onestage.sweeps import supervisor

SWEEP = """
import os, pathlib, signal, sys, time
from onestage.sweeps.supervisor import own_end
runs = pathlib.Path("runs.txt")
with runs.open("a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
number = len(runs.read_text().splitlines())
with own_end():
    {body}
"""

Play = Callable[[str], Callable[[], int]]


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Play:
    """A sweep that does what is written here; ``number`` counts its processes."""
    monkeypatch.chdir(tmp_path)

    def write(body: str) -> Callable[[], int]:
        (tmp_path / "sweep.py").write_text(SWEEP.format(body=body))
        monkeypatch.setattr(supervisor, "COMMAND", [sys.executable, str(tmp_path / "sweep.py")])
        restarts = Restarts(limit=2, backoff_s=0.01)
        return lambda: supervisor.run(["first"], again=lambda: ["resume"], reached=lambda: 0, restarts=restarts)

    return write


def calls() -> list[str]:
    return Path("runs.txt").read_text().splitlines()


@pytest.mark.parametrize("code", [0, 1, 3])
def test_an_end_of_its_own_is_the_end(play: Play, code: int) -> None:
    assert play(f"sys.exit({code})")() == code
    assert calls() == ["first"]


def test_one_that_was_lost_goes_on(play: Play, capfd: pytest.CaptureFixture[str]) -> None:
    assert play("os._exit(1) if number < 3 else sys.exit(0)")() == 0
    assert calls() == ["first", "resume", "resume"]
    assert "lost with its node or the head of the cluster; going on in 0 s (1 of at most 2)" in capfd.readouterr().err


def test_one_that_is_always_lost_is_given_up(play: Play, capfd: pytest.CaptureFixture[str]) -> None:
    assert play("os._exit(1)")() == 1
    assert len(calls()) == 3
    assert "the sweep was lost 3 times" in capfd.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_each_signal_is_passed_on_once(play: Play, tmp_path: Path, number: int, code: int) -> None:
    play(
        f"got = []; signal.signal({int(number)}, lambda *_: got.append(1)); pathlib.Path('ready').touch(); "
        f"time.sleep(1) or time.sleep(1); sys.exit({code} if len(got) == 1 else 9)"
    )
    watching = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path / "sweep.py")], cwd=tmp_path)
    _wait_for(tmp_path / "ready")
    watching.send_signal(number)
    assert watching.wait(20) == code


def test_a_sweep_ends_with_the_process_that_watches_it(play: Play, tmp_path: Path) -> None:
    play("pathlib.Path('ready').write_text(str(os.getpid())); time.sleep(60)")
    watching = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path / "sweep.py")], cwd=tmp_path)
    child = psutil.Process(int(_wait_for(tmp_path / "ready")))
    watching.kill()
    watching.wait(20)
    child.wait(20)


PARENT = """
import sys
from onestage.cluster.restarts import Restarts
from onestage.sweeps import supervisor
supervisor.COMMAND = [sys.executable, sys.argv[1]]
restarts = Restarts(limit=2, backoff_s=0.01)
sys.exit(supervisor.run(["first"], again=lambda: ["resume"], reached=lambda: 0, restarts=restarts))
"""


def _wait_for(file: Path) -> str:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        if file.exists():
            time.sleep(0.1)
            return file.read_text()
        time.sleep(0.05)
    raise AssertionError(f"no {file} in {os.getcwd()}")
