"""Jobs in a Slurm of two nodes: trained over both, queued again before a time limit, ended by a scancel."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from .slurm_here import slurm

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
SMALL = ("detector.width=0.125", "detector.input_size=[64,64]", "augment=none", "trainer.num_pictures=0",
         "data.batch_size=4", "data.num_workers=0", "cluster.start_timeout_s=90")  # fmt: skip
LIMIT_S = 150.0


class Site:
    """A login node: ``onestage`` there."""

    def __init__(self, folder: Path, environment: dict[str, str], digits: Path) -> None:
        self.folder, self.digits = folder, digits
        hidden = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME")
        self.environment = {
            **{name: value for name, value in environment.items() if name not in hidden},
            "ONESTAGE_CACHE": str(folder / "cache"),
            "PYTHONPATH": str(ROOT / "platform"),
            "OMP_NUM_THREADS": "1",
            "MY_SECRET": "not-for-the-nodes",
        }

    def onestage(self, *words: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "onestage.cli", *words]
        return subprocess.run(
            argv, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=240, check=False
        )

    def slurm(self, *argv: str) -> str:
        return subprocess.run(
            argv, env=self.environment, capture_output=True, text=True, timeout=60, check=True
        ).stdout.strip()

    def submit(self, *overrides: str) -> str:
        done = self.onestage("submit", "train", "cluster=slurm", f"data.root={self.digits}", *SMALL, *overrides)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def of_job(self, job: str) -> Path:
        return self.folder / "cache" / "slurm" / job

    def log(self, job: str) -> str:
        log = self.of_job(job) / "log"
        return log.read_text() if log.exists() else ""

    def number(self, job: str) -> str:
        return str(json.loads((self.of_job(job) / "job.json").read_text())["number"])

    def status(self, job: str) -> dict[str, Any]:
        done = self.onestage("status", job, "--address", "slurm", "--json")
        assert done.returncode == 0, done.stderr
        described: dict[str, Any] = json.loads(done.stdout)
        return described

    def wait(self, ready: Callable[[], Any], job: str) -> None:
        end = time.monotonic() + LIMIT_S
        while not ready():
            told = [path.read_text()[-1500:] for path in self.of_job(job).glob("*.log")]
            assert time.monotonic() < end, (self.log(job)[-3000:], told)
            time.sleep(0.5)

    def history(self) -> list[dict[str, Any]]:
        found = list(self.folder.glob("runs/*/history.jsonl"))
        newest = max(found, key=lambda path: path.stat().st_mtime, default=None)
        return [] if newest is None else [json.loads(line) for line in newest.read_text().splitlines()]


@pytest.fixture(scope="module")
def site(digits: Path) -> Iterator[Site]:
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as name, slurm(Path(name) / "s") as environment:
        yield Site(Path(name), environment, digits)


def test_a_training_runs_over_both_nodes(site: Site) -> None:
    two = ["cluster.num_workers=2", "cluster.slurm.cpus_per_node=1", "trainer.max_epochs=1"]
    job = site.submit(*two)
    done = site.onestage("logs", "-f", job, "--address", "slurm")
    assert done.returncode == 0, (done.stdout, done.stderr, site.log(job))
    assert "val/map" in done.stdout
    [started] = [event for event in site.history() if event["event"] == "started"]
    assert started["workers"] == 2
    told = site.status(job)
    assert (told["state"], told["exit_code"], told["verb"]) == ("succeeded", 0, "train")
    assert told["mlflow"] in [path.name for path in (site.folder / "runs").iterdir()]
    assert job in site.onestage("list", "--address", "slurm").stdout
    assert site.status(site.number(job))["job"] == job
    assert not (site.of_job(job) / "token").exists()
    assert _processes_of(site.of_job(job)) == []
    assert (site.of_job(job) / "code" / "onestage" / "__init__.py").is_file()
    assert (os.stat(site.of_job(job)).st_mode & 0o777) == 0o700


def _processes_of(folder: Path) -> list[str]:
    """The names of what still runs of a job: its Ray, above all."""
    found = []
    for process in psutil.process_iter(["name"]):
        with suppress(psutil.Error):
            if process.environ().get("RAY_AUTH_TOKEN_PATH") == str(folder / "token"):
                found.append(process.info["name"])
    return found


def test_before_its_time_limit_it_is_queued_again_and_goes_on_and_a_scancel_saves(site: Site) -> None:
    job = site.submit("trainer.max_epochs=1000", "cluster.slurm.time=60")
    number = site.number(job)
    site.wait(lambda: any(event["event"] == "started" for event in site.history()[:1]) and _steps(site) > 3, job)
    limits = site.slurm("scontrol", "show", "job", number)
    assert "TimeLimit=01:00:00" in limits and "Requeue=1" in limits
    site.slurm("scancel", "--batch", "--signal=USR1", number)  # as Slurm does by --signal=B:USR1@180
    site.wait(lambda: site.slurm("squeue", "--noheader", "--format=%T", f"--jobs={number}") == "PENDING", job)
    assert site.status(job)["state"] == "pending"
    site.slurm("scontrol", "update", f"JobId={number}", "StartTime=now")  # else two minutes later
    site.wait(lambda: "from step" in site.log(job).partition("attempt 2")[2], job)
    assert "the time limit is near: the job is queued again" in site.log(job)
    events = [event for event in site.history() if event["event"] in ("started", "preempted")]
    assert [event["event"] for event in events[:3]] == ["started", "preempted", "started"]
    assert events[2]["step"] >= events[1]["step"] > 3  # no step lost; which one was reached is told twice a second
    site.slurm("scancel", number)
    site.wait(lambda: site.status(job)["state"] != "running", job)
    told = site.status(job)
    assert (told["state"], told["exit_code"]) == ("stopped", 75)
    assert site.history()[-1]["event"] == "preempted"


def _steps(site: Site) -> int:
    return max((int(path.read_text() and json.loads(path.read_text())["step"]) for path in
                site.folder.glob("runs/*/reached.json")), default=0)  # fmt: skip


def test_a_job_that_waits_is_taken_from_the_queue(site: Site) -> None:
    job = site.submit("cluster.slurm.directives=['--begin=now+1hour']")
    assert site.status(job)["state"] == "pending"
    done = site.onestage("stop", job, "--address", "slurm", "--json")
    assert json.loads(done.stdout)["state"] == "stopped"


def test_what_slurm_refuses_is_told_in_one_line(site: Site) -> None:
    before = set((site.folder / "cache" / "slurm").glob("*"))
    done = site.onestage("submit", "train", "cluster=slurm", "cluster.slurm.partition=nowhere", *SMALL)
    assert done.returncode == 2
    assert set((site.folder / "cache" / "slurm").glob("*")) == before
    assert done.stderr.count("\n") == 1 and "invalid partition" in done.stderr
