"""What asynchronous checkpoints cost: the same steps of the full YOLOv3 with and without one being written."""

import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from onestage.config import build, compose
from onestage.training.checkpoints import Writer
from onestage.types import XYXY, Target

EVERY_S: Final = 60.0
"""One checkpoint so often is what the cost is stated for."""


def bench(*, storage: Path, rounds: int, input_size: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Alternates ``rounds`` times between steps with nothing to write and steps beside a write of the whole state.

    Each step is a forward, a backward and an update at ``input_size`` pixels, batch 1. A checkpoint's cost in seconds
    is that of its copy, and what the steps beside its write lost. Waiting between two does not occur: a write is over
    within the minute, or ``passed`` is false.
    """
    torch.manual_seed(0)
    config = compose("train", ["detector=yolov3", "detector.num_classes=80", "detector.width=1.0"])
    detector = build(config["detector"])
    averaged = copy.deepcopy(detector)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-5)
    images = torch.rand(1, 3, input_size, input_size)
    box = XYXY(torch.tensor([[8.0, 8.0, input_size / 2, input_size / 2]]))
    targets = [Target(box, torch.tensor([0]), image_id=0)]

    def step() -> float:
        started = time.perf_counter()
        optimizer.zero_grad()
        torch.stack(list(detector.losses(detector(images), targets).values())).sum().backward()
        optimizer.step()
        pairs = zip(averaged.parameters(), detector.parameters(), strict=True)
        with torch.no_grad():
            for mean, now in pairs:
                mean.lerp_(now, 0.001)
        return time.perf_counter() - started

    def state() -> dict[str, Any]:
        return {
            "global_step": 1,
            "state_dict": averaged.state_dict(),
            "current_model_state": detector.state_dict(),
            "optimizer_states": [optimizer.state_dict()],
        }

    storage.mkdir(parents=True, exist_ok=True)
    folder = tempfile.TemporaryDirectory(dir=storage)
    writer = Writer(Path(folder.name), keep=2)
    say("warming up")
    step()
    writer.save_checkpoint(state(), None)  # its memory is used again from now on
    writer.wait()
    alone: list[float] = []
    losses_s: list[float] = []
    writes_s: list[float] = []
    for number in range(rounds):
        say(f"round {number + 1} of {rounds}")
        before = [step() for _ in range(5)]
        started = time.perf_counter()
        writer.save_checkpoint(state(), None)
        blocked_s = time.perf_counter() - started
        beside = [step()]
        while writer.busy:
            beside.append(step())
        after = [step() for _ in range(5)]
        usual = statistics.median(before + after)
        alone += before + after
        losses_s.append(blocked_s + sum(beside) - usual * len(beside))
        writes_s.append(writer.timings[-1][1])
    cost_s = statistics.median(losses_s)
    report = {
        "state_bytes": _num_bytes(state()),
        "input_size": input_size,
        "threads": torch.get_num_threads(),
        "step_s": statistics.median(alone),
        "copy_s": statistics.median(copied for copied, _ in writer.timings[1:]),
        "write_s": statistics.median(writes_s),
        "costs_s": losses_s,
        "cost_s": cost_s,
        "epoch_time_ratio": 1 + cost_s / EVERY_S,
        "notes": writer.notes,
        "passed": max(writes_s) < EVERY_S and not writer.notes,
    }
    folder.cleanup()
    return report


def _num_bytes(node: Any) -> int:
    if isinstance(node, Tensor):
        return node.numel() * node.element_size()
    if isinstance(node, dict):
        return sum(_num_bytes(value) for value in node.values())
    return sum(_num_bytes(value) for value in node) if isinstance(node, list) else 0


def markdown(report: dict[str, Any]) -> str:
    """The report as a table."""
    rows = [
        ("state", f"{report['state_bytes'] / 1e6:.0f} MB"),
        ("step without a write", f"{report['step_s']:.2f} s"),
        ("copy, while the training waits", f"{report['copy_s']:.2f} s"),
        ("write and reading back, beside the training", f"{report['write_s']:.1f} s"),
        ("cost of a checkpoint (median; lowest to highest)", _spread(report)),
        ("epoch time with one a minute / without", f"{report['epoch_time_ratio']:.4f}"),
    ]
    lines = ["| yolov3, width 1.0, AdamW and averaged weights | |", "|---|---:|"]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in rows), *report["notes"]]) + "\n"


def _spread(report: dict[str, Any]) -> str:
    return f"{report['cost_s']:.2f} s ({min(report['costs_s']):.2f} to {max(report['costs_s']):.2f})"
