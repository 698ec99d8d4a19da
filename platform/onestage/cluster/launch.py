"""From a composed config to a finished run: checks, opens the MLflow run, trains where asked, and ends the run."""

import contextlib
import json
import os
import sys
import traceback
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final, Literal

from onestage.cluster.history import History, Summary
from onestage.cluster.job import Job
from onestage.cluster.preflight import check, num_gpus
from onestage.cluster.progress import ProgressBar
from onestage.cluster.resume import resumed
from onestage.cluster.stop import Preempted, Stop
from onestage.cluster.storage import RunFolder, check_storage
from onestage.data.threads import num_cores
from onestage.errors import DONE, FAILED, INTERRUPTED, PREEMPTED, WRONG_INPUT, InputError

Status = Literal["FINISHED", "FAILED", "KILLED"]
"""How MLflow knows a run's end."""

ENDINGS: Final = {
    DONE: "finished",
    FAILED: "failed",
    WRONG_INPUT: "failed",
    INTERRUPTED: "interrupted",
    PREEMPTED: "preempted",
}
"""How the run's history knows it, by exit code."""


@dataclass(frozen=True)
class Outcome:
    """How a training ended; ``exit_code`` says so to a shell."""

    run_id: str
    status: Status
    exit_code: int
    folder: Path
    metrics: dict[str, float]
    checkpoint: str | None
    tracking_uri: str | None
    reason: str | None = None
    history: Summary | None = None

    @property
    def diverged(self) -> bool:
        """Whether the same training would end so again."""
        return (self.reason or "").startswith("Diverged: ")

    @property
    def resumable(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        return self.status != "FINISHED" and any((self.folder / "checkpoints").glob("last*.ckpt"))


def launch(config: dict[str, Any]) -> Outcome:
    """Trains as ``config`` (of ``onestage.config.compose``) says, from the run's last checkpoint under ``resume``.

    Raises InputError before anything starts for what can be known to be wrong by then. A training that fails later is
    an Outcome; its MLflow run is never left RUNNING.
    """
    from onestage.tracking.tracker import store_uri

    uri = store_uri(config)
    if config["resume"]:
        config = check(resumed(config, uri))
        check_storage(config["storage"])
        run_id = config["resume"]
        _reopen_run(uri, run_id)
    else:
        config = check(config)
        run_id = _open_run(uri, config)
    folder = RunFolder(config["storage"], run_id).local
    ending = _train(Job(config=config, run_id=run_id, folder=str(folder), tracking_uri=uri))
    if uri is not None:
        from onestage.tracking import runs

        runs.end_run(uri, run_id, ending.status, ending.reason)
        if ending.history is not None and ending.history["restarts"]:
            _log_restarts(uri, run_id, ending.history)
    return ending


def _log_restarts(uri: str, run_id: str, history: Summary) -> None:
    """What the losses of this run cost, beside its other numbers; where the server is away, the file has it."""
    from onestage.tracking import runs

    numbers = {
        "cluster/restarts": history["restarts"],
        "cluster/lost_images": history["lost_images"],
        "cluster/recovery_s": sum(history["recovery_s"]),
    }
    with contextlib.suppress(Exception):
        runs.log_summary(uri, run_id, numbers)


def _train(job: Job) -> Outcome:
    """Trains, and says how it ended, whatever ended it."""
    folder = Path(job["folder"])
    status: Status = "FAILED"
    code, reason = FAILED, None
    result: dict[str, Any] = {}
    history: History | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(folder / "config.json", job["config"])
        RunFolder(job["config"]["storage"], job["run_id"]).send(folder / "config.json")
        print(f"run {job['run_id']}", file=sys.stderr)  # what resume= asks for, should the machine die
        stop = Stop()
        with stop.signals(), ProgressBar() as bar:
            history = History(folder / "history.jsonl", say=lambda text: bar({"note": text}))

            def hear(message: dict[str, Any]) -> None:
                history.hear(message)
                bar(message)

            result = _run(job, hear, stop)
        status, code = "FINISHED", DONE
    except InputError as error:
        code, reason = WRONG_INPUT, str(error)
    except KeyboardInterrupt:
        status, code, reason = "KILLED", INTERRUPTED, "interrupted from the keyboard"
    except Preempted:
        status, code, reason = "KILLED", PREEMPTED, "preempted (SIGTERM)"
    except Exception as error:
        reason = f"{type(error).__name__}: {(str(error).strip() or '(no message)').splitlines()[-1]}"
        with contextlib.suppress(OSError):  # a full disk may be what ended it
            (folder / "error.txt").write_text("".join(traceback.format_exception(error)))
            reason += f" (the whole story: {folder / 'error.txt'})"
    if history is not None:
        history.end(ENDINGS[code], reason)
    return Outcome(
        run_id=job["run_id"],
        status=status,
        exit_code=code,
        folder=folder,
        metrics=result.get("metrics", {}),
        checkpoint=result.get("checkpoint"),
        tracking_uri=job["tracking_uri"],
        reason=reason,
        history=history.summary() if history is not None else None,
    )


def _open_run(uri: str | None, config: dict[str, Any]) -> str:
    if uri is None:
        check_storage(config["storage"])
        return uuid.uuid4().hex
    from onestage.tracking import runs

    runs.check(uri)
    check_storage(config["storage"])
    runs.mark_dead(uri, config["tracking"]["experiment"])
    tags = {"command": " ".join(sys.argv)}
    if "ONESTAGE_JOB" in os.environ:  # set where a job was submitted
        tags["onestage.job"] = os.environ["ONESTAGE_JOB"]
    return runs.open_run(uri, config["tracking"]["experiment"], name=run_name(config), tags=tags)


def run_name(config: dict[str, Any]) -> str:
    """The config's own, or the detector or else the experiment that was chosen, with the time."""
    chosen = dict(override.split("=", 1) for override in config["overrides"] if "=" in override)
    choices = [chosen[key] for key in ("detector", "experiment") if chosen.get(key, "null") != "null"]
    choice = choices[0] if choices else "yolov3_tiny"
    return config["name"] or f"{choice} {datetime.now():%m-%d %H:%M}"


def _reopen_run(uri: str | None, run_id: str) -> None:
    """Where the server is away the training goes on all the same; what it logs waits on disk."""
    if uri is None:
        return
    from onestage.tracking import runs

    try:
        runs.reopen_run(uri, run_id)
    except InputError:
        raise
    except Exception as error:
        first = str(error).splitlines()[0]
        print(f"onestage: MLflow is away ({first}); going on, and sending what is logged later", file=sys.stderr)


def _run(job: Job, show: Callable[[dict[str, Any]], None], stop: Stop) -> dict[str, Any]:
    kind = job["config"]["cluster"]["kind"]
    if kind == "none":
        from onestage.cluster import in_process

        return in_process.run(job, show=show, stop=stop)
    if kind == "ray":
        from onestage.cluster import supervisor

        return supervisor.run(job, show=show, stop=stop)
    from onestage.cluster import ray_train

    workers = job["config"]["cluster"]["num_workers"]
    if workers > num_cores():
        print(f"onestage: {workers} workers share {num_cores()} cores: fewer would be faster", file=sys.stderr)
    return ray_train.on_this_machine(job, cores=max(num_cores(), workers), gpus=num_gpus(), show=show, stop=stop)


def _write_json(path: Path, value: Any) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1))
    partial.replace(path)
