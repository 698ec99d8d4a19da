"""What every worker does: build from the plain config, fit, and on rank 0 keep the record."""

import json
import socket
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from safetensors.torch import save_file

from onestage import __version__
from onestage.cluster import machines, pictures
from onestage.cluster.job import Job
from onestage.cluster.storage import RunFolder
from onestage.config import build
from onestage.data.datamodule import DetectionData
from onestage.data.input_sizes import InputSizes
from onestage.data.manifest import FILE_NAME
from onestage.errors import InputError
from onestage.metrics.bootstrap import map_interval
from onestage.metrics.mean_ap import MeanAP
from onestage.tracking.origin import CHANGES, packages
from onestage.tracking.redaction import redact, without_user
from onestage.tracking.tracker import NoTracker, Tracker
from onestage.training.callbacks import (
    BatchPictures,
    BestFound,
    ClassTable,
    Ema,
    Pictures,
    Progress,
    StopWhenAsked,
    Throughput,
)
from onestage.training.checkpoint_files import BEST, LAST, step_of
from onestage.training.checkpoints import Checkpoints, Writer
from onestage.training.logger import SinkLogger
from onestage.training.module import DetectionModule, without_many_classes
from onestage.training.pulse import Pulse, Start
from onestage.training.skips import Skips

PREDICT_THRESHOLD = 0.25  # the score from which a detection is worth a person's look
AGREE = timedelta(minutes=30)
NOTE_TAG = "mlflow.note.content"

EXPECTED_WARNINGS = (
    ".*does not have many workers.*",  # data.num_workers says how many
    ".*isinstance.treespec, LeafSpec.*",  # Lightning's own use of torch
    ".*could not find the monitored key.*",  # between validations
    ".*`srun` command is available.*",  # who trains without Slurm on a host of Slurm does so on purpose
)


class Trainer(pl.Trainer):
    """Leaves SIGTERM to whoever asks a training to stop: Lightning hears it too, and would exit as if it was done."""

    @property
    def received_sigterm(self) -> bool:
        return False


def train(
    job: Job,
    *,
    rank: int,
    trainer_options: Mapping[str, Any],
    progress: Callable[[dict[str, Any]], None],
    world_size: int = 1,
    local_rank: int = 0,
    host: str | None = None,
    prepare: Callable[[pl.Trainer], pl.Trainer] = lambda trainer: trainer,
    pulse: Pulse | None = None,
    asked: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Fits, from the newest whole checkpoint in the run's folder where there is one.

    ``trainer_options`` place the trainer (accelerator, devices, strategy, plugins);
    ``prepare`` has the last word on it. ``host`` names this machine in the run's history. ``pulse`` is marked with
    the training's progress; where ``asked`` says so on any rank, all of them stop behind the same step with
    a checkpoint and raise Stopped.

    Returns plain data: the last metrics, and the paths of the last and the best checkpoint. Every rank gets the same.
    Raises InputError for what another try would not mend, such as a batch that the GPU's memory is too small for.
    """
    try:
        return _train(
            job,
            rank=rank,
            trainer_options=trainer_options,
            progress=progress,
            world_size=world_size,
            local_rank=local_rank,
            host=host or socket.gethostname(),
            prepare=prepare,
            pulse=pulse,
            asked=asked,
        )
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"out of GPU memory on {socket.gethostname()}: lower data.batch_size={job['config']['data']['batch_size']} "
            f"or data.input_size, or set trainer.precision=bf16-mixed"
        ) from error


def _train(
    job: Job,
    *,
    rank: int,
    trainer_options: Mapping[str, Any],
    progress: Callable[[dict[str, Any]], None],
    world_size: int,
    local_rank: int,
    host: str,
    prepare: Callable[[pl.Trainer], pl.Trainer],
    pulse: Pulse | None,
    asked: Callable[[], bool],
) -> dict[str, Any]:
    for expected in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=expected)
    config = job["config"]
    run = RunFolder(config["storage"], job["run_id"])
    last, best = run.checkpoints / LAST, run.checkpoints / BEST

    def note(text: str) -> None:
        progress({"checkpoint": text})

    resumed = _agreed_checkpoint(run, rank, note)
    pl.seed_everything(config["seed"], workers=True, verbose=False)
    data: DetectionData = build(config["data"])
    module = _module(job, data, resumed=resumed is not None)
    tracker = _tracker(job, run, resumed, say=lambda text: progress({"note": text})) if rank == 0 else NoTracker()
    settings, saving = config["trainer"], config["checkpoint"]
    writer = Writer(
        run.checkpoints,
        keep=saving["keep"],
        send=lambda: run.send_checkpoints(keep=saving["keep"]),
        written=lambda step: progress({"written": step}),
    )
    checkpoints = Checkpoints(
        writer, every_steps=saving["every_steps"], every_minutes=saving["every_minutes"], say=note
    )
    best_found = BestFound()
    placing = dict(trainer_options)
    trainer = Trainer(
        logger=SinkLogger(tracker.log_metrics),
        callbacks=[
            *([pulse] if pulse is not None else []),
            Start(
                progress,
                host=host,
                batch_size=config["data"]["batch_size"],
                global_batch=config["data"]["global_batch"],
            ),
            *_callbacks(config, data, run.local, tracker, progress),
            best_found,
            # Behind the averaged weights, which they save.
            checkpoints,
            StopWhenAsked(asked, save=checkpoints.save_now),
        ],
        plugins=[*placing.pop("plugins", []), writer],
        enable_checkpointing=False,  # Lightning's own
        accumulate_grad_batches=data.accumulate(world_size),
        sync_batchnorm=config["cluster"]["sync_norm"],
        max_epochs=settings["max_epochs"],
        max_steps=settings["max_steps"],
        precision=settings["precision"],
        deterministic=settings["deterministic"],
        gradient_clip_val=settings["gradient_clip"] or None,
        check_val_every_n_epoch=settings["val_every_epochs"],
        log_every_n_steps=settings["log_every_steps"],
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=run.local,
        **placing,
    )
    try:
        if rank == 0:
            _describe(tracker, job, data, run)
            if resumed is None and not data.is_remote:
                pictures.of_dataset(tracker, data, config, module.detector, run.local)
        with machines.watched(job, run, tracker, rank=rank, local_rank=local_rank):
            prepare(trainer).fit(module, datamodule=data, ckpt_path=resumed, weights_only=True)
        if trainer.interrupted:
            raise KeyboardInterrupt
        metrics = _numbers(trainer)
        if "val/map" not in metrics:  # the steps ended before the first epoch did
            trainer.validate(module, datamodule=data, verbose=False)
            metrics |= _numbers(trainer)
        if rank == 0:
            folder = run.local / "model"
            scores = save_model(best if best.is_file() else last, folder)
            run.send(folder)
            tracker.log_model(folder, without_many_classes(scores), step=trainer.global_step)
            metrics["perf/latency_ms"] = latency_ms(module)
            tracker.log_metrics({"perf/latency_ms": metrics["perf/latency_ms"]}, trainer.global_step)
            tracker.set_tags({NOTE_TAG: _note(job, data, metrics)})
            pictures.of_validation(tracker, best_found, data, job, run.local, threshold=PREDICT_THRESHOLD)
            if data.is_remote:  # by now its shards have come
                pictures.of_dataset(tracker, data, config, module.detector, run.local)
        return {"metrics": metrics, "checkpoint": str(last), "best": str(best)}
    finally:
        tracker.close()


def _agreed_checkpoint(run: RunFolder, rank: int, say: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint as rank 0 finds it, on this rank's machine; None where there is none.

    Without a process group yet, each rank looks for itself: nobody writes now.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return run.fetch_checkpoint(say if rank == 0 else lambda _: None)
    found = run.fetch_checkpoint(say) if rank == 0 else None
    # Of its own: NCCL would need each rank's GPU before Lightning has chosen it. Rank 0 may have gigabytes to read.
    group = torch.distributed.new_group(backend="gloo", timeout=AGREE)
    assert isinstance(group, torch.distributed.ProcessGroup)
    told = [None if found is None else found.name]
    torch.distributed.broadcast_object_list(told, src=0, group=group)
    torch.distributed.destroy_process_group(group)
    if told[0] is None or rank == 0:
        return found
    path = run.fetch(f"checkpoints/{told[0]}")
    if path is None:
        raise InputError(
            f"{run.shown()}/checkpoints/{told[0]} is not seen on {socket.gethostname()}: "
            f"set storage=... to a folder that all machines see, or to an address such as s3://BUCKET/runs"
        )
    return path


def _module(job: Job, data: DetectionData, *, resumed: bool) -> DetectionModule:
    config, classes = job["config"], list(data.manifest.classes)
    blank = config["detector"] | {"weights": None}
    detector = build(blank if resumed else config["detector"])  # a checkpoint has weights of its own
    _check_sizes(detector, data.input_sizes)
    card = {
        "version": __version__,
        "run_id": job["run_id"],
        "detector": blank,
        "data": config["data"],
        "overrides": config["overrides"],
        "classes": classes,
        "threshold": PREDICT_THRESHOLD,
    }
    return DetectionModule(
        detector=detector,
        optimizer=build(config["optimizer"]),
        schedule=build(config["schedule"]),
        metric=MeanAP(classes=classes),
        interval=map_interval,
        seed=config["seed"],
        card=card,
        max_skipped=data.max_skipped,
    )


def _check_sizes(detector: Any, sizes: InputSizes) -> None:
    """Raises InputError where training would draw a size that the network cannot take."""
    for side in sizes.sides if sizes.every else ():
        try:
            detector.check_size(side, side)
        except InputError as error:
            raise InputError(
                f"data.input_sizes draws {side}x{side}, which {type(detector).__name__} with "
                f"detector.input_size={detector.input_size} does not take: set data.input_sizes.every=0, "
                f"or its min, max and step to what it takes"
            ) from error


def _tracker(job: Job, run: RunFolder, resumed: Path | None, *, say: Callable[[str], None]) -> Tracker:
    if job["tracking_uri"] is None:
        return NoTracker()
    from onestage.tracking.mlflow_tracker import MlflowTracker
    from onestage.tracking.spool import SPOOL_FOLDER

    step = None if resumed is None else step_of(resumed)
    return MlflowTracker(
        uri=job["tracking_uri"],
        run_id=job["run_id"],
        folder=run.local / SPOOL_FOLDER,
        resume_from_step=step,
        every_s=job["config"]["tracking"]["every_seconds"],
        say=say,
    )


def _numbers(trainer: pl.Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def _describe(tracker: Tracker, job: Job, data: DetectionData, run: RunFolder) -> None:
    """The record of what is trained on what, by what."""
    config = job["config"]
    tracker.log_params({key: value for key, value in config.items() if key not in ("overrides", "resume", "on_oom")})
    tracker.log_dict(config, "config.json")
    run.local.mkdir(parents=True, exist_ok=True)
    data.manifest.save(run.local)  # the dataset itself may lie on a server
    tracker.log_artifact(run.local / FILE_NAME, "dataset")
    name, digest = data.manifest.name, data.manifest.content_hash
    for split, context in (("train", "training"), ("val", "validation")):
        profile = {"images": data.manifest.split(split).num_samples, "classes": list(data.manifest.classes)}
        root = str(config["data"]["root"])
        tracker.log_dataset(root, profile, name=f"{name}/{split}", digest=digest, context=context)
    tracker.set_tags({"dataset.hash": digest, "dataset.name": name, NOTE_TAG: _note(job, data)})
    tracker.log_text(packages(), "origin/packages.txt")
    if changes := job.get("changes"):
        tracker.log_text(changes, CHANGES)


def _note(job: Job, data: DetectionData, metrics: Mapping[str, float] = {}) -> str:
    """The run in a few lines of Markdown, as the dashboard shows them above all else."""
    manifest = data.manifest
    detector = job["config"]["detector"]["_target_"].rpartition(".")[2]
    train, val = manifest.split("train").num_samples, manifest.split("val").num_samples
    lines = [f"**{detector}** on **{manifest.name}**: {train:,} images, {len(manifest.classes)} classes"]
    if "best/map" in metrics:
        sure = (
            f" ({metrics['best/map_low']:.3f} to {metrics['best/map_high']:.3f})" if "best/map_low" in metrics else ""
        )
        lines.append(f"Best validation: mAP {metrics['best/map']:.3f}{sure} on {val:,} images")
    run = job["run_id"]
    lines.append(f"```\nonestage evaluate {run} split=test\nonestage train resume={run}\n```")
    return "\n\n".join(lines)


def _callbacks(
    config: Mapping[str, Any],
    data: DetectionData,
    folder: Path,
    tracker: Tracker,
    progress: Callable[[dict[str, Any]], None],
) -> list[Callback]:
    settings = config["trainer"]
    callbacks: list[Callback] = [
        Throughput(),
        Progress(progress),
        Skips(folder / "skipped.txt", sink=progress),
        Pictures(
            data.examples("val", settings["num_pictures"]), classes=data.manifest.classes, sink=tracker.log_picture
        ),
        ClassTable(classes=data.manifest.classes, sink=lambda rows: tracker.log_table(rows, "ap_per_class.json")),
        BatchPictures(classes=data.manifest.classes, sink=tracker.log_picture, num_images=settings["num_pictures"]),
    ]
    if settings["ema_decay"] > 0:
        callbacks.append(Ema(decay=settings["ema_decay"]))
    return callbacks


def latency_ms(module: DetectionModule, *, rounds: int = 20, limit_s: float = 3.0) -> float:
    """The median time of one image through the network and its detections, where it was trained."""
    detector: Any = module.detector.eval()
    device = module.device
    height, width = detector.input_size
    image = torch.rand(1, 3, height, width, device=device).contiguous(memory_format=torch.channels_last)
    times: list[float] = []
    start = time.perf_counter()
    with torch.inference_mode():
        while len(times) < rounds + 3 and (len(times) < 2 or time.perf_counter() - start < limit_s):
            began = time.perf_counter()
            detector.detect(detector(image))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - began)
    warm = times[3:] or times[1:]
    return 1000 * statistics.median(warm)


def save_model(checkpoint: Path, folder: Path) -> dict[str, float]:
    """Writes a checkpoint's detector as safetensors and JSON, which ``onestage.inference`` reads without a pickle.

    The JSON goes wherever the model goes, and has no secrets: the dataset's address is without user and password.
    Returns what it scored when it was saved.
    """
    loaded = torch.load(checkpoint, map_location="cpu", weights_only=True)
    prefix = "detector."
    weights = {
        name.removeprefix(prefix): value.contiguous()
        for name, value in loaded["state_dict"].items()
        if name.startswith(prefix)
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors")
    card = loaded["onestage"]
    data = card["data"] | {"root": without_user(card["data"]["root"])}
    description = {
        "config": {"detector": card["detector"], "data": data},
        "overrides": [redact(without_user(one)) for one in card["overrides"]],
        "classes": card["classes"],
        "input_size": card["detector"]["input_size"],
        "threshold": card["threshold"],
    }
    (folder / "model.json").write_text(json.dumps(description, indent=1))
    scores: dict[str, float] = card["metrics"]
    return scores
