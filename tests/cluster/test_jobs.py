"""Jobs: what goes to the cluster, and what a job that was sent there does."""

import asyncio
import builtins
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from onestage.cluster import jobs, local_cluster, queue
from onestage.cluster.local_cluster import LocalCluster
from onestage.errors import InputError
from onestage.tracking import runs
from onestage.tracking.origin import Code, code

from .conftest import SETTINGS

CLUSTER = {"env": ["MLFLOW_*", "NAMED"], "ship": False}
ROOT = Path(__file__).parents[2]
NO_RAY = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


def test_only_the_named_variables_go_along() -> None:
    environment = {
        "MLFLOW_TRACKING_URI": "http://h",
        "NAMED": "1",
        "NAMED_NOT": "2",
        "RAY_AUTH_TOKEN": "t",
        "PATH": "p",
    }
    assert jobs.runtime_env(CLUSTER, driver_env=environment) == {
        "env_vars": {"MLFLOW_TRACKING_URI": "http://h", "NAMED": "1"}
    }


def test_a_shipped_package_is_a_folder_of_that_name() -> None:
    folders = [Path(folder) for folder in jobs.runtime_env({**CLUSTER, "ship": True}, driver_env={})["py_modules"]]
    assert [folder.name for folder in folders] == ["hydra_plugins", "onestage"]
    assert (folders[1] / "conf" / "train.yaml").is_file()
    assert Code.load(folders[1] / "origin") == code()  # which no node could ask git for


def test_what_killed_processes_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ship = (
        "import os; from onestage.cluster import jobs\n"
        "jobs.runtime_env({'env': [], 'ship': True}, driver_env={}); os._exit(9)"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    assert subprocess.run([sys.executable, "-c", ship], env=environment, timeout=60, check=False).returncode == 9
    [left] = tmp_path.iterdir()
    os.utime(left, (0, 0))
    jobs.runtime_env({**CLUSTER, "ship": True}, driver_env={})
    [mine] = tmp_path.iterdir()
    assert mine != left


def test_a_job_ships_nothing_again() -> None:
    assert jobs.runtime_env({**CLUSTER, "ship": True}, driver_env={"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}) == {}


def test_addresses_stay_and_paths_become_absolute(tmp_path: Path) -> None:
    config = {"storage": "s3://bucket/runs", "cluster": {"kind": "none"}}
    given = ["data.root=s3://bucket/coco", "+detector.weights=w/yolo.weights", "tracking.uri=http://ann:pw@host"]
    assert queue.overrides_of_job(given, config, here=tmp_path) == [
        "data.root=s3://bucket/coco",
        f"+detector.weights={tmp_path}/w/yolo.weights",
        "storage=s3://bucket/runs",
        "cluster=none",
    ]


class TestAddressOf:
    @pytest.fixture(autouse=True)
    def _nothing_set(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in NO_RAY:
            monkeypatch.delenv(name, raising=False)

    def test_one_to_attach_to_takes_no_jobs(self) -> None:
        with pytest.raises(InputError, match="host:6379 takes no jobs"):
            jobs.address_of("host:6379")

    def test_the_command_line_comes_before_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://environment:8265")
        assert jobs.address_of("http://named:8265/") == "http://named:8265"
        assert jobs.address_of("auto") == jobs.address_of() == "http://environment:8265"

    def test_rays_own_variable_for_jobs_comes_before_the_one_to_attach(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://jobs:8265")
        monkeypatch.setenv("RAY_ADDRESS", "host:6379")
        assert jobs.address_of("host:6379") == "http://jobs:8265"  # as a config has it from RAY_ADDRESS

    def test_without_any_cluster_says_what_to_set(self) -> None:
        with pytest.raises(InputError, match=r"no cluster to send jobs to: say --address http://HOST:8265"):
            jobs.address_of()


def test_a_server_that_is_away_is_one_line() -> None:
    with pytest.raises(InputError, match=r"^no Ray dashboard at http://\*\*\*@127\.0\.0\.1:9 "):
        jobs.Jobs("http://ann:pw@127.0.0.1:9")


@pytest.mark.parametrize("answer", [b"{}", b"[]", b"no json"])
def test_a_server_that_is_no_rays_is_one_line(answer: bytes) -> None:
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(InputError, match=r"does not take the request|no Ray dashboard") as refused:
            jobs.Jobs(f"http://127.0.0.1:{server.server_port}").listed()
        server.shutdown()
    assert "\n" not in str(refused.value)


def test_following_ends_with_its_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `onestage logs -f JOB | head -1`."""

    async def lines(job: str) -> AsyncIterator[str]:
        yield "one\n"

    def nobody_reads(*words: Any, **how: Any) -> None:
        raise BrokenPipeError

    following = object.__new__(jobs.Jobs)
    running = SimpleNamespace(value="RUNNING")
    following._client = SimpleNamespace(get_job_status=lambda job: running, tail_job_logs=lines)
    monkeypatch.setattr(builtins, "print", nobody_reads)
    with pytest.raises(BrokenPipeError):
        asyncio.run(following._tail("job"))


def test_a_job_that_a_signal_ended_says_which(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ray tells it as the exit code of subprocess.Popen: -9."""

    async def nothing(job: str) -> None:
        return None

    killed = SimpleNamespace(
        submission_id="train-1", status=SimpleNamespace(value="FAILED"), metadata={}, start_time=None,
        message="Job entrypoint command failed with exit code -9, last available logs:\nstep 3", driver_exit_code=-9,
    )  # fmt: skip
    following = object.__new__(jobs.Jobs)
    following._shown = "http://127.0.0.1:8265"
    following._client = SimpleNamespace(list_jobs=lambda: [killed])
    monkeypatch.setattr(following, "_tail", nothing)
    assert following.follow("train-1") == 1
    assert (
        "job train-1 failed: a signal ended it on its node (SIGKILL, for want of memory perhaps)"
        in capsys.readouterr().err
    )


def test_a_password_that_comes_in_two_parts_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    log = "store https://ann:hunter2@host/x\nepoch 1\nends without https://bob:pa55@host"
    states = iter(["RUNNING", "RUNNING", "SUCCEEDED"])

    def by_parts(length: int) -> Callable[[str], AsyncIterator[str]]:
        async def parts(job: str) -> AsyncIterator[str]:
            for start in range(0, len(log), length):
                yield log[start : start + length]

        return parts

    tails = iter([by_parts(17), by_parts(5)])  # the first connection is lost, the second begins from the start
    following = object.__new__(jobs.Jobs)
    following._client = SimpleNamespace(
        get_job_status=lambda job: SimpleNamespace(value=next(states)),
        tail_job_logs=lambda job: next(tails)(job),
        get_job_logs=lambda job: log,
    )
    asyncio.run(following._tail("job"))
    assert capsys.readouterr().out == "store https://***@host/x\nepoch 1\nends without https://***@host"


STOPPED = """
import os, signal, subprocess, sys, time
from onestage.cluster.jobs import heed_stop
signal.signal(signal.SIGTERM, lambda *_: print("asked", flush=True))
heed_stop()
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
time.sleep(1)
for pid in (os.getpid(), child.pid):
    os.kill(pid, signal.SIGINT)
time.sleep(1)
print(child.poll())
child.kill()
"""


def test_of_a_jobs_processes_only_the_first_hears_a_stop() -> None:
    ran = subprocess.run([sys.executable, "-c", STOPPED], capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout.split() == ["asked", "None"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONESTAGE_CACHE", str(tmp_path_factory.mktemp("cache")))
        started = local_cluster.up("jobs", workers=1, cpus=2)
        yield started
        started.down()


class User:
    """Somebody at a shell in ``folder``: whose environment says nothing of Ray and MLflow."""

    def __init__(self, folder: Path, cluster: LocalCluster) -> None:
        self.folder = folder
        self.cluster = cluster
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "RAY_"))}

    def start(self, *words: str) -> "subprocess.Popen[str]":
        address = [] if words[0] == "train" else ["--address", self.cluster.dashboard]
        return subprocess.Popen(
            [sys.executable, "-m", "onestage.cli", *words, *address],
            env=self.environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *words: str, code: int = 0) -> tuple[str, str]:
        """What it writes to stdout and stderr, where it ends with ``code``."""
        process = self.start(*words)
        try:
            out, err = process.communicate(timeout=280)
        finally:
            process.kill()
        assert process.returncode == code, out + err
        return out, err

    def json(self, *words: str) -> dict[str, object]:
        shown: dict[str, object] = json.loads(self.run(*words, "--json")[0])
        return shown


@pytest.fixture
def user(cluster: LocalCluster, tmp_path: Path) -> User:
    return User(tmp_path, cluster)


def wait_for(line: str, process: "subprocess.Popen[str]") -> list[str]:
    """The lines that a process has written when ``line`` begins one of them."""
    assert process.stdout is not None
    limit = threading.Timer(120, process.kill)
    limit.start()
    lines = []
    for written in process.stdout:
        lines.append(written)
        if written.startswith(line):
            break
    limit.cancel()
    assert lines and lines[-1].startswith(line), lines
    return lines


def run_of(log: str) -> str:
    return next(line.removeprefix("run ") for line in log.splitlines() if line.startswith("run "))


@pytest.mark.slow
def test_a_training_is_followed_evaluated_and_listed(user: User, digits: Path) -> None:
    settings = [*SETTINGS, f"data.root={digits}", "trainer.max_steps=1", "data.batch_size=8"]
    job, log = user.run("submit", "train", *settings, "--follow")[0].split("\n", 1)
    run = run_of(log)
    evaluation, result = user.run("submit", "evaluate", run, "split=test", "--follow")[0].split("\n", 1)
    assert "test/map" in result and result == user.run("logs", evaluation)[0]
    shown = next(told for _ in range(5) if (told := user.json("status", job))["mlflow"] is not None)  # it has a limit
    assert (shown["state"], shown["exit_code"], shown["mlflow"]) == ("succeeded", 0, run)
    listed = user.run("list")[0].splitlines()
    assert [line.split()[0] for line in listed[:2]] == [evaluation, job]
    assert run in listed[1]
    error = user.run("status", job[:-1], code=2)[1]
    assert error.strip().endswith(f"did you mean {job}?")


@pytest.mark.slow
def test_goes_on_without_its_follower_and_after_a_stop(user: User, digits: Path) -> None:
    settings = [*SETTINGS, f"data.root={digits}", "trainer.max_epochs=1000", "data.batch_size=8"]
    follower = user.start("submit", "train", *settings, "--follow")
    lines = wait_for("epoch", follower)
    job, run = lines[0].strip(), run_of("".join(lines))
    follower.send_signal(signal.SIGINT)
    error = follower.communicate(timeout=250)[1]
    assert follower.returncode == 130
    again = error.partition("Follow it again: onestage ")[2].partition(";")[0].split()
    assert again == ["logs", "-f", job, "--address", user.cluster.dashboard]
    second = user.start(*again[:3])
    wait_for("epoch", second)

    assert user.json("stop", job)["state"] == "stopped"
    log, error = second.communicate(timeout=250)
    assert second.returncode == 75 and f"job {job} stopped" in error
    assert f"go on with: onestage submit train resume={run}" in log
    events = [json.loads(line) for line in (user.folder / "runs" / run / "history.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == "preempted"
    uri = f"sqlite:///{user.folder}/mlflow.db"
    assert runs.find_run(uri, run).status == "KILLED"

    step = events[-1]["step"]
    log = user.run("submit", "train", f"resume={run}", f"trainer.max_steps={step + 3}", "--follow")[0]
    assert "images a step, from step " in log, log
    resumed = int(log.partition("images a step, from step ")[2].split()[0])
    assert step <= resumed <= step + 3  # the driver may not have heard of the last step
    assert runs.find_run(uri, run).status == "FINISHED"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's checkout with a detector that no node of the cluster knows."""
    root = tmp_path_factory.mktemp("checkout")
    for name in ("platform", "conf"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (root / name).write_bytes((ROOT / name).read_bytes())
    (root / "platform" / "onestage" / "nn" / "mine.py").write_text(
        "from onestage.nn.darknet import DarknetTiny\nMine = DarknetTiny\n"
    )
    (root / "conf" / "detector" / "mine.yaml").write_text(
        "defaults: [yolov3_tiny, _self_]\nbackbone: {_target_: onestage.nn.mine.Mine}\n"
    )
    return root


@pytest.mark.slow
@pytest.mark.parametrize("sent", [True, False], ids=["sent", "attached"])
def test_the_package_of_the_user_is_what_runs(
    user: User, cluster: LocalCluster, checkout: Path, digits: Path, *, sent: bool
) -> None:
    user.environment["PYTHONPATH"] = str(checkout / "platform")
    address = cluster.dashboard if sent else cluster.address
    settings = [*SETTINGS, "detector=mine", f"data.root={digits}", "trainer.max_steps=1", "data.batch_size=8"]
    out, err = user.run("train", "cluster=ray", f"cluster.address={address}", *settings)
    assert ("job train-" in err) == sent
    [config] = user.folder.glob("runs/*/config.json")
    assert json.loads(config.read_text())["detector"]["backbone"]["_target_"] == "onestage.nn.mine.Mine", out


@pytest.mark.slow
def test_a_job_that_fails_has_its_exit_code_and_shows_no_secret(user: User, cluster: LocalCluster) -> None:
    secret = "hunter2"
    words = [f"tracking.uri=http://ann:{secret}@127.0.0.1:9", f"data.root=https://ann:{secret}@127.0.0.1:9/digits"]
    out, err = user.run("train", "cluster=ray", f"cluster.address={cluster.dashboard}", *words, code=2)
    job = err.partition("job ")[2].split()[0]
    status, listed = user.run("status", job), user.run("list", "--json")
    assert "no dataset at https://***@127.0.0.1:9/digits" in status[0]
    shown = [out, err, *user.run("logs", job), *status, *listed]
    assert not [text for text in shown if secret in text or cluster.token.read_text() in text]


@pytest.mark.slow
def test_a_token_that_is_missing_or_wrong_is_one_line(user: User, cluster: LocalCluster, tmp_path: Path) -> None:
    wrong = tmp_path / "token"
    wrong.write_text("0" * 64)
    cases: list[dict[str, str]] = [{}, {"RAY_AUTH_TOKEN_PATH": str(wrong)}, {"RAY_AUTH_MODE": "token"}]
    for environment in cases:
        # Another cache is another user's: the token of the cluster is not in it.
        user.environment |= {"ONESTAGE_CACHE": str(tmp_path / "cache"), "HOME": str(tmp_path), **environment}
        out, err = user.run("list", code=2)
        assert not out and err.count("\n") == 1, err
        assert "refuses the token: set RAY_AUTH_TOKEN_PATH=FILE" in err
        out, err = user.run("train", "cluster=ray", f"cluster.address={cluster.address}", code=2)
        assert not out and "Traceback" not in err
        assert f"{cluster.address} refuses the token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE" in err
        for name in environment:
            del user.environment[name]
