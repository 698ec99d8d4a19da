"""One trial of a sweep: a training like any other, in the process that Ray Tune starts for it.

Its workers are Ray Train's, beside it on the cluster; Tune hears of it after every validation.
"""

import json
import math
import shlex
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Final

from filelock import FileLock, Timeout

from onestage.cluster import launch, ray_train
from onestage.cluster.board import Validated
from onestage.cluster.preflight import check
from onestage.cluster.stop import Stop
from onestage.cluster.storage import RunFolder
from onestage.errors import InputError
from onestage.sweeps.folder import WAITING, Setup, State, journal_of
from onestage.tracking import runs
from onestage.tracking.origin import CODE_FOLDER, Code
from onestage.training.checkpoint_files import LAST

SAVE_EVERY_S: Final = 1.0
POLL_S: Final = 0.25
FAREWELL_S: Final = 200.0
"""More than hydra.sweeper.stop_s, after which Tune kills a trial that does not end."""
DONOR: Final = "donor.json"


def run(config: dict[str, Any], number: int, folder: Path) -> dict[str, Any]:
    """Trains trial ``number`` from where it stood, and returns its best score; the sweeper's task.

    Raises RuntimeError where the training fails, and Lost where it is worth running again.
    """
    with _alone(folder):
        return _run(config, number, folder)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """PBT begins a trial's next life while the one before still saves: this waits for its end."""
    from hydra_plugins.ray_tune_sweeper._trial import Lost  # imports Ray, as nobody may before its token is set

    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "lock", timeout=FAREWELL_S):
            yield
    except Timeout:
        raise Lost(f"its former life has not ended within {FAREWELL_S:g} s") from None


def _run(config: dict[str, Any], number: int, folder: Path) -> dict[str, Any]:
    from hydra_plugins.ray_tune_sweeper._trial import Lost

    setup, code = Setup.load(folder.parent), Code.load(folder.parent / CODE_FOLDER)
    config["cluster"] |= {key: setup.cluster[key] for key in ("cpus_per_worker", "gpus_per_worker")}
    state = State.load(folder)
    state.doing = "starting"
    state.save(folder)
    if state.run_id is not None:
        config["resume"] = state.run_id
        config = check(config)
        launch.reopen_run(setup.tracking_uri, state.run_id)
    else:
        config = check(config)
        trial = journal_of(folder.parent).trials[number]
        tags = _tags(setup, number) | runs.point_tags(trial.point) | code.tags()
        tags["command"] = shlex.join(["onestage", "train", *trial.overrides])  # the same by itself
        name = f"{setup.name} #{number}"
        state.run_id = launch.open_run(setup.tracking_uri, config, name=name, tags=tags)
        if setup.tracking_uri is not None:
            runs.tell(setup.tracking_uri, state.run_id, {}, params=_groups(config, trial.point))
    state.save(folder)
    report = Report(state, setup, folder)
    if _take_over(config["storage"], state.run_id):
        state.reported = 0  # its epochs are the other's from here on
    with _stop() as stop:
        report.stop = stop
        outcome = launch.train(
            launch.job_of(config, state.run_id, setup.tracking_uri, code),
            by=lambda job, show, stop: ray_train.on_this_cluster(job, show=show, stop=stop),
            stop=stop,
            shown=lambda: nullcontext(report),
        )
    state.doing, state.outcome = outcome.status.lower(), outcome.metrics
    state.save(folder)
    if stop.asked is not None and outcome.status != "FINISHED":
        raise SystemExit  # as asked: the sweep may go on with it one day
    if outcome.lacked_machines:
        raise Lost(outcome.reason)
    if outcome.status != "FINISHED":
        raise RuntimeError(outcome.reason)  # which the sweeper tells without its type
    return {"best": state.score, "run_id": state.run_id}


class Report:
    """Hears a training's messages: keeps the trial's state on disk, and tells Tune of each validation.

    Tune's answer may be to end the trial, or to have another go on from it. So it hears of a validation when a
    checkpoint holds what was validated, or where that could not be written, at the next one.
    """

    stop: Stop

    def __init__(self, state: State, setup: Setup, folder: Path) -> None:
        self.state, self.setup, self.folder = state, setup, folder
        self.saved = 0.0
        self.unwritten: Validated | None = None

    def __call__(self, message: dict[str, Any]) -> None:
        state = self.state
        if "waiting" in message:
            state.doing = f"{WAITING}: {message['waiting']}"
        elif "lost" in message:
            state.doing = f"starting again: {message['lost']}"
        elif "step" in message:
            state.doing, state.loss = "training", message.get("train/loss", state.loss)
            state.step, state.num_steps, state.num_epochs = message["step"], message["num_steps"], message["num_epochs"]
        if "validated" in message:
            self._validated(message["validated"])
        elif "written" in message:
            if self.unwritten is not None and message["written"] >= self.unwritten["step"]:
                self._report()
        elif time.monotonic() - self.saved >= SAVE_EVERY_S:
            self._save()

    def _save(self) -> None:
        self.saved = time.monotonic()
        self.state.save(self.folder)

    def _validated(self, validated: Validated) -> None:
        self._report()
        setup, state, metrics = self.setup, self.state, validated["metrics"]
        if setup.metric not in metrics:
            raise InputError(f"sweep.metric={setup.metric} is none of a validation's numbers: {', '.join(metrics)}")
        score = metrics[setup.metric]
        if math.isfinite(score) and (state.score is None or setup.sign * (score - state.score) > 0):
            state.score, state.metrics = score, metrics
        state.epoch = validated["epoch"]
        self._save()
        self.unwritten = validated

    def _report(self) -> None:
        validated, self.unwritten = self.unwritten, None
        # Of a restart behind it; or nobody listens any more, and Tune would never answer.
        if validated is None or validated["epoch"] <= self.state.reported or self.stop.asked is not None:
            return
        self.state.reported = validated["epoch"]
        self._save()
        told = {**validated["metrics"], "best": self.state.score, "epoch": validated["epoch"]}
        try:
            _tell_tune(told, run_id=self.state.run_id)
        except SystemExit:  # the answer is that the trial is to end: its workers save first
            self.stop.asked = "ended"


def _tell_tune(metrics: dict[str, Any], *, run_id: str | None) -> None:
    """Waits until Tune has heard; whoever is to learn from this trial gets to know its run."""
    from ray import tune

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / DONOR).write_text(json.dumps({"run_id": run_id}))
        tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(folder))


def _take_over(storage: str, mine: str) -> bool:
    """Under PBT: begins with the newest checkpoint of the trial that this one is to learn from, if there is one."""
    from ray import tune

    given = tune.get_checkpoint()
    if given is None:
        return False
    with given.as_directory() as folder:
        donor = json.loads((Path(folder) / DONOR).read_text())["run_id"]
    found = RunFolder(storage, donor).fetch_checkpoint(lambda text: None) if donor != mine else None
    if found is None:
        return False
    own = RunFolder(storage, mine)
    own.checkpoints.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(found, own.checkpoints / f"{LAST}.partial")
    (own.checkpoints / f"{LAST}.partial").replace(own.checkpoints / LAST)
    own.send_checkpoints(keep=1)
    return True


@contextmanager
def _stop() -> Iterator[Stop]:
    """A wish to stop that comes from the sweep."""
    from hydra_plugins.ray_tune_sweeper._trial import asked_to_end

    stop, over = Stop(), threading.Event()

    def watch() -> None:
        while not over.wait(POLL_S):
            if asked_to_end():
                stop.asked = "ended"

    thread = threading.Thread(target=watch, name="sweep-stop", daemon=True)
    thread.start()
    try:
        yield stop
    finally:
        over.set()


def _tags(setup: Setup, number: int) -> dict[str, str]:
    return {
        **({"mlflow.parentRunId": setup.parent} if setup.parent else {}),
        runs.SWEEP_TAG: setup.name,
        runs.TRIAL_TAG: str(number),
    }


def _groups(config: Mapping[str, Any], point: Mapping[str, str | float]) -> dict[str, str]:
    """What a point chooses of groups, as `detector`; its other values are among a run's params anyway.

    >>> _groups({"detector": {"width": 1.0}, "seed": 1}, {"detector": "ssd300", "seed": 2, "detector.width": 0.5})
    {'detector': 'ssd300'}
    """
    return {key: str(value) for key, value in point.items() if isinstance(config.get(key), Mapping)}
