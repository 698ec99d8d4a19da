"""Scenes of handwritten digits, drawn from a seed: a dataset whose truth is known, for a first training in minutes.

The digits are scikit-learn's 1,797 (8x8 pixels, UCI ML "Optical Recognition of Handwritten Digits"). Train, val and
test draw from disjoint digits, so that a score on val or test is honest.
"""

import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from onestage.data.formats.record import Box, Record, Source
from onestage.data.manifest import Manifest
from onestage.data.pack import Progress, pack

CLASSES: Final = tuple("0123456789")
DIGIT_SHARES: Final = {"train": 0.7, "val": 0.15, "test": 0.15}
"""The part of the handwritten digits that each split draws from."""
MAX_DIGITS: Final = 5
SIDE_PX: Final = (28.0, 72.0)
MAX_TILT_DEGREES: Final = 15.0
MIN_CONTRAST: Final = 90.0
"""Between the lightness (0 to 255) of ink and background: less can't be read at a glance."""
MAX_OVERLAP: Final = 0.05
"""Share of a new digit's box that may lie under digits drawn before."""
JPEG_QUALITY: Final = 92
LIGHTNESS: Final = np.array([0.299, 0.587, 0.114])

Canvas = NDArray[np.float32]
"""Colours (H, W, 3) RGB or ink (h, w), 0 to 255 or 0 to 1."""


def draw(
    out: Path | str,
    *,
    seed: int,
    num_train: int,
    num_val: int,
    num_test: int,
    size: int = 192,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Draw square scenes of ``size`` pixels into the dataset folder ``out``; equal seeds give equal content."""
    counts = {"train": num_train, "val": num_val, "test": num_test}
    digits = _split_digits(seed)
    with TemporaryDirectory(prefix="onestage-scenes-") as folder:
        splits: dict[str, list[Record]] = {}
        for number, (split, count) in enumerate(counts.items()):
            images, labels = digits[split]
            splits[split] = []
            for index in range(count):
                generator = np.random.default_rng([seed, number, index])
                pixels, boxes, drawn = scene(generator, images=images, labels=labels, size=size)
                path = Path(folder, f"{split}-{index:06d}.jpg")
                cv2.imwrite(str(path), pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
                unset = [False] * len(boxes)
                splits[split].append(
                    Record(
                        path=path,
                        width=size,
                        height=size,
                        boxes=boxes,
                        labels=drawn,
                        difficult=unset,
                        crowd=unset,
                        source=path.name,
                    )
                )
        source = Source(name="digits", classes=CLASSES, splits=splits, findings=[])
        return pack(source, out, overwrite=overwrite, progress=progress)


def scene(
    generator: np.random.Generator, *, images: Canvas, labels: NDArray[np.int64], size: int
) -> tuple[NDArray[np.uint8], list[Box], list[int]]:
    """One scene (size, size, 3) RGB of 1 to ``MAX_DIGITS`` of the digits ``images`` (N, 8, 8), 0 to 1.

    Boxes lie tight around the ink; digits for which there is no room are left out.
    """
    canvas = _background(generator, size)
    boxes: list[Box] = []
    drawn: list[int] = []
    for _ in range(generator.integers(1, MAX_DIGITS + 1)):
        digit = int(generator.integers(len(images)))
        ink = _ink(generator, images[digit], side=min(generator.uniform(*SIDE_PX), size / 2))
        height, width = ink.shape
        place = _free_place(generator, boxes, height=height, width=width, size=size)
        if place is None:
            continue
        left, top = place
        under = canvas[top : top + height, left : left + width]
        colour = _ink_colour(generator, under)
        under += ink[..., None] * (colour - under)
        boxes.append((float(left), float(top), float(left + width), float(top + height)))
        drawn.append(int(labels[digit]))
    canvas += np.float32(generator.uniform(0, 6)) * generator.standard_normal(canvas.shape, dtype=np.float32)
    return np.clip(canvas, 0, 255).astype(np.uint8), boxes, drawn


def _split_digits(seed: int) -> dict[str, tuple[Canvas, NDArray[np.int64]]]:
    """The handwritten digits (N, 8, 8), 0 to 1, and their labels (N,) of each split, none in two splits."""
    from sklearn.datasets import load_digits  # takes seconds

    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.images))
    ends = np.cumsum([round(share * len(order)) for share in DIGIT_SHARES.values()])[:-1]
    parts = zip(DIGIT_SHARES, np.split(order, ends), strict=True)
    return {split: (digits.images[part].astype(np.float32) / 16, digits.target[part]) for split, part in parts}


def _background(generator: np.random.Generator, size: int) -> Canvas:
    """A gradient between two colours of like lightness, with soft noise, stripes or nothing on it."""
    start = generator.uniform(20, 235, 3).astype(np.float32)
    end = np.clip(start + generator.uniform(-50, 50, 3).astype(np.float32), 0, 255)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    angle = generator.uniform(0, 2 * math.pi)
    ramp = x * math.cos(angle) + y * math.sin(angle)
    ramp = (ramp - ramp.min()) / np.ptp(ramp)
    texture = generator.integers(3)
    if texture == 1:
        cells = int(generator.integers(4, 24))
        spots = generator.standard_normal((cells, cells), dtype=np.float32) / 2
        ramp = ramp + cv2.resize(spots, (size, size), interpolation=cv2.INTER_CUBIC)
    elif texture == 2:
        waves = generator.uniform(4, 20) * (x * math.sin(angle) - y * math.cos(angle))
        ramp = ramp + 0.4 * np.sin(2 * math.pi * waves)
    return cast(Canvas, start + np.clip(ramp, 0, 1)[..., None] * (end - start))


def _ink(generator: np.random.Generator, digit: Canvas, *, side: float) -> Canvas:
    """A digit (8, 8) about ``side`` pixels high and a little tilted: ink (h, w) from 0 to 1, cut out tightly."""
    scale = side / len(digit)
    tilt = math.radians(generator.uniform(-MAX_TILT_DEGREES, MAX_TILT_DEGREES))
    extent = math.ceil(side * 1.4)
    turn = scale * np.array([[math.cos(tilt), -math.sin(tilt)], [math.sin(tilt), math.cos(tilt)]])
    matrix = np.column_stack([turn, np.full(2, extent / 2) - turn @ np.full(2, (len(digit) - 1) / 2)])
    soft = cv2.warpAffine(digit, matrix, (extent, extent), flags=cv2.INTER_CUBIC)
    # Enlarged eightfold a stroke is a blur: steepen it to an edge.
    ink = np.clip((soft - 0.3) / 0.25, 0, 1)
    rows, columns = np.flatnonzero(ink.max(axis=1) > 0.5), np.flatnonzero(ink.max(axis=0) > 0.5)
    return cast(Canvas, ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.float32))


def _ink_colour(generator: np.random.Generator, under: Canvas) -> Canvas:
    """Any colour that stands out from what lies ``under`` (h, w, 3) the digit."""
    lightness = under.reshape(-1, 3).mean(axis=0) @ LIGHTNESS
    while True:
        colour = generator.uniform(0, 255, 3)
        if abs(colour @ LIGHTNESS - lightness) >= MIN_CONTRAST:
            return cast(Canvas, colour.astype(np.float32))


def _free_place(
    generator: np.random.Generator, boxes: list[Box], *, height: int, width: int, size: int
) -> tuple[int, int] | None:
    """Left and top of a place that is (nearly) free, None after a few tries."""
    for _ in range(20):
        left = int(generator.integers(0, size - width + 1))
        top = int(generator.integers(0, size - height + 1))
        covered = sum(
            max(0.0, min(left + width, box[2]) - max(left, box[0]))
            * max(0.0, min(top + height, box[3]) - max(top, box[1]))
            for box in boxes
        )
        if covered <= MAX_OVERLAP * width * height:
            return left, top
    return None
