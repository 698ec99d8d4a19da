"""A training that is killed and resumed ends with the very weights of one that was left alone."""

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


def kill_after(process: subprocess.Popen[str], folder: Path, steps: int) -> int:
    """Ends the process and all that it started the hard way once ``steps`` are saved; returns how many are."""
    end = time.monotonic() + 180
    while time.monotonic() < end:
        for checkpoint in folder.glob("*/checkpoints/last.ckpt"):
            try:
                reached = int(torch.load(checkpoint, weights_only=True)["global_step"])
            except (OSError, RuntimeError, EOFError):  # replaced at this moment
                continue
            if reached >= steps:
                driver = psutil.Process(process.pid)
                for one in (driver, *driver.children(recursive=True)):
                    with suppress(psutil.NoSuchProcess):
                        one.kill()
                process.communicate(timeout=60)
                return reached
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    process.kill()
    raise AssertionError(f"no {steps} steps within three minutes: {process.communicate()[1]}")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "cluster",
    [
        ["cluster=none", "data.batch_size=3", "data.num_workers=2"],
        ["cluster=local", "cluster.num_workers=3", "data.batch_size=1", "trainer.deterministic=true"],
    ],
    ids=["alone", "three"],
)
def test_killed_thrice_it_ends_bitwise_as_if_it_had_not_been(
    cluster: list[str], onestage: Start, run_json: RunJson, digits: Path, tmp_path: Path
) -> None:
    """Weights, averaged weights and optimizer; augmentation, multi-scale and schedule go on where they were."""
    train = ["train", f"data.root={digits}", *EVERYTHING, *cluster]
    whole = run_json(*train, "storage=whole")
    reached = []
    for number, after in enumerate(KILLED_AFTER):
        resume = ["resume=last"] if number else []
        process = onestage(*train, "storage=killed", *resume)
        reached.append(kill_after(process, tmp_path / "killed", after))
    assert reached == sorted(set(reached)) and reached[-1] < NUM_STEPS, "killed at three different steps"
    resumed = run_json(*train, "storage=killed", "resume=last")

    expected, found = (torch.load(one["checkpoint"], weights_only=True) for one in (whole, resumed))
    assert expected["global_step"] == found["global_step"] == NUM_STEPS
    pairs = dict(tensors(expected)), dict(tensors(found))
    assert pairs[0].keys() == pairs[1].keys()
    assert len([name for name in pairs[0] if name.startswith("/optimizer_states")]) > 20
    different = [name for name, value in pairs[0].items() if not torch.equal(value, pairs[1][name])]
    assert different == []
    assert expected["onestage"]["images_seen"] == found["onestage"]["images_seen"]
    assert whole["metrics"]["train/loss"] == resumed["metrics"]["train/loss"]
