"""From a composed config to a finished run: checks, opens the MLflow run, trains where asked, and ends the run."""

import contextlib
import json
import signal
import sys
import traceback
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from onestage.cluster.job import Job
from onestage.cluster.preflight import check, num_gpus
from onestage.cluster.progress import ProgressBar
from onestage.cluster.resume import resumed
from onestage.data.threads import num_cores
from onestage.errors import DONE, FAILED, INTERRUPTED, PREEMPTED, WRONG_INPUT, InputError

Status = Literal["FINISHED", "FAILED", "KILLED"]
"""How MLflow knows a run's end."""


class Preempted(BaseException):
    """SIGTERM: the machine is wanted back."""


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

    @property
    def diverged(self) -> bool:
        """Whether the same training would end so again."""
        return (self.reason or "").startswith("Diverged: ")

    @property
    def resumable(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        return self.status != "FINISHED" and (self.folder / "checkpoints" / "last.ckpt").is_file()


def launch(config: dict[str, Any]) -> Outcome:
    """Trains as ``config`` (of ``onestage.config.compose``) says, from the run's last checkpoint under ``resume``.

    Raises InputError before anything starts for what can be known to be wrong by then. A training that fails later is
    an Outcome; its MLflow run is never left RUNNING.
    """
    from onestage.tracking.tracker import store_uri

    uri = store_uri(config)
    if config["resume"]:
        config = check(resumed(config, uri))
        run_id = config["resume"]
        _reopen_run(uri, run_id)
    else:
        config = check(config)
        run_id = _open_run(uri, config)
    folder = Path(config["storage"]) / run_id
    ending = _train(Job(config=config, run_id=run_id, folder=str(folder), tracking_uri=uri))
    if uri is not None:
        from onestage.tracking import runs

        runs.end_run(uri, run_id, ending.status, ending.reason)
    return ending


def _train(job: Job) -> Outcome:
    """Trains, and says how it ended, whatever ended it."""
    folder = Path(job["folder"])
    status: Status = "FAILED"
    code, reason = FAILED, None
    result: dict[str, Any] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(folder / "config.json", job["config"])
        print(f"run {job['run_id']}", file=sys.stderr)  # what resume= asks for, should the machine die
        with _sigterm_raises(), ProgressBar() as bar:
            result = _run(job, bar)
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
    return Outcome(
        run_id=job["run_id"],
        status=status,
        exit_code=code,
        folder=folder,
        metrics=result.get("metrics", {}),
        checkpoint=result.get("checkpoint"),
        tracking_uri=job["tracking_uri"],
        reason=reason,
    )


def _open_run(uri: str | None, config: dict[str, Any]) -> str:
    if uri is None:
        return uuid.uuid4().hex
    from onestage.tracking import runs

    runs.check(uri)
    runs.mark_dead(uri, config["tracking"]["experiment"])
    tags = {"command": " ".join(sys.argv)}
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


def _run(job: Job, bar: ProgressBar) -> dict[str, Any]:
    if job["config"]["cluster"]["kind"] == "none":
        from onestage.cluster import in_process

        return in_process.run(job, show=bar)
    from onestage.cluster import ray_train

    workers = job["config"]["cluster"]["num_workers"]
    if workers > num_cores():
        print(f"onestage: {workers} workers share {num_cores()} cores: fewer would be faster", file=sys.stderr)
    return ray_train.run(job, cores=max(num_cores(), workers), gpus=num_gpus(), show=bar)


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """SIGTERM as an exception, so that the run's end is written; where signals can be handled at all."""

    def handle(*_: object) -> None:
        raise Preempted

    try:
        before = signal.signal(signal.SIGTERM, handle)
    except ValueError:  # not in the main thread, as in a notebook's helper
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _write_json(path: Path, value: Any) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1))
    partial.replace(path)
