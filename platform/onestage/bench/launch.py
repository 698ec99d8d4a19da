"""What Ray costs: the same training under Ray Train and under torchrun, one after the other, several times."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

import psutil

from onestage.cluster import local_cluster
from onestage.cluster.job import Job
from onestage.cluster.local_cluster import LocalCluster
from onestage.cluster.preflight import check
from onestage.config import compose
from onestage.data.scenes import draw

WAIT_S: Final = 600.0
POLL_S: Final = 0.02
WARM_STEPS: Final = 20
NUM_SCENES: Final = 256
BATCH_SIZE: Final = 4

Say = Callable[[str], None]


class Timing(NamedTuple):
    """``start_s`` from the command to the first step; ``steps_per_s`` from step ``WARM_STEPS`` to the last."""

    start_s: float
    steps_per_s: float


def bench(*, workers: int, steps: int, rounds: int, storage: Path, say: Say) -> dict[str, Any]:
    """Trains ``steps`` steps ``rounds`` times each way, and loses a worker once; a warm local cluster of ours."""
    folder = storage.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "scenes"
    if not (data / "dataset.json").is_file():
        draw(data, seed=1, num_train=NUM_SCENES, num_val=16, num_test=4, size=96)
    timings: dict[str, list[Timing]] = {"ray": [], "torchrun": []}
    cluster = local_cluster.up("bench", workers=workers, say=say)
    try:
        _ray(cluster, data, folder, workers=workers, steps=WARM_STEPS)  # whatever a first start keeps for later ones
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}: torchrun, then Ray")
            timings["torchrun"].append(_torchrun(data, folder, workers=workers, steps=steps))
            timings["ray"].append(_ray(cluster, data, folder, workers=workers, steps=steps))
        say("losing a worker")
        recovery_s = _lose_a_worker(cluster, data, folder, workers=workers, steps=steps)
    finally:
        cluster.down()
    medians = {
        way: Timing(*(statistics.median(values) for values in zip(*each, strict=True))) for way, each in timings.items()
    }
    return {
        "workers": workers,
        "steps": steps,
        "rounds": {way: [one._asdict() for one in each] for way, each in timings.items()},
        "epoch_time_ratio": medians["torchrun"].steps_per_s / medians["ray"].steps_per_s,
        "start_s": {way: one.start_s for way, one in medians.items()},
        "start_difference_s": medians["ray"].start_s - medians["torchrun"].start_s,
        "recovery_s": recovery_s,
    }


def markdown(report: dict[str, Any]) -> str:
    """The report as a table."""
    ratios = [
        torchrun["steps_per_s"] / ray["steps_per_s"]
        for torchrun, ray in zip(report["rounds"]["torchrun"], report["rounds"]["ray"], strict=True)
    ]
    return "\n".join(
        [
            f"| {report['workers']} workers, {report['steps']} steps, medians of {len(ratios)} | torchrun | Ray | |",
            "|---|---|---|---|",
            "| steps/s after the start | "
            + " | ".join(
                f"{statistics.median(one['steps_per_s'] for one in report['rounds'][way]):.2f}"
                for way in ("torchrun", "ray")
            )
            + f" | epoch time: {report['epoch_time_ratio']:.3f} ({min(ratios):.3f} to {max(ratios):.3f}) |",
            f"| command to first step | {report['start_s']['torchrun']:.1f} s | {report['start_s']['ray']:.1f} s | "
            f"{report['start_difference_s']:+.1f} s |",
            f"| last step before a worker is killed to the next | | {report['recovery_s']:.1f} s | |",
        ]
    )


def _overrides(data: Path, storage: Path, *, workers: int, steps: int) -> list[str]:
    return [
        f"data.root={data}",
        f"storage={storage}",
        "detector=yolov3_tiny",
        "detector.width=0.25",
        "detector.input_size=[96,96]",
        f"data.batch_size={BATCH_SIZE}",
        "data.num_workers=0",
        f"trainer.max_epochs={-(-steps * BATCH_SIZE * workers // NUM_SCENES)}",
        f"trainer.max_steps={steps}",
        "trainer.val_every_epochs=1000000",
        "trainer.num_pictures=0",
        "cluster=ray",
        "cluster.ship=false",
        f"cluster.num_workers={workers}",
        "cluster.cpus_per_worker=1",
        "cluster.gpus_per_worker=0",
        "tracking=none",
        "checkpoint.every_minutes=1",
    ]


def _torchrun(data: Path, folder: Path, *, workers: int, steps: int) -> Timing:
    with tempfile.TemporaryDirectory(dir=folder) as storage:
        config = check(compose("train", _overrides(data, Path(storage), workers=workers, steps=steps)))
        job = Job(config=config, run_id="torchrun", folder=str(Path(storage) / "torchrun"), tracking_uri=None)
        Path(job["folder"]).mkdir()
        file = Path(storage) / "job.json"
        file.write_text(json.dumps(job))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
        started = time.time()
        ended = subprocess.run(
            [*command, "-m", "onestage.bench.torchrun", str(file)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            cwd=storage,
            capture_output=True,
            text=True,
            timeout=WAIT_S,
        )
    if ended.returncode != 0:
        raise RuntimeError(f"torchrun ended with exit code {ended.returncode}: {ended.stderr[-2000:]}")
    messages = (json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{"))
    return _timing([(one["step"], one["at"]) for one in messages if "step" in one], started)


def _ray(cluster: LocalCluster, data: Path, folder: Path, *, workers: int, steps: int) -> Timing:
    with tempfile.TemporaryDirectory(dir=folder) as storage:
        started = time.time()
        process = _train(cluster, data, Path(storage), workers=workers, steps=steps)
        seen = _watch(process, Path(storage), lambda _: None)
    return _timing(seen, started)


def _lose_a_worker(cluster: LocalCluster, data: Path, folder: Path, *, workers: int, steps: int) -> float:
    """Seconds from the last step before a worker is killed to the first one after, as the run's history has it."""
    killed: list[int] = []

    def kill(step: int) -> None:
        if step >= WARM_STEPS and not killed:
            every = (one for host in cluster.hosts for one in cluster.processes(host.name))
            victim = next(one for one in every if "RayTrainWorker" in " ".join(one.cmdline()))
            killed.append(victim.pid)
            psutil.Process(victim.pid).kill()

    with tempfile.TemporaryDirectory(dir=folder) as storage:
        process = _train(
            cluster,
            data,
            Path(storage),
            "checkpoint.every_steps=10",
            "cluster.backoff_s=1",
            workers=workers,
            steps=steps,
        )
        _watch(process, Path(storage), kill)
        (history,) = Path(storage).glob("*/history.jsonl")
        events = [json.loads(line) for line in history.read_text().splitlines()]
    return next(float(event["recovery_s"]) for event in events if event["event"] == "resumed")


def _train(
    cluster: LocalCluster, data: Path, storage: Path, *overrides: str, workers: int, steps: int
) -> "subprocess.Popen[str]":
    arguments = [*_overrides(data, storage, workers=workers, steps=steps), *overrides]
    return subprocess.Popen(
        [sys.executable, "-m", "onestage.cli", "train", *arguments],
        env=os.environ | cluster.environment | {"OMP_NUM_THREADS": "1"},
        cwd=storage,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def _watch(process: "subprocess.Popen[str]", storage: Path, heard: Callable[[int], None]) -> list[tuple[int, float]]:
    """The steps that the driver heard of and when, to the end of the training."""
    seen: list[tuple[int, float]] = []
    end = time.monotonic() + WAIT_S
    while True:
        ended = process.poll()
        for file in storage.glob("*/reached.json"):
            with suppress(OSError, ValueError):
                kept = json.loads(file.read_text())
                if not seen or kept["step"] != seen[-1][0]:
                    seen.append((kept["step"], kept["at"]))
                    heard(kept["step"])
        if ended is not None or time.monotonic() > end:
            break
        time.sleep(POLL_S)
    process.kill()
    _, err = process.communicate()
    if ended != 0:
        raise RuntimeError(f"the training ended with exit code {ended}: {err[-2000:]}")
    return seen


def _timing(seen: Sequence[tuple[int, float]], started: float) -> Timing:
    warm = [one for one in seen if one[0] >= WARM_STEPS] or list(seen)
    (first, began), (last, ended) = warm[0], warm[-1]
    return Timing(seen[0][1] - started, (last - first) / (ended - began) if last > first else 0.0)
