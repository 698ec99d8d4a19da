"""What tracking costs a training: the same steps with and without it, in turns; and beside a large file's upload."""

import math
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from urllib.request import urlopen

import psutil
import torch

from onestage.config import build, compose
from onestage.tracking import runs
from onestage.tracking.mlflow_tracker import MlflowTracker
from onestage.tracking.sync import left_in
from onestage.types import XYXY, Target

NUM_METRICS: Final = 15
STEP_S: Final = 0.1
STEPS_OF_A_TURN: Final = 100
INPUT_SIZE: Final = 160
TARGET: Final = 0.01
ARTIFACT_MB: Final = 100
START_S: Final = 120.0
FLUSH_S: Final = 60.0

WAYS: Final = {
    "SQLite, a point a second": ("sqlite", 1.0),
    "HTTP, a point a second": ("http", 1.0),
    "HTTP, every step": ("http", 0.0),
}
"""Store and ``tracking.every_seconds``."""

Say = Callable[[str], None]
Step = Callable[[], dict[str, float]]


def bench(*, rounds: int, storage: Path, say: Say) -> dict[str, Any]:
    """Trains in turns of ``STEPS_OF_A_TURN`` steps: each way, and without tracking before and after it; so ``rounds``
    times.

    The server is a process of this machine, so that what it computes weighs on the training too. Step times beside
    each other are only as good as the machine is quiet. So the cost is stated by its parts: the share of time that the
    training waits in its calls, and what the thread that sends computes, as if all of it were taken from the training.
    """
    storage.mkdir(parents=True, exist_ok=True)
    step, batch = _step()
    with tempfile.TemporaryDirectory(dir=storage.resolve()) as made, _server(folder := Path(made)) as http:
        uris = {"sqlite": f"sqlite:///{folder / 'mlflow.db'}", "http": http}
        spools = {way: folder / str(place) for place, way in enumerate(WAYS)}
        trackers = {way: _tracker(uris[store], spools[way], every_s) for way, (store, every_s) in WAYS.items()}
        turns: dict[str, list[_Turn]] = {way: [] for way in WAYS}
        without: dict[str, list[float]] = {way: [] for way in WAYS}  # seconds, the mean of before and after
        for tracker in trackers.values():  # connections, and what is imported with them
            _turn(step, tracker, first=0, steps=5)
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            first = 5 + number * STEPS_OF_A_TURN
            before = _turn(step, None, first=0, steps=STEPS_OF_A_TURN)
            for way, tracker in trackers.items():
                turns[way].append(_turn(step, tracker, first=first, steps=STEPS_OF_A_TURN))
                after = _turn(step, None, first=0, steps=STEPS_OF_A_TURN)
                without[way].append((before.seconds + after.seconds) / 2)
                before = after
        say(f"a file of {ARTIFACT_MB} MB on its way")
        way = "HTTP, a point a second"
        artifact = _with_artifact(step, trackers[way], spools[way], first=5 + rounds * STEPS_OF_A_TURN)
        for tracker in trackers.values():
            tracker.close(FLUSH_S)
    ways = {way: _cost(turns[way], without[way]) for way in WAYS}
    averaged = [cost for way, cost in ways.items() if WAYS[way][1] > 0]
    return {
        "rounds": rounds,
        "steps": STEPS_OF_A_TURN,
        "metrics": NUM_METRICS,
        "batch": batch,
        "step_s": statistics.median(seconds for each in without.values() for seconds in each) / STEPS_OF_A_TURN,
        "ways": ways,
        "artifact": artifact,
        "passed": all(cost["waited"] + cost["sender"] <= TARGET for cost in averaged),
    }


class _Turn:
    """Some steps: how long they took, what of it the training waited for its log, and what the sender computed."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.seconds = 0.0
        self.waited_s = 0.0
        self.sender_s = 0.0
        self.longest_s = 0.0


def _turn(step: Step, tracker: MlflowTracker | None, *, first: int, steps: int) -> _Turn:
    turn = _Turn(steps)
    before = _sender_s()
    for number in range(first, first + steps):
        began = time.perf_counter()
        metrics = step()
        logged = time.perf_counter()
        if tracker is not None:
            tracker.log_metrics(metrics, number)
        ended = time.perf_counter()
        turn.seconds += ended - began
        turn.waited_s += ended - logged
        turn.longest_s = max(turn.longest_s, ended - began)
    if tracker is not None:
        tracker.flush(FLUSH_S)  # the next turn is another way's
    turn.sender_s = _sender_s() - before
    return turn


def _sender_s() -> float:
    """The time that the threads which send have computed, all in all."""
    senders = {thread.native_id for thread in threading.enumerate() if thread.name == "onestage-spool"}
    return float(sum(one.user_time + one.system_time for one in psutil.Process().threads() if one.id in senders))


def _cost(turns: Sequence[_Turn], without: Sequence[float]) -> dict[str, float]:
    """``ratio`` of step times is the rounds' median with its standard error; ``waited`` and ``sender`` are shares."""
    ratios = [turn.seconds / seconds for turn, seconds in zip(turns, without, strict=True)]
    return {
        "ratio": statistics.median(ratios),
        # Of a median of normal values, 1.25 times that of the mean.
        "error": 1.25 * statistics.stdev(ratios) / math.sqrt(len(ratios)) if len(ratios) > 1 else math.nan,
        "call_s": statistics.median(turn.waited_s / turn.steps for turn in turns),
        "waited": statistics.median(turn.waited_s / turn.seconds for turn in turns),
        "sender": sum(turn.sender_s for turn in turns) / sum(turn.seconds for turn in turns),
    }


def _with_artifact(step: Step, tracker: MlflowTracker, spool: Path, *, first: int) -> dict[str, float]:
    """Steps before, and steps while a large file is uploaded."""
    file = spool.parent / "large.bin"
    file.write_bytes(os.urandom(ARTIFACT_MB * 10**6))
    before = _turn(step, tracker, first=first, steps=STEPS_OF_A_TURN)
    began = time.perf_counter()
    tracker.log_artifact(file)
    call_s = time.perf_counter() - began
    beside, number = _Turn(0), first + STEPS_OF_A_TURN
    while beside.steps == 0 or (left_in(spool).items and time.perf_counter() - began < FLUSH_S):
        one = time.perf_counter()
        tracker.log_metrics(step(), number)
        took = time.perf_counter() - one
        number, beside.steps, beside.seconds = number + 1, beside.steps + 1, beside.seconds + took
        beside.longest_s = max(beside.longest_s, took)
    uploaded_s = time.perf_counter() - began
    return {
        "call_s": call_s,
        "uploaded_s": uploaded_s,
        "step_s": before.seconds / before.steps,
        "step_beside_s": beside.seconds / beside.steps,
        "longest_s": before.longest_s,
        "longest_beside_s": beside.longest_s,
    }


def _step() -> tuple[Step, int]:
    """A training step of about ``STEP_S`` here, which returns its metrics; and the batch that makes it so."""
    torch.manual_seed(0)
    config = compose("train", ["detector=yolov3_tiny", "detector.num_classes=3", "detector.width=0.25"])
    detector = build(config["detector"])
    optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-5)
    batch = 1

    def step() -> dict[str, float]:
        optimizer.zero_grad()
        parts = detector.losses(detector(images[:batch]), targets[:batch])
        torch.stack(list(parts.values())).sum().backward()
        optimizer.step()
        losses = {f"train/loss/{name}": float(value.detach()) for name, value in parts.items()}
        others = {f"train/more_{number}": random.random() for number in range(NUM_METRICS - len(losses) - 2)}
        return {"train/loss": sum(losses.values()), "train/lr": 1e-5, **losses, **others}

    box = XYXY(torch.tensor([[8.0, 8.0, INPUT_SIZE / 2, INPUT_SIZE / 2]]))
    images = torch.rand(256, 3, INPUT_SIZE, INPUT_SIZE)
    targets = [Target(box, torch.tensor([0]), image_id=0)] * len(images)
    step()
    while _seconds(step) < STEP_S and batch < len(images):
        batch *= 2
    if batch > 1:  # between the last two
        batch = max(1, min(len(images), round(batch * STEP_S / _seconds(step))))
    return step, batch


def _seconds(step: Step) -> float:
    times = []
    for _ in range(5):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _tracker(uri: str, folder: Path, every_s: float) -> MlflowTracker:
    runs.check(uri)
    run_id = runs.open_run(uri, "bench", tags={})
    return MlflowTracker(uri=uri, run_id=run_id, folder=folder, every_s=every_s)


@contextmanager
def _server(folder: Path) -> Iterator[str]:
    """An `mlflow server` on loopback over SQLite; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'server.db'}"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    environment: Mapping[str, str] = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "server.log").open("ab") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        _wait(f"http://127.0.0.1:{port}/health", server)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _wait(address: str, server: "subprocess.Popen[bytes]") -> None:
    end = time.monotonic() + START_S
    while True:
        try:
            urlopen(address, timeout=1).close()
            return
        except OSError:
            if time.monotonic() > end or server.poll() is not None:
                raise
            time.sleep(0.2)


def markdown(report: dict[str, Any]) -> str:
    """The report as a table."""
    rows = [
        f"| {way} | {1e6 * cost['call_s']:.0f} µs | {cost['waited']:.2%} | {cost['sender']:.2%} | "
        f"{cost['waited'] + cost['sender']:.2%} | {cost['ratio']:.3f} ± {cost['error']:.3f} |"
        for way, cost in report["ways"].items()
    ]
    artifact = report["artifact"]
    return "\n".join(
        [
            f"{1 / report['step_s']:.1f} steps/s, {report['metrics']} metrics a step, {report['rounds']} rounds of "
            f"{report['steps']} steps each way, in turns:",
            "",
            "| | a call | the training waits | the thread that sends computes | together | step time with / without |",
            "|---|---:|---:|---:|---:|---:|",
            *rows,
            "",
            f"A file of {ARTIFACT_MB} MB: the call took {artifact['call_s']:.2f} s, the upload in the background "
            f"{artifact['uploaded_s']:.1f} s; a step took {1000 * artifact['step_beside_s']:.0f} ms meanwhile and "
            f"{1000 * artifact['step_s']:.0f} ms before, the longest {1000 * artifact['longest_beside_s']:.0f} and "
            f"{1000 * artifact['longest_s']:.0f} ms.",
        ]
    )
