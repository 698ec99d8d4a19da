"""A sweep from its command line to its leaderboard."""

import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hydra_plugins.ray_tune_sweeper._journal import OUT_OF_TIME
from onestage.cluster import connection, launch, resources
from onestage.cluster.preflight import num_gpus
from onestage.cluster.ray_train import share_gpus
from onestage.cluster.storage import check_storage
from onestage.config import merged
from onestage.config.app import multirun
from onestage.data.threads import num_cores
from onestage.errors import DONE, FAILED, INTERRUPTED, OUT_OF_BUDGET, PREEMPTED, InputError
from onestage.sweeps import trial
from onestage.sweeps.conclusion import Conclusion, conclude
from onestage.sweeps.folder import SETUP, Setup, folder_of, journal_of, kept, name_of
from onestage.sweeps.plan import Plan, plan, side_by_side
from onestage.sweeps.status import mend
from onestage.sweeps.watch import Watch
from onestage.tracking import origin
from onestage.tracking.heartbeat import beating
from onestage.tracking.runs import SWEEP_TAG
from onestage.tracking.tracker import store_uri

SHARE_OF_NODE: Final = 0.0001
"""Of the resource that this machine alone has: the trials' own processes lie beside the driver, with their files."""
SAY_EVERY_S: Final = 10.0
MAY_CHANGE: Final = ("budget.", "cluster", "sweep.max_concurrent", "sweep.retries", "storage", "output")
"""What a sweep that goes on may be given anew: nothing that would make its trials incomparable."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a sweep ended; ``conclusion`` is there where it came that far."""

    name: str
    folder: Path
    exit_code: int
    ended: str  # all, all failed, hours, gpu_hours, interrupted, preempted, or how many trials were lost
    conclusion: Conclusion


def start(overrides: Sequence[str]) -> Outcome:
    """Runs a sweep. Raises InputError before anything starts for what can be known to be wrong by then."""
    made = plan(kept(overrides))
    name = name_of(made.settings)
    folder = folder_of(made.config["storage"], name)
    if (folder / SETUP).exists():
        raise InputError(
            f"there is a sweep {name} in {folder.parent}: onestage sweep resume {name}, or another sweep.name"
        )
    return _run(made, name, folder, before=None)


def resume(name: str, overrides: Sequence[str], *, storage: str) -> Outcome:
    """Goes on with a sweep that was cut: finished trials stay, those under way go on from their checkpoints."""
    folder = folder_of(storage, name)
    overrides = kept(overrides)
    before = Setup.load(folder)
    for override in overrides:
        if override not in before.overrides and not override.startswith(MAY_CHANGE):
            raise InputError(
                f"{override}: sweep {name} goes on as it was begun; what may change is {', '.join(MAY_CHANGE)}"
            )
    return _run(plan(merged(before.overrides, overrides)), name, folder, before=before)


def _run(made: Plan, name: str, folder: Path, *, before: Setup | None) -> Outcome:
    if (journal := journal_of(folder)).at_work:
        raise InputError(f"sweep {name} is at work: onestage sweep status {name} shows it")
    if before is not None:
        mend(folder, before, journal)
    uri = store_uri(made.config)
    check_storage(made.config["storage"])
    folder.mkdir(parents=True, exist_ok=True)
    most = f", at most {made.trials} trials" if made.trials else ""
    cluster = made.config["cluster"]
    where = f", on the cluster at {connection.resolved(cluster['address'])}" if cluster["kind"] == "ray" else ""
    print(f"sweep {name}: {made.search} search{most}{where}, in {folder}", file=sys.stderr)
    with _ray(cluster):
        own = _fixed_settings(made, name, folder, resumed=before is not None)
        parent = before.parent if before else None
        if parent is not None:
            launch.reopen_run(uri, parent)
        elif uri is not None:
            tags = {SWEEP_TAG: name, "onestage.folder": str(folder)}
            parent = launch.open_run(uri, made.config, name=name, tags=tags)
        setup = Setup(
            name=name,
            overrides=made.overrides,
            metric=made.settings["metric"],
            maximize=made.settings["direction"] == "maximize",
            cluster=cluster,
            tracking_uri=uri,
            parent=parent,
            **({"started": before.started} if before else {}),
        )
        setup.save(folder)
        origin.code().save(folder / origin.CODE_FOLDER)
        watch = Watch(folder, setup)
        try:
            with _on_sigterm(), beating(uri, parent):
                ended, code = _run_trials(watch, [*made.overrides, *own])
                mend(folder, setup, journal_of(folder))
                crown = code in (DONE, OUT_OF_BUDGET)  # who interrupts is in a hurry
                conclusion = conclude(folder, setup, made, crown=crown)
        except BaseException as error:
            watch.end(INTERRUPTED if isinstance(error, KeyboardInterrupt | SystemExit) else FAILED, _in_short(error))
            raise
    watch.end(code, None if code == DONE else ended)
    shutil.rmtree(folder / ".tune", ignore_errors=True)
    return Outcome(name=name, folder=folder, exit_code=code, ended=ended, conclusion=conclusion)


def _run_trials(watch: Watch, words: list[str]) -> tuple[str, int]:
    """Until the sweeper ends: why that was, and the exit code that says so."""
    try:
        with watch:
            multirun("train", words, trial.run)
    except KeyboardInterrupt:
        return "interrupted", INTERRUPTED
    except SystemExit:  # what the sweeper makes of SIGTERM
        return "preempted", PREEMPTED
    journal = journal_of(watch.folder)
    if journal.ended_because in OUT_OF_TIME:
        return {"trial_hours": "gpu_hours"}.get(journal.ended_because, journal.ended_because), OUT_OF_BUDGET
    states = [one.state for one in journal.trials.values()]
    if "lost" in states:
        return f"{states.count('lost')} lost", FAILED
    return ("all", DONE) if {"done", "stopped"} & set(states) else ("all failed", FAILED)


@contextmanager
def _on_sigterm() -> Iterator[None]:
    """SIGTERM as an exit like others, also before and behind the trials, which have the sweeper's own."""

    def leave(number: int, frame: Any) -> None:
        sys.exit(PREEMPTED)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _in_short(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")


def _fixed_settings(made: Plan, name: str, folder: Path, *, resumed: bool) -> list[str]:
    """The sweeper's settings that nobody chooses. Raises InputError where a trial is larger than the cluster."""
    import ray

    cluster, budget = made.config["cluster"], made.budget
    share_gpus(cluster)
    side_by_side(cluster, connection.nodes())
    workers = [resources.of_worker(cluster)] * (cluster["min_workers"] or cluster["num_workers"])
    here = f"node:{ray.util.get_node_ip_address()}"
    own = {"CPU": 0, "memory": 1, here.replace(":", r"\:"): SHARE_OF_NODE}  # Tune wants some resource, however little
    bundles = ["{" + ",".join(f"{key}:{value}" for key, value in one.items()) + "}" for one in [own, *workers]]
    return [
        f"sweep.name={name}",
        f"hydra.sweep.dir='{folder.absolute()}'",
        f"hydra.sweeper.bundles=[{','.join(bundles)}]",
        f"hydra.sweeper.wait_s={cluster['wait'] * 60:g}",
        f"hydra.sweeper.resume={str(resumed).lower()}",
        *(
            [f"hydra.sweeper.trial_hours={budget['gpu_hours'] / resources.counted_gpus(cluster)}"]
            if budget["gpu_hours"]
            else []
        ),
    ]


@contextmanager
def _ray(cluster: dict[str, Any]) -> Iterator[None]:
    """The cluster that the config names: a Ray of this machine that ends with the sweep, or one that is there."""

    said = -math.inf

    def say(text: str) -> None:
        nonlocal said
        if time.monotonic() - said >= SAY_EVERY_S:
            said = time.monotonic()
            print(f"onestage: {text}", file=sys.stderr)

    if cluster["kind"] == "ray":
        with connection.attached(cluster, wait_s=cluster["wait"] * 60, say=say):
            yield
    else:
        # Each trial is some processes, and Ray would say on stdout that they are many.
        os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "32")
        with connection.local(cores=max(num_cores(), cluster["num_workers"]), gpus=num_gpus()):
            yield
