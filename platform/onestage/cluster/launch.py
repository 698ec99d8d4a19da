"""From a composed config to a finished run: checks, opens the MLflow run, trains where asked, and ends the run."""

import json
import os
import signal
import sys
import traceback
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from onestage.cluster.job import Job
from onestage.cluster.progress import ProgressBar
from onestage.config import compose, merged
from onestage.data.manifest import Manifest
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
    def resumable(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        return self.status != "FINISHED" and (self.folder / "checkpoints" / "last.ckpt").is_file()


def launch(config: dict[str, Any]) -> Outcome:
    """Trains as ``config`` (of ``onestage.config.compose``) says, from the run's last checkpoint under ``resume``.

    Raises InputError before anything starts for what can be known to be wrong by then. A training that fails later is
    an Outcome; its MLflow run is never left RUNNING.
    """
    uri = _tracking_uri(config)
    if config["resume"]:
        config = _resumed(config, uri)
    config = check(config)
    if uri is not None and not config["resume"]:
        from onestage.tracking import runs

        runs.check(uri)
    run_id = config["resume"] or _open_run(uri, config)
    folder = Path(config["storage"]) / run_id
    folder.mkdir(parents=True, exist_ok=True)
    if config["resume"]:
        _reopen_run(uri, run_id)
    _write_json(folder / "config.json", config)
    job = Job(config=config, run_id=run_id, folder=str(folder), tracking_uri=uri)
    status: Status = "FAILED"
    code, reason = FAILED, None
    result: dict[str, Any] = {}
    try:
        with _sigterm_raises(), ProgressBar() as bar:
            result = _run(job, bar)
        status, code = "FINISHED", DONE
    except InputError as error:
        code, reason = WRONG_INPUT, str(error)
    except KeyboardInterrupt:
        status, code, reason = "KILLED", INTERRUPTED, "interrupted from the keyboard"
    except Preempted:
        status, code, reason = "KILLED", PREEMPTED, "ended by SIGTERM"
    except Exception as error:
        reason = f"{type(error).__name__}: {(str(error).strip() or '(no message)').splitlines()[-1]}"
        (folder / "error.txt").write_text("".join(traceback.format_exception(error)))
        reason += f" (the whole story: {folder / 'error.txt'})"
    finally:
        if uri is not None:
            from onestage.tracking import runs

            runs.end_run(uri, run_id, status, reason)
    return Outcome(
        run_id=run_id,
        status=status,
        exit_code=code,
        folder=folder,
        metrics=result.get("metrics", {}),
        checkpoint=result.get("checkpoint"),
        tracking_uri=uri,
        reason=reason,
    )


def check(config: dict[str, Any]) -> dict[str, Any]:
    """The config with paths made absolute and shares of the machine worked out.

    Raises InputError for what a person should know before a run is opened.
    """
    config = json.loads(json.dumps(config))
    data, cluster = config["data"], config["cluster"]
    if data["root"] is None:
        raise InputError("data.root is not set: name a dataset folder, as data.root=shards/bccd")
    data["root"] = os.path.abspath(data["root"])
    config["storage"] = os.path.abspath(config["storage"])
    manifest = Manifest.load(data["root"])
    classes, wanted = len(manifest.classes), config["detector"]["num_classes"]
    if classes != wanted:
        raise InputError(
            f"detector.num_classes is {wanted}, but {data['root']} has {classes} classes "
            f"({', '.join(manifest.classes[:8])}): leave detector.num_classes out"
        )
    for split in ("train", "val"):
        manifest.split(split)
    for key, value in (("data.batch_size", data["batch_size"]), ("cluster.num_workers", cluster["num_workers"])):
        if value < 1:
            raise InputError(f"{key} must be at least 1, got {value}")
    if config["output"] not in ("text", "json"):
        raise InputError(f"output must be text or json, got {config['output']!r}")
    _share_machine(cluster)
    return config


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def num_gpus() -> int:
    """The GPUs of this machine, asked without starting CUDA in this process."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([one for one in visible.split(",") if one and one != "-1"])
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


def _share_machine(cluster: dict[str, Any]) -> None:
    cores, gpus, workers = num_cores(), num_gpus(), cluster["num_workers"]
    if cluster["kind"] == "none" and workers > 1:
        raise InputError(f"cluster=none is one process, got cluster.num_workers={workers}: use cluster=local")
    if workers > cores:
        raise InputError(f"cluster.num_workers={workers}, but this machine has {cores} cores: lower it")
    if cluster["gpus_per_worker"] is None:
        cluster["gpus_per_worker"] = 1 if gpus >= workers else 0
    if cluster["gpus_per_worker"] * workers > gpus:
        raise InputError(
            f"{workers} workers of cluster.gpus_per_worker={cluster['gpus_per_worker']} need more than "
            f"this machine's {gpus} GPUs"
        )
    cluster["cpus_per_worker"] = cluster["cpus_per_worker"] or max(cores // workers, 1)
    if cluster["cpus_per_worker"] * workers > cores:
        raise InputError(
            f"{workers} workers of cluster.cpus_per_worker={cluster['cpus_per_worker']} need "
            f"{cluster['cpus_per_worker'] * workers} cores, but this machine has {cores}"
        )


def _tracking_uri(config: dict[str, Any]) -> str | None:
    if config["tracking"]["kind"] == "none":
        return None
    from onestage.tracking import runs

    return runs.tracking_uri(config["tracking"]["uri"])


def _resumed(config: dict[str, Any], uri: str | None) -> dict[str, Any]:
    """The config of the run to go on with, changed by what the command line says now."""
    storage, run_id = Path(config["storage"]), config["resume"]
    if run_id == "last":
        run_id = _last_unfinished(config, storage, uri)
    stored = storage / run_id / "config.json"
    if not stored.is_file():
        raise InputError(f"resume={run_id}: no such run under {storage.absolute()}; storage=… names another folder")
    before = json.loads(stored.read_text())["overrides"]
    return compose("train", merged(before, config["overrides"], [f"resume={run_id}"]))


def _last_unfinished(config: dict[str, Any], storage: Path, uri: str | None) -> str:
    experiment = config["tracking"]["experiment"]
    if uri is not None:
        from onestage.tracking import runs

        runs.mark_dead(uri, experiment)
        found = runs.last_unfinished(uri, experiment)
    else:
        unfinished = [path.parent for path in storage.glob("*/config.json") if not (path.parent / "model").exists()]
        found = max(unfinished, key=lambda path: path.stat().st_mtime).name if unfinished else None
    if found is None:
        raise InputError(f"resume=last: experiment {experiment!r} has no unfinished run")
    return found


def _open_run(uri: str | None, config: dict[str, Any]) -> str:
    if uri is None:
        return uuid.uuid4().hex
    from onestage.tracking import runs

    choice = next((o.partition("=")[2] for o in config["overrides"] if o.startswith("detector=")), "yolov3_tiny")
    runs.mark_dead(uri, config["tracking"]["experiment"])
    name = config["name"] or f"{choice} {datetime.now():%m-%d %H:%M}"
    return runs.open_run(uri, config["tracking"]["experiment"], name=name, tags={"command": " ".join(sys.argv)})


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

    return ray_train.run(job, cores=num_cores(), gpus=num_gpus(), show=bar)


@contextmanager
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
