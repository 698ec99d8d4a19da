"""Trainings beside a real server that is killed, paused, restarted, slow, or answers 500: nothing is lost, or twice."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from onestage.tracking import runs, spool, sync
from onestage.tracking.client import client
from onestage.tracking.mlflow_tracker import MlflowTracker

STEP_S = 0.1
NUM_METRICS = 15
SETTINGS = [
    "cluster=none",
    "cluster.cpus_per_worker=1",
    "detector.width=0.125",
    "detector.input_size=[64,64]",
    "augment=none",
    "data.num_workers=0",
    "data.batch_size=3",
    "trainer.num_pictures=0",
    "trainer.max_steps=24",
    "checkpoint.every_steps=1",
    "tracking.every_seconds=0",
    "seed=5",
]


@pytest.fixture(autouse=True)
def _often(monkeypatch):
    """Outages of seconds are to be noticed."""
    monkeypatch.setattr(spool, "POLL_S", 1.0)


@pytest.fixture
def experiment(request):
    return request.node.name


def history(uri, run_id, key):
    return [(point.step, point.value) for point in client(uri).get_metric_history(run_id, key)]


class Feed(threading.Thread):
    """Logs 10 steps a second of 15 metrics, as a training would, until it is told to stop."""

    def __init__(self, *trackers):
        super().__init__(daemon=True)
        self.trackers = trackers
        self.over = threading.Event()
        self.steps = 0
        self.slowest_s = 0.0
        self.began = time.monotonic()

    def run(self):
        while not self.over.wait(max(0.0, self.began + self.steps * STEP_S - time.monotonic())):
            began = time.perf_counter()
            for tracker in self.trackers:
                tracker.log_metrics({f"train/m{n}": self.steps + n for n in range(NUM_METRICS)}, self.steps)
            if self.steps % 20 == 10:
                for tracker in self.trackers:
                    tracker.log_metrics({"val/map": self.steps / 1000}, self.steps)
            self.slowest_s = max(self.slowest_s, time.perf_counter() - began)
            self.steps += 1

    def end(self):
        self.over.set()
        self.join()
        return time.monotonic() - self.began


@pytest.mark.slow
def test_a_training_of_ten_steps_a_second_goes_through_every_outage(
    server, proxy, experiment, tmp_path, caplog, monkeypatch
):
    """Each step is logged on time; later all of it is there, in order and once, at the full rate and averaged."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    ids = [runs.open_run(server.uri, experiment, tags={}) for _ in range(2)]
    full, averaged = (
        MlflowTracker(uri=proxy.uri, run_id=run_id, folder=tmp_path / run_id, every_s=every_s)
        for run_id, every_s in zip(ids, (0.0, 1.0), strict=True)
    )
    feed = Feed(full, averaged)
    feed.start()
    time.sleep(2)
    proxy.failing = True
    time.sleep(4)
    proxy.failing = False
    time.sleep(3)
    proxy.lose_answers = True  # the server takes what it is sent, and nobody hears that it did
    time.sleep(4)
    proxy.lose_answers = False
    proxy.delay_s = 0.7  # slow, but within the limit of a request
    time.sleep(4)
    proxy.delay_s = 0.0
    server.signal(signal.SIGSTOP)
    time.sleep(4)
    server.signal(signal.SIGCONT)
    time.sleep(1)
    server.kill()
    time.sleep(1)
    server.start()  # takes seconds
    seconds = feed.end()

    assert full.close(40) and averaged.close(40)
    assert feed.steps >= 0.97 * seconds / STEP_S
    assert feed.slowest_s < STEP_S
    for n in (0, 14):
        assert history(server.uri, ids[0], f"train/m{n}") == [(step, step + n) for step in range(feed.steps)]
        before, points = -1, history(server.uri, ids[1], f"train/m{n}")
        for step, value in points:
            assert value == pytest.approx((before + 1 + step) / 2 + n)  # the mean of the steps since the point before
            before = step
        assert before == feed.steps - 1
        assert len(points) <= seconds + feed.steps / 20 + 3  # a validation within a second makes two of it
    for run_id in ids:
        assert history(server.uri, run_id, "val/map") == [(n, n / 1000) for n in range(10, feed.steps, 20)]
    said = [record.getMessage() for record in caplog.records if record.name == "onestage.tracking.spool"]
    assert all("the tracking store is away" in text for text in said)
    assert 2 <= len(said) <= 2 * 5  # one an outage and a run


def train(folder, *overrides):
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "RAY_"))}
    return subprocess.Popen(
        [sys.executable, "-m", "onestage.cli", "train", *SETTINGS, *overrides, "--json"],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process):
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1]), err


def wait_for_step(process, folder, step):
    """Until the run's journal has a step so far; the run's id."""
    end = time.monotonic() + 200
    while time.monotonic() < end:
        for journal in folder.glob("*/spool/metrics.jsonl"):
            if any(json.loads(line)["step"] >= step for line in journal.read_text().splitlines()[:-1]):
                return journal.parent.parent.name
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    process.kill()
    raise AssertionError(process.communicate()[1])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_twice_and_at_last_without_its_server_it_has_the_history_of_one_left_alone(
    server, digits, experiment, tmp_path, caplog
):
    """Twice the training is killed and resumed; then the server is, for good as far as the training can see."""
    common = [f"data.root={digits}", f"tracking.uri={server.uri}", f"tracking.experiment={experiment}"]
    whole, said = ended(train(tmp_path, *common, "storage=whole"))
    assert "every step is logged (tracking.every_seconds=0): " in said
    for number, after in enumerate((4, 12)):
        life = train(tmp_path, *common, "storage=cut", *(["resume=last"] if number else []))
        run_id = wait_for_step(life, tmp_path / "cut", after)
        life.kill()
        life.communicate(timeout=200)
    [dead] = runs.mark_dead(server.uri, experiment)
    assert dead == run_id
    life = train(tmp_path, *common, "storage=cut", f"resume={run_id}")
    wait_for_step(life, tmp_path / "cut", 16)
    server.kill()
    try:
        result, said = ended(life)
    finally:
        server.start()
    assert result["run_id"] == run_id and result["status"] == "FINISHED"
    assert said.count("the tracking store is away") == 1
    assert f"onestage sync {tmp_path}/cut/{run_id}/spool" in said
    assert runs.find_run(server.uri, run_id).status == "KILLED"  # as far as the server knows

    assert sync.sync(tmp_path / "cut" / run_id / "spool").state == "arrived"
    found, expected = (runs.find_run(server.uri, one) for one in (run_id, whole["run_id"]))
    assert (found.status, expected.status) == ("FINISHED", "FINISHED")
    assert runs.REASON_TAG not in found.tags
    assert found.metrics.keys() == expected.metrics.keys()
    compared = [key for key in expected.metrics if key.startswith(("train/", "val/", "best/", "epoch"))]
    assert {"train/loss", "train/lr", "val/map", "val/loss"} <= set(compared)
    for key in compared:
        assert history(server.uri, run_id, key) == history(server.uri, whole["run_id"], key), key
    assert [step for step, _ in history(server.uri, run_id, "train/loss")] == list(range(24))
    assert not [one for one in caplog.records if one.levelno >= logging.ERROR]
