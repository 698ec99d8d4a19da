"""How many epochs a search spends until it has found what random search found, and what a trial's start costs."""

import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from hydra_plugins.ray_tune_sweeper._journal import Journal
from onestage.errors import OUT_OF_BUDGET, InputError
from onestage.sweeps.folder import folder_of

WAYS: Final = {
    "random": ["sweep.search=random"],
    "asha": ["sweep.search=random", "sweep.scheduler=asha"],
    "tpe_asha": ["sweep.search=optuna", "sweep.scheduler=asha"],
}
SPACE: Final = [
    "optimizer.lr=tag(log, interval(1e-5, 3e-2))",
    "optimizer.weight_decay=tag(log, interval(1e-5, 1e-1))",
]
SMALL: Final = [
    "detector=yolov3_tiny", "detector.width=0.25", "detector.input_size=[96,96]", "augment=none",
    "trainer.num_pictures=0", "cluster.cpus_per_worker=1", "sweep.asha.grace_epochs=1", "tracking=none",
]  # fmt: skip


def bench(
    *, data: Path, trials: int, epochs: int, seed: int, storage: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """Three sweeps of one space and seed, one after another. What was swept in ``storage`` stays swept."""
    shared = [*SPACE, *SMALL, f"data.root={data.absolute()}", f"budget.trials={trials}", f"seed={seed}"]
    shared += [f"trainer.max_epochs={epochs}", f"storage={storage.absolute()}"]
    found: dict[str, Any] = {}
    goal: float | None = None
    for name, words in WAYS.items():
        folder = folder_of(str(storage.absolute()), name)
        if Journal.read(folder).ended_because != "all":
            say(f"sweeping: {name}")
            _sweep([*shared, *words, f"sweep.name={name}"], resumed=folder.exists(), name=name, storage=storage)
        events = _epochs(Journal.read(folder))
        best = max((score for _, score in events), default=0.0)
        goal = best if goal is None else goal
        reached = next((spent for spent, (_, score) in enumerate(events, 1) if score >= goal), None)
        found[name] = {
            "epochs": len(events),
            "best": best,
            "epochs_to_randoms_best": reached,
            "start_s": statistics.median(_starts(Journal.read(folder))),
        }
    return {"trials": trials, "epochs": epochs, "seed": seed, "cores": os.cpu_count(), "ways": found}


def _sweep(words: Sequence[str], *, resumed: bool, name: str, storage: Path) -> None:
    command = [sys.executable, "-m", "onestage.cli", "sweep"]
    command += ["resume", name, f"storage={storage.absolute()}"] if resumed else words
    ended = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    if ended.returncode not in (0, OUT_OF_BUDGET):
        raise InputError(f"the sweep {name} ended with exit code {ended.returncode}: what it said stands above")


def _epochs(journal: Journal) -> list[tuple[float, float]]:
    """When each epoch of any trial ended, and its best score by then; in that order."""
    return sorted(
        (time, result["best"])
        for trial in journal.trials.values()
        for time, result in zip(trial.heard, trial.results, strict=True)
    )


def _starts(journal: Journal) -> list[float]:
    """Seconds from each trial's start, when its place was free, to its first epoch's end less one epoch's time."""
    seconds = []
    for trial in journal.trials.values():
        if trial.started is not None and len(trial.heard) > 1:
            epoch = (trial.heard[-1] - trial.heard[0]) / (len(trial.heard) - 1)
            seconds.append(trial.heard[0] - trial.started - epoch)
    return seconds or [0.0]


def markdown(report: dict[str, Any]) -> str:
    """The report as a table."""
    randoms = report["ways"]["random"]["epochs_to_randoms_best"]
    lines = [
        f"{report['trials']} trials of at most {report['epochs']} epochs, seed {report['seed']}, "
        f"{report['cores']} cores",
        "",
        "| search | epochs in all | best mAP | epochs to random's best | of random's | start of a trial, median |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, one in report["ways"].items():
        reached = one["epochs_to_randoms_best"]
        share = f"{reached / randoms:.2f}" if reached and randoms else "–"
        lines.append(
            f"| {name.replace('_', ' + ')} | {one['epochs']} | {one['best']:.4f} | "
            f"{reached or 'not reached'} | {share} | {one['start_s']:.1f} s |"
        )
    return "\n".join(lines) + "\n"
