"""The folder of an evaluation: tables, ``detections.json``, charts, and the images in which most is wrong."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from onestage.data.images import Pixels
from onestage.data.manifest import key_of
from onestage.evaluation import charts, worst
from onestage.evaluation.report import Report, write_tables
from onestage.evaluation.stored import Stored
from onestage.evaluation.stored import write as write_detections

JPEG_QUALITY = 90


class Written(NamedTuple):
    """The ``files`` of an evaluation, and its ``pictures`` (H, W, 3) RGB by name, as an image tab shows them."""

    files: list[Path]
    pictures: dict[str, np.ndarray]


def write(
    report: Report,
    stored: Stored,
    folder: Path,
    *,
    images: Callable[[Sequence[int]], Mapping[int, Pixels]],
    num_images: int,
) -> Written:
    """Fill ``folder``; ``images`` gives those of some ids, ``num_images`` of the worst are drawn (0: no picture)."""
    files = [*write_tables(report, folder), write_detections(stored, folder)]
    pictures: dict[str, np.ndarray] = {}
    for old in folder.glob("worst_??_*.jpg"):  # of an evaluation before, which may have had others
        old.unlink()
    if num_images == 0:
        return Written(files, pictures)
    for name, figure in charts.all_of(report).items():
        files.append(folder / f"{name}.png")
        figure.savefig(files[-1], dpi=charts.DPI)
        pictures[name] = charts.picture(figure)
    at = report.worst(num_images)
    pixels = images([report.found[index].image_id for index in at])
    for rank, index in enumerate(at, start=1):
        image_id = report.found[index].image_id
        if image_id not in pixels:
            continue
        key = key_of(image_id)
        drawn = worst.picture(pixels[image_id], report.judged[index], name=f"image {key}", classes=report.classes)
        files.append(folder / f"worst_{rank:02d}_{key}.jpg")
        cv2.imwrite(str(files[-1]), cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
        pictures[f"worst_{rank:02d}"] = drawn
    return Written(files, pictures)
