"""A trained detector on pictures, drawn and as COCO results."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from onestage.config import compose
from onestage.data import images
from onestage.drawing import draw
from onestage.errors import InputError
from onestage.inference import Predictor


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
