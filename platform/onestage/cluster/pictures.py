"""The pictures that a training leaves beside its curves: of its data as it begins, of its errors as it ends.

They cost seconds, and none of them ever ends a training: what goes wrong here is a warning.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from onestage.cluster.job import Job
from onestage.data.datamodule import DetectionData
from onestage.tracking.tracker import NoTracker, Tracker
from onestage.training.callbacks import BestFound

if TYPE_CHECKING:
    from onestage.data.statistics import Statistics

log = logging.getLogger(__name__)

MAX_IMAGES: Final = 1000
"""Of the validation, evenly spread: enough for a picture of the errors, and 8 s of a core where each has 100 boxes."""
MAX_BOXES: Final = 100_000


def of_dataset(tracker: Tracker, data: DetectionData, config: Mapping[str, Any], detector: Any, folder: Path) -> None:
    """The labels' statistics and the detector's anchors over the boxes that it is to learn."""
    if isinstance(tracker, NoTracker) or config["trainer"]["num_pictures"] == 0:
        return
    with _only_a_warning("the pictures of the dataset"):
        from onestage.data.label_charts import labels
        from onestage.data.statistics import measure
        from onestage.evaluation.charts import picture

        sample = data.labels()
        statistics = measure(sample.contents)
        height, width = detector.input_size
        strides = tuple(getattr(detector, "strides", ()))
        title = f"{data.manifest.name}: {sample}, {len(statistics.labels):,} boxes"
        figures = {"labels": labels(statistics, title=title, input_size=(height, width), strides=strides)}
        trained = measure(replace(sample.contents, splits={"train": sample.contents.splits["train"]}))
        if (anchors := detector.anchor_sizes()) is not None and len(trained.labels):
            figures["anchors"] = _anchors(anchors, trained, size=(height, width))
        for name, figure in figures.items():
            file = folder / f"{name}.png"
            figure.savefig(file, dpi=100)
            tracker.log_artifact(file, "dataset")
            tracker.log_picture(f"dataset/{name}", picture(figure), 0)


def of_validation(
    tracker: Tracker, best: BestFound, data: DetectionData, job: Job, folder: Path, *, threshold: float
) -> None:
    """What ``onestage evaluate`` writes, of the best validation, in ``evaluation/val`` of the run; without
    ``trainer.num_pictures`` the tables alone.
    """
    config = job["config"]
    if isinstance(tracker, NoTracker) or not best.found:
        return
    with _only_a_warning("the pictures of the validation"):
        from onestage.evaluation import output
        from onestage.evaluation.report import measure
        from onestage.evaluation.stored import Stored

        classes = list(data.manifest.classes)
        found = best.found[:: -(-len(best.found) // MAX_IMAGES)]
        scores = {name.removeprefix("val/"): value for name, value in best.metrics.items() if name.startswith("val/")}
        report = measure(found, classes=classes, threshold=threshold, coco=scores, of_images=len(best.found))
        written = output.write(
            report,
            Stored(job["run_id"], "val", data.manifest.content_hash, classes, threshold, list(found)),
            folder / "evaluation" / "val",
            images=lambda ids: data.images("val", ids),
            num_images=config["trainer"]["num_pictures"],
        )
        for name, pixels in written.pictures.items():
            tracker.log_picture(f"val/{name}", pixels, best.step)
        tracker.log_artifact(folder / "evaluation" / "val", "evaluation")


def _anchors(anchors: torch.Tensor, statistics: "Statistics", *, size: tuple[int, int]) -> Any:
    from onestage.fitting import Anchors, anchor_figure

    sides = torch.from_numpy(statistics.letterboxed_sides(size))
    sides = sides[(sides > 0).all(dim=1)]
    sides = sides[:: -(-len(sides) // MAX_BOXES)]
    return anchor_figure(sides, {"the detector's": Anchors.scored(anchors.cpu().double(), sides)}, size=size)


@contextmanager
def _only_a_warning(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        log.warning("%s could not be made (the training goes on): %s: %s", what, type(error).__name__, error)
