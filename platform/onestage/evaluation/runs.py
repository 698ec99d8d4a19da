"""A trained detector on a whole split of a dataset."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from onestage.config import build, compose, merged
from onestage.data.datamodule import DetectionData
from onestage.errors import InputError
from onestage.evaluation import output
from onestage.evaluation.report import measure
from onestage.evaluation.stored import Stored
from onestage.inference import Predictor
from onestage.metrics.bootstrap import map_interval
from onestage.metrics.mean_ap import MeanAP
from onestage.training.module import Found, check_skipped, in_original, without_many_classes
from onestage.types import Skipped


class Opened(NamedTuple):
    """A RUN with a dataset of its classes; ``uri`` is the store's, if there is one."""

    run: str
    config: dict[str, Any]
    uri: str | None
    predictor: Predictor
    data: DetectionData

    def held_out(self) -> str:
        """The split that a model is judged by: the test images, or the validation's where there are none."""
        return "test" if "test" in self.data.manifest.splits else "val"


def open_run(run: str, overrides: Sequence[str]) -> Opened:
    """RUN as ``overrides`` change it; the dataset is its own where they don't name ``data.root``. Raises InputError."""
    from onestage.tracking.tracker import store_uri

    config = compose("train", list(overrides))
    uri = store_uri(config)
    predictor = Predictor.open(run, storage=config["storage"], tracking_uri=uri)
    own = predictor.config["data"]["root"]  # absolute, where the run's overrides may not be
    data: DetectionData = build(compose("train", merged(predictor.overrides, [f"data.root={own}"], overrides))["data"])
    if list(data.manifest.classes) != list(predictor.classes):
        raise InputError(
            f"the model knows {', '.join(predictor.classes)}, but {data.root} has {', '.join(data.manifest.classes)}"
        )
    return Opened(run, config, uri, predictor, data)


def evaluate(
    run: str, *, split: str | None, overrides: Sequence[str], out: Path | None = None, files: bool = True
) -> dict[str, Any]:
    """COCO's and VOC's metrics of RUN on a split (None: what was held out), with tables and pictures of where it errs.

    Where RUN is one of MLflow's the numbers are also logged into it as ``<split>/…``, the files as
    ``evaluation/<split>/…``, and the pictures. ``out`` is a folder for the files, without which they lie in
    ``evaluation/<split>`` beside the run's own; ``files`` False leaves all but the numbers. ``overrides`` change how
    the run was composed: the dataset is the run's own where they don't name ``data.root``, and with
    ``trainer.num_pictures=0`` nothing is drawn.
    """
    from onestage.tracking import runs
    from onestage.tracking.evaluations import log_evaluation

    console = Console(stderr=True, highlight=False, markup=False)
    opened = open_run(run, overrides)
    config, uri, predictor, data = opened.config, opened.uri, opened.predictor, opened.data
    split = opened.held_out() if split is None else split
    found, num_skipped = detected(opened, split, console)
    with console.status(f"measuring {len(found):,} images"):
        coco = MeanAP(classes=predictor.classes)(found)
        if (interval := map_interval(found)) is not None:
            coco |= dict(zip(("map_low", "map_high"), interval, strict=True))
        report = measure(found, classes=predictor.classes, threshold=predictor.threshold, coco=coco)
    metrics = {f"{split}/{name}": value for name, value in report.metrics.items()}
    result = {
        "run_id": run,
        "status": "FINISHED",
        "split": split,
        "dataset_hash": data.manifest.content_hash,
        "num_images": len(found),
        "num_skipped": num_skipped,
        "metrics": metrics,
    }
    logged = uri is not None and _sent(uri, lambda: runs.log_summary(uri, run, without_many_classes(metrics)), console)
    if not files:
        return result
    folder = _default_folder(run, config["storage"], split) if out is None else out
    stored = Stored(run, split, data.manifest.content_hash, list(predictor.classes), predictor.threshold, found)
    with console.status(f"drawing into {folder}"):
        try:
            written = output.write(
                report,
                stored,
                folder,
                images=lambda ids: data.images(split, ids),
                num_images=config["trainer"]["num_pictures"],
            )
        except OSError as error:
            raise InputError(f"{folder} can't be written to ({error.strerror}): choose another with --out") from error
    place = f"evaluation/{split}"
    if logged and uri is not None:
        pictures = {f"{split}/{name}": one for name, one in written.pictures.items()}
        logged = _sent(uri, lambda: log_evaluation(uri, run, folder, place, pictures), console)
    paths = [str(file) for file in written.files]
    return {**result, "out": str(folder), "files": paths, "artifacts": place if logged else None}


def shown(metrics: Mapping[str, float]) -> dict[str, float]:
    """What fits on a screen: of few classes COCO's APs, too; the tables have them all."""
    return {name: value for name, value in without_many_classes(metrics).items() if "/voc" not in name}


def detected(opened: Opened, split: str, console: Console) -> tuple[list[Found], int]:
    """What is found in every image of the split that can be read, and how many can't."""
    from rich.progress import track

    predictor, data = opened.predictor, opened.data
    loader = data.dataloader(split)
    found: list[Found] = []
    skipped: list[Skipped] = []
    for batch in track(loader, description=f"evaluating {split}", console=console, transient=True):
        for one in batch.skipped:
            console.print(f"skipped {one.key}: {one.why}", style="yellow", soft_wrap=True)
        skipped += batch.skipped
        check_skipped(len(skipped), data.max_skipped, what=f"of {split}", such_as=skipped)
        if len(batch) == 0:
            continue
        detections = predictor.detect(batch.images)
        found += [in_original(one, target) for one, target in zip(detections, batch.targets, strict=True)]
    check_skipped(len(skipped), data.max_skipped if found else 0, what=f"of {split}", such_as=skipped)
    return found, len(skipped)


def _default_folder(run: str, storage: str, split: str) -> Path:
    """In the run's own folder, which a checkpoint may lie in; a checkpoint's and a registered model's have its name."""
    file = Path(run)
    if file.is_file():
        beside = file.parent.parent if file.parent.name == "checkpoints" else file.parent
        return beside / "evaluation" / file.stem / split
    here = Path("runs") if "://" in storage else Path(storage)
    if run.startswith("models:"):
        return here / "evaluation" / run.removeprefix("models:").strip("/").replace("/", "-") / split
    return here / run / "evaluation" / split


def _sent(uri: str, send: Callable[[], bool], console: Console) -> bool:
    """Whether it lies in the run as well: a store that goes away meanwhile takes nothing from what was measured."""
    from onestage.tracking.client import check
    from onestage.tracking.redaction import redact

    with console.status("sending to MLflow"):
        try:
            check(uri)
            return send()
        except Exception as error:
            console.print(f"not in MLflow: {redact(str(error).splitlines()[0])}", style="yellow", soft_wrap=True)
            return False
