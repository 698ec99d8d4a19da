"""From a composed config to a finished run: checks, opens the MLflow run, trains where asked, and ends the run."""

import contextlib
import math
import os
import sys
import traceback
import uuid
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from onestage.cluster import record
from onestage.cluster.history import History, Summary
from onestage.cluster.job import JOB_VARIABLE, RUN_FILE_VARIABLE, Job
from onestage.cluster.preflight import check, num_gpus
from onestage.cluster.progress import ProgressBar
from onestage.cluster.resume import resumed
from onestage.cluster.stop import Ended, Preempted, Stop
from onestage.cluster.storage import RunFolder, check_storage, write_json
from onestage.config import merged
from onestage.data.threads import num_cores
from onestage.errors import DONE, FAILED, INTERRUPTED, PREEMPTED, WRONG_INPUT, InputError
from onestage.tracking.endings import Ending
from onestage.tracking.heartbeat import beating
from onestage.tracking.origin import Code, code
from onestage.tracking.redaction import redact

Show = Callable[[dict[str, Any]], None]
Run = Callable[[Job, Show, Stop], dict[str, Any]]
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
    status: Ending
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
    def out_of_memory(self) -> bool:
        """Whether a smaller batch may be what it needs."""
        return any(words in (self.reason or "") for words in ("out of memory on ", "out of GPU memory on "))

    @property
    def lacked_machines(self) -> bool:
        """Whether it waited in vain for room on the cluster, or lost its workers again and again."""
        reason = self.reason or ""
        return reason.startswith("TooFewResources: ") or "restarts without progress)" in reason

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

    with _begun(config["cluster"]) as by:
        uri = store_uri(config)
        if config["resume"]:
            config = check(resumed(config, uri))
            check_storage(config["storage"])
            run_id = config["resume"]
            reopen_run(uri, run_id)
        else:
            config = check(config)
            run_id = open_run(uri, config)
        if RUN_FILE_VARIABLE in os.environ:
            Path(os.environ[RUN_FILE_VARIABLE]).write_text(run_id, encoding="utf-8")
        stop = Stop()
        with stop.signals():
            return train(job_of(config, run_id, uri, code()), by=by, stop=stop, shown=ProgressBar)


def _begun(cluster: Mapping[str, Any]) -> AbstractContextManager[Run]:
    """Whoever has the workers; the driver on a cluster takes seconds to start, beside what is to be done before."""
    if cluster["kind"] != "ray":
        return contextlib.nullcontext(by_cluster)
    from onestage.cluster import connection, supervisor

    address = connection.resolved(cluster["address"])  # refused before a run is opened
    print(f"cluster {address}", file=sys.stderr)
    return supervisor.begun(address)


def job_of(config: dict[str, Any], run_id: str, uri: str | None, code: Code) -> Job:
    """A training that was checked, and whose run is open."""
    folder = RunFolder(config["storage"], run_id).local
    return Job(config=config, run_id=run_id, folder=str(folder), tracking_uri=uri, changes=code.changes)


def train(job: Job, *, by: Run, stop: Stop, shown: Callable[[], AbstractContextManager[Show]]) -> Outcome:
    """Trains ``by`` whoever has the workers, and ends the run in MLflow; ``shown`` opens what shows the progress."""
    with beating(job["tracking_uri"], job["run_id"]):
        ending = _train(job, by, stop, shown)
        while ending.out_of_memory and (config := shrunk(job["config"])) is not None:
            size = config["data"]["batch_size"]
            print(f"onestage: {ending.reason}; going on with data.batch_size={size} and accumulation", file=sys.stderr)
            job = Job(**{**job, "config": config})
            ending = _train(job, by, stop, shown)
    record.end(job, ending.status, ending.reason, ending.history)
    return ending


def shrunk(config: dict[str, Any]) -> dict[str, Any] | None:
    """The same training with half the images at once and as many a step; None where ``on_oom`` or one image forbids.

    >>> config = {"on_oom": "shrink", "overrides": [], "data": {"batch_size": 5}}
    >>> small = shrunk(config | {"cluster": {"num_workers": 2, "global_batch": None}})
    >>> small["overrides"], small["data"]
    (['data.batch_size=3', 'cluster.global_batch=10'], {'batch_size': 3, 'global_batch': 10})
    """
    data, cluster = config["data"], config["cluster"]
    if config["on_oom"] != "shrink" or data["batch_size"] <= 1:
        return None
    step = cluster["global_batch"] or data["batch_size"] * cluster["num_workers"]
    half = math.ceil(data["batch_size"] / 2)
    return config | {
        "data": data | {"batch_size": half, "global_batch": step},
        "cluster": cluster | {"global_batch": step},
        "overrides": merged(config["overrides"], [f"data.batch_size={half}", f"cluster.global_batch={step}"]),
    }


def _train(job: Job, by: Run, stop: Stop, shown: Callable[[], AbstractContextManager[Show]]) -> Outcome:
    """Trains, and says how it ended, whatever ended it."""
    folder = Path(job["folder"])
    status: Ending = "FAILED"
    code, reason = FAILED, None
    result: dict[str, Any] = {}
    history: History | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", job["config"])
        RunFolder(job["config"]["storage"], job["run_id"]).send(folder / "config.json")
        print(f"run {job['run_id']}", file=sys.stderr)  # what resume= asks for, should the machine die
        with shown() as bar:
            history = History(folder / "history.jsonl", say=lambda text: bar({"note": text}))

            def hear(message: dict[str, Any]) -> None:
                history.hear(message)
                bar(message)

            result = by(job, hear, stop)
        status, code = "FINISHED", DONE
    except InputError as error:
        code, reason = WRONG_INPUT, str(error)
    except KeyboardInterrupt:
        status, code, reason = "KILLED", INTERRUPTED, "interrupted from the keyboard"
    except Preempted:
        status, code, reason = "KILLED", PREEMPTED, "preempted (SIGTERM)"
    except Ended:
        status, code, reason = "KILLED", INTERRUPTED, "ended by the sweep"
    except Exception as error:
        reason = redact(f"{type(error).__name__}: {(str(error).strip() or '(no message)').splitlines()[-1]}")
        with contextlib.suppress(OSError):  # a full disk may be what ended it
            (folder / "error.txt").write_text(redact("".join(traceback.format_exception(error))))
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


def open_run(uri: str | None, config: dict[str, Any], *, name: str | None = None, tags: Mapping[str, str] = {}) -> str:
    """Opens a new training's run and returns its id. Raises InputError where the store or the storage is no use."""
    if uri is None:
        check_storage(config["storage"])
        return uuid.uuid4().hex
    from onestage.tracking import runs

    runs.check(uri)
    check_storage(config["storage"])
    runs.mark_dead(uri, config["tracking"]["experiment"])
    tags = {"command": " ".join(sys.argv), **tags}
    if JOB_VARIABLE in os.environ:
        tags[runs.JOB_TAG] = os.environ[JOB_VARIABLE]
    return runs.open_run(uri, config["tracking"]["experiment"], name=name or run_name(config), tags=tags)


def run_name(config: dict[str, Any]) -> str:
    """The config's own, or what was chosen with the time."""
    return config["name"] or f"{chosen(config)} {datetime.now():%m-%d %H:%M}"


def chosen(config: Mapping[str, Any]) -> str:
    """The detector or else the experiment that the overrides name."""
    given = dict(override.split("=", 1) for override in config["overrides"] if "=" in override)
    choices = [given[key] for key in ("detector", "experiment") if given.get(key, "null") != "null"]
    return choices[0] if choices else "yolov3_tiny"


def reopen_run(uri: str | None, run_id: str) -> None:
    """Where the server is away the training goes on all the same; what it logs waits on disk."""
    if uri is None:
        return
    from onestage.tracking import runs

    try:
        runs.reopen_run(uri, run_id)
    except InputError:
        raise
    except Exception as error:
        first = redact(str(error).splitlines()[0])
        print(f"onestage: MLflow is away ({first}); going on, and sending what is logged later", file=sys.stderr)


def by_cluster(job: Job, show: Show, stop: Stop) -> dict[str, Any]:
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
