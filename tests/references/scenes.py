"""Truths and detections to measure, of a fixed seed; boxes are rounded so that other programs read the same."""

from typing import NamedTuple

import numpy as np
import torch

from onestage.types import Detections, Target


class Found(NamedTuple):
    image_id: int
    detections: Detections
    target: Target


def one(
    truths: list[tuple[list[float], int]],
    detections: list[tuple[list[float], int, float]],
    *,
    crowd: list[bool] | None = None,
    difficult: list[bool] | None = None,
    image_id: int = 0,
) -> Found:
    """An image by hand: boxes with labels, and boxes with labels and scores, in any order."""
    detections = sorted(detections, key=lambda found: -found[2])
    return Found(
        image_id,
        Detections(
            torch.tensor([box for box, _, _ in detections]).reshape(-1, 4),  # type: ignore[arg-type]
            torch.tensor([score for _, _, score in detections]),
            torch.tensor([label for _, label, _ in detections], dtype=torch.int64),
        ),
        Target(
            torch.tensor([box for box, _ in truths]).reshape(-1, 4),  # type: ignore[arg-type]
            torch.tensor([label for _, label in truths], dtype=torch.int64),
            image_id,
            crowd=None if crowd is None else torch.tensor(crowd),
            difficult=None if difficult is None else torch.tensor(difficult),
        ),
    )


def scene(seed: int, *, num_images: int = 30, num_classes: int = 3, whole: bool = False) -> list[Found]:
    """Truths that are found shaken, under other names, twice or not at all, and boxes from nowhere; no equal scores.

    ``whole`` boxes lie on whole pixels, and some are difficult.
    """
    rng = np.random.default_rng(seed)
    images = []
    for image_id in range(num_images):
        number = int(rng.integers(0, 6))
        low = rng.uniform(0, 80, (number, 2))
        boxes = np.hstack([low, low + rng.uniform(10, 50, (number, 2))])
        labels = rng.integers(0, num_classes, number)
        drawn, named = [], []
        for box, label in zip(boxes, labels, strict=True):
            for _ in range(int(rng.integers(0, 4))):
                drawn.append(box + rng.normal(0, 5, 4))
                named.append(int(label) if rng.random() < 0.75 else int(rng.integers(0, num_classes)))
        for _ in range(int(rng.integers(0, 3))):
            corner = rng.uniform(0, 100, 2)
            drawn.append(np.concatenate([corner, corner + rng.uniform(8, 40, 2)]))
            named.append(int(rng.integers(0, num_classes)))
        scores = rng.random(len(drawn))
        round_ = np.round if whole else np.asarray
        images.append(
            one(
                [(round_(box).tolist(), int(label)) for box, label in zip(boxes, labels, strict=True)],
                [(round_(box).tolist(), label, float(s)) for box, label, s in zip(drawn, named, scores, strict=True)],
                difficult=(rng.random(number) < 0.25).tolist() if whole else None,
                image_id=image_id,
            )
        )
    return images
