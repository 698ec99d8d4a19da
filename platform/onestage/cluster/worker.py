"""What every worker does: build from the plain config, fit, and on rank 0 keep the record."""

import json
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from safetensors.torch import save_file

from onestage import __version__
from onestage.cluster.job import Job
from onestage.config import build
from onestage.data.datamodule import DetectionData
from onestage.data.input_sizes import InputSizes
from onestage.data.manifest import FILE_NAME
from onestage.errors import InputError
from onestage.metrics.mean_ap import MeanAP
from onestage.tracking.tracker import NoTracker, Tracker
from onestage.training.callbacks import BatchPicture, Ema, MidEpochCheckpoint, Pictures, Progress, Throughput
from onestage.training.logger import SinkLogger
from onestage.training.module import DetectionModule
from onestage.training.skips import Skips

PREDICT_THRESHOLD = 0.25  # the score from which a detection is worth a person's look


EXPECTED_WARNINGS = (
    ".*does not have many workers.*",  # data.num_workers says how many
    ".*isinstance.treespec, LeafSpec.*",  # Lightning's own use of torch
    ".*could not find the monitored key.*",  # between validations
)


def train(
    job: Job,
    *,
    rank: int,
    trainer_options: Mapping[str, Any],
    progress: Callable[[dict[str, Any]], None],
    prepare: Callable[[pl.Trainer], pl.Trainer] = lambda trainer: trainer,
) -> dict[str, Any]:
    """Fits, from the last checkpoint in the run's folder where there is one.

    ``trainer_options`` place the trainer (accelerator, devices, strategy, plugins);
    ``prepare`` has the last word on it.

    Returns plain data: the last metrics, and the paths of the last and the best checkpoint. Every rank gets the same.
    """
    for expected in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=expected)
    config, checkpoints = job["config"], Path(job["folder"]) / "checkpoints"
    last, best = checkpoints / "last.ckpt", checkpoints / "best.ckpt"
    pl.seed_everything(config["seed"], workers=True, verbose=False)
    data: DetectionData = build(config["data"])
    module = _module(job, data, resumed=last.is_file())
    tracker = _tracker(job, last) if rank == 0 else NoTracker()
    settings = config["trainer"]
    trainer = pl.Trainer(
        logger=SinkLogger(tracker.log_metrics),
        callbacks=_callbacks(config, data, checkpoints, tracker, progress),
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
        default_root_dir=job["folder"],
        **trainer_options,
    )
    try:
        if rank == 0:
            _describe(tracker, config, data, Path(job["folder"]))
        prepare(trainer).fit(module, datamodule=data, ckpt_path=last if last.is_file() else None, weights_only=True)
        if trainer.interrupted:
            raise KeyboardInterrupt
        metrics = _numbers(trainer)
        if "val/map" not in metrics:  # the steps ended before the first epoch did
            trainer.validate(module, datamodule=data, verbose=False)
            metrics |= _numbers(trainer)
        if rank == 0:
            folder = Path(job["folder"]) / "model"
            scores = save_model(best if best.is_file() else last, folder)
            tracker.log_model(folder, scores, step=trainer.global_step)
        return {"metrics": metrics, "checkpoint": str(last), "best": str(best)}
    finally:
        tracker.close()


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


def _tracker(job: Job, last: Path) -> Tracker:
    if job["tracking_uri"] is None:
        return NoTracker()
    from onestage.tracking.mlflow_tracker import MlflowTracker

    step = torch.load(last, map_location="cpu", weights_only=True)["global_step"] if last.is_file() else None
    folder = Path(job["folder"]) / "spool"
    return MlflowTracker(uri=job["tracking_uri"], run_id=job["run_id"], folder=folder, resume_from_step=step)


def _numbers(trainer: pl.Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def _describe(tracker: Tracker, config: Mapping[str, Any], data: DetectionData, folder: Path) -> None:
    """The record of what is trained on what."""
    tracker.log_params({key: value for key, value in config.items() if key not in ("overrides", "resume")})
    tracker.log_dict(config, "config.json")
    data.manifest.save(folder)  # the dataset itself may lie on a server
    tracker.log_artifact(folder / FILE_NAME, "dataset")
    tracker.set_tags({"dataset.hash": data.manifest.content_hash, "dataset.name": data.manifest.name})


def _callbacks(
    config: Mapping[str, Any],
    data: DetectionData,
    checkpoints: Path,
    tracker: Tracker,
    progress: Callable[[dict[str, Any]], None],
) -> list[Callback]:
    settings, saving = config["trainer"], config["checkpoint"]
    callbacks: list[Callback] = [
        Throughput(),
        Progress(progress),
        Skips(checkpoints.parent / "skipped.txt", sink=progress),
        Pictures(
            data.examples("val", settings["num_pictures"]), classes=data.manifest.classes, sink=tracker.log_picture
        ),
        BatchPicture(classes=data.manifest.classes, sink=tracker.log_picture, num_images=settings["num_pictures"]),
    ]
    if settings["ema_decay"] > 0:
        callbacks.append(Ema(decay=settings["ema_decay"]))

    def saved(filename: str, kind: type[ModelCheckpoint] = ModelCheckpoint, **when: Any) -> ModelCheckpoint:
        return kind(dirpath=checkpoints, filename=filename, enable_version_counter=False, **when)

    if saving["every_steps"]:
        callbacks.append(saved("last", MidEpochCheckpoint, every_n_train_steps=saving["every_steps"]))
    if saving["every_minutes"]:
        callbacks.append(
            saved("last", MidEpochCheckpoint, train_time_interval=timedelta(minutes=saving["every_minutes"]))
        )
    callbacks.append(saved("best", monitor="val/map", mode="max"))
    callbacks.append(saved("last", every_n_epochs=1, save_on_train_epoch_end=True))
    return callbacks


def save_model(checkpoint: Path, folder: Path) -> dict[str, float]:
    """Writes a checkpoint's detector as safetensors and JSON, which ``onestage.inference`` reads without a pickle.

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
    description = {
        "config": {"detector": card["detector"], "data": card["data"]},
        "overrides": card["overrides"],
        "classes": card["classes"],
        "input_size": card["detector"]["input_size"],
        "threshold": card["threshold"],
    }
    (folder / "model.json").write_text(json.dumps(description, indent=1))
    scores: dict[str, float] = card["metrics"]
    return scores
