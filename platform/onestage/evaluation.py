"""A trained detector on a split of a dataset, and on pictures."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from onestage.config import build, compose, merged
from onestage.data import images
from onestage.data.datamodule import DetectionData
from onestage.drawing import draw
from onestage.errors import InputError
from onestage.inference import Predictor
from onestage.metrics.bootstrap import map_interval
from onestage.metrics.mean_ap import MeanAP
from onestage.training.module import Found, check_skipped, in_original
from onestage.types import Skipped


def evaluate(run: str, *, split: str, overrides: Sequence[str]) -> dict[str, Any]:
    """COCO's metrics of RUN on a split, also logged into the run as ``<split>/…`` where it is one of MLflow's.

    ``overrides`` change how the run was composed; the dataset is the run's own where they don't name ``data.root``.
    """
    from rich.console import Console
    from rich.progress import track

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
    loader = data.dataloader(split)
    found: list[Found] = []
    skipped: list[Skipped] = []
    console = Console(stderr=True)
    for batch in track(loader, description=f"evaluating {split}", console=console, transient=True):
        for one in batch.skipped:
            console.print(
                f"skipped {one.key}: {one.why}", style="yellow", highlight=False, markup=False, soft_wrap=True
            )
        skipped += batch.skipped
        check_skipped(len(skipped), data.max_skipped, what=f"of {split}", such_as=skipped)
        if len(batch) == 0:
            continue
        detections = predictor.detect(batch.images)
        found += [in_original(one, target) for one, target in zip(detections, batch.targets, strict=True)]
    check_skipped(len(skipped), data.max_skipped if found else 0, what=f"of {split}", such_as=skipped)
    metrics = {f"{split}/{name}": value for name, value in MeanAP(classes=predictor.classes)(found).items()}
    if (interval := map_interval(found)) is not None:
        metrics |= dict(zip((f"{split}/map_low", f"{split}/map_high"), interval, strict=True))
    if uri is not None:
        _log(uri, run, metrics)
    return {
        "run_id": run,
        "status": "FINISHED",
        "split": split,
        "num_images": len(found),
        "num_skipped": len(skipped),
        "metrics": metrics,
    }


def predict(
    run: str, paths: Sequence[str], *, out: Path, threshold: float | None, overrides: Sequence[str]
) -> dict[str, Any]:
    """Draws what RUN finds in pictures (files or folders) into ``out``, and writes it all as COCO results there.

    The JSON holds every detection, the pictures those with a score of at least ``threshold``. COCO's ``image_id`` is
    the picture's place among ``paths``, from 0; its name stands beside it.
    """
    from rich.console import Console
    from rich.progress import track

    from onestage.tracking.tracker import store_uri

    files = list(_pictures(paths))
    config = compose("train", list(overrides))
    predictor = Predictor.open(run, storage=config["storage"], tracking_uri=store_uri(config))
    threshold = predictor.threshold if threshold is None else threshold
    out.mkdir(parents=True, exist_ok=True)
    results, num_drawn = [], 0
    for number, file in enumerate(track(files, description="predicting", console=Console(stderr=True), transient=True)):
        image = read_image(file)
        (found,) = predictor([image])
        sure = found.scores >= threshold
        num_drawn += int(sure.sum())
        picture = draw(
            image, found.boxes[sure], found.labels[sure], scores=found.scores[sure], classes=predictor.classes
        )
        cv2.imwrite(str(out / f"{file.stem}.jpg"), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
        for box, score, label in zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True):
            left, top, right, bottom = box
            results.append(
                {
                    "image_id": number,
                    "file_name": str(file),
                    "category_id": label,
                    "category": predictor.classes[label],
                    "bbox": [round(v, 2) for v in (left, top, right - left, bottom - top)],  # COCO: corner and size
                    "score": round(score, 5),
                }
            )
    (out / "predictions.json").write_text(json.dumps(results, indent=1))
    counts = {"num_images": len(files), "num_detections": len(results), "num_drawn": num_drawn}
    return {"run_id": run, **counts, "out": str(out)}


def read_image(path: Path) -> np.ndarray:
    """A picture as it is looked at, upright: an RGB array (H, W, 3) uint8. InputError for what is not one."""
    image = images.decode(path.read_bytes(), orientation=images.header(path).orientation)
    if image is None:
        raise InputError(f"{path} is corrupt or cut short: replace it")
    return image


def _pictures(paths: Sequence[str]) -> Iterator[Path]:
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(one for one in path.iterdir() if one.suffix.lower() in images.SUFFIXES)
            if not inside:
                raise InputError(f"no JPEG or PNG picture in {path}")
            yield from inside
        elif path.is_file():
            yield path
        else:
            raise InputError(f"no picture {path}")


def _log(uri: str, run: str, metrics: dict[str, float]) -> None:
    """Into the run that was evaluated, if it is one: a checkpoint file has none."""
    from onestage.tracking import runs

    runs.log_summary(uri, run, metrics)
