"""A training that is killed and resumed ends with the very weights of one that was left alone."""

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from .conftest import SETTINGS

Start = Callable[..., subprocess.Popen[str]]
RunJson = Callable[..., dict[str, Any]]

NUM_STEPS = 24
KILLED_AFTER = (2, 9, 17)  # steps: within the first three epochs, of eight steps each
EVERYTHING = [
    *SETTINGS,
    "augment=yolov4",  # with mosaic
    "data.input_sizes={min:64,max:128,step:32,every:2}",
    "data.max_skipped=0",
    f"trainer.max_steps={NUM_STEPS}",
    "schedule.warmup_epochs=1.0",
    "checkpoint.every_steps=1",
    "tracking=none",
    "seed=5",
]


def tensors(node: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a checkpoint, by its place: weights, their average, the optimizer's moments.

    What Lightning keeps of its checkpoint files goes by their paths, which differ.
    """
    if isinstance(node, torch.Tensor):
        yield path, node
    elif isinstance(node, dict):
        for key, value in node.items():
            if not str(key).startswith("ModelCheckpoint"):
                yield from tensors(value, f"{path}/{key}")
    elif isinstance(node, list | tuple):
        for place, value in enumerate(node):
            yield from tensors(value, f"{path}/{place}")


def wait_for_steps(process: subprocess.Popen[str], folder: Path, steps: int) -> int:
    """Waits until ``steps`` are saved; returns how many are."""
    end = time.monotonic() + 240
    while time.monotonic() < end:
        for checkpoint in folder.glob("*/checkpoints/last.ckpt"):
            with suppress(OSError, RuntimeError, EOFError):  # replaced at this moment
                reached = int(torch.load(checkpoint, weights_only=True)["global_step"])
                if reached >= steps:
                    return reached
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    process.kill()
    raise AssertionError(f"no {steps} steps within four minutes: {process.communicate()[1]}")


def assert_same_training(whole: dict[str, Any], killed: dict[str, Any]) -> None:
    expected, found = (torch.load(one["checkpoint"], weights_only=True) for one in (whole, killed))
    assert expected["global_step"] == found["global_step"] == NUM_STEPS
    pairs = dict(tensors(expected)), dict(tensors(found))
    assert pairs[0].keys() == pairs[1].keys()
    assert len([name for name in pairs[0] if name.startswith("/optimizer_states")]) > 20
    different = [name for name, value in pairs[0].items() if not torch.equal(value, pairs[1][name])]
    assert different == []
    assert expected["onestage"]["images_seen"] == found["onestage"]["images_seen"]
    assert whole["metrics"]["train/loss"] == killed["metrics"]["train/loss"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_thrice_it_ends_bitwise_as_if_it_had_not_been(
    onestage: Start, run_json: RunJson, digits: Path, tmp_path: Path
) -> None:
    """Weights, averaged weights and optimizer; augmentation, multi-scale and schedule go on where they were."""
    train = ["train", f"data.root={digits}", *EVERYTHING, "cluster=none", "data.batch_size=3", "data.num_workers=2"]
    whole = run_json(*train, "storage=whole")
    reached = []
    for number, after in enumerate(KILLED_AFTER):
        process = onestage(*train, "storage=killed", *(["resume=last"] if number else []))
        reached.append(wait_for_steps(process, tmp_path / "killed", after))
        process.kill()
        process.communicate(timeout=200)
    assert reached == sorted(set(reached)) and reached[-1] < NUM_STEPS, "killed at three different steps"
    assert_same_training(whole, run_json(*train, "storage=killed", "resume=last"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_three_ranks_that_lose_one_thrice_end_bitwise_as_if_they_had_not(
    onestage: Start, run_json: RunJson, digits: Path, tmp_path: Path
) -> None:
    """Ray starts the group again from the last checkpoint, each time."""
    train = ["train", f"data.root={digits}", *EVERYTHING, "cluster=local", "cluster.num_workers=3"]
    train += ["data.batch_size=1", "trainer.deterministic=true", "cluster.max_failures=3"]
    whole = run_json(*train, "storage=whole")
    process = onestage(*train, "storage=killed", "--json")
    reached = []
    for after in KILLED_AFTER:
        least = max(after, reached[-1] + 1 if reached else 0)  # a step of the group that there is now
        reached.append(wait_for_steps(process, tmp_path / "killed", least))
        workers_of(process)[after % 3].kill()
    out, err = process.communicate(timeout=280)
    assert process.returncode == 0, err
    assert reached == sorted(set(reached)) and reached[-1] < NUM_STEPS, "lost at three different steps"
    assert_same_training(whole, json.loads(out.splitlines()[-1]))


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The three of them; one that starts has not its name yet."""
    for _ in range(600):
        workers = [one for one in psutil.Process(process.pid).children(recursive=True) if is_train_worker(one)]
        if len(workers) == 3:
            return workers
        time.sleep(0.1)
    raise AssertionError(f"{len(workers)} of 3 workers")


def is_train_worker(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        return any("RayTrainWorker" in word for word in process.cmdline())
    return False
