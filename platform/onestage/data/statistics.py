"""Numbers about a set: how many images and boxes, of which classes, how large.

I images, G boxes of all of them, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onestage.data.contents import Contents, Entry

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Count:
    """Of one split: its images, those of them ``without_boxes``, its boxes, and ``by_class`` (K,) its boxes again."""

    images: int
    without_boxes: int
    boxes: int
    by_class: Ints


@dataclass(frozen=True, slots=True)
class Statistics:
    """``sizes`` (I, 2) width and height of the images; ``boxes`` (G, 4), their ``labels`` (G,) and ``images`` (G,).

    ``images`` are the rows of the images that the boxes lie in, counted over the splits in their order.
    """

    classes: tuple[str, ...]
    splits: dict[str, Count]
    sizes: Floats
    boxes: Floats
    labels: Ints
    images: Ints

    @property
    def sides(self) -> Floats:
        """Width and height (G, 2) of the boxes, in pixels of their images."""
        return self.boxes[:, 2:] - self.boxes[:, :2]

    def letterboxed_sides(self, size: Sequence[int]) -> Floats:
        """Width and height (G, 2) of the boxes in images that are letterboxed to ``size`` [H, W]."""
        fit = np.minimum(size[1] / self.sizes[:, 0], size[0] / self.sizes[:, 1])[:, None]
        # Its sides become whole pixels, as in transforms.letterbox.
        scale = np.maximum(np.round(self.sizes * fit), 1) / self.sizes
        sides: Floats = self.sides * scale[self.images]
        return sides

    def too_small(self, size: Sequence[int], strides: Sequence[int]) -> NDArray[np.bool_]:
        """Which boxes (G,) have a side below ``smallest_side`` once their images are letterboxed to ``size`` [H, W]."""
        short: Floats = self.letterboxed_sides(size).min(axis=1)
        return short < smallest_side(strides)

    def total(self) -> Count:
        """All splits together."""
        counts = self.splits.values()
        return Count(
            images=sum(count.images for count in counts),
            without_boxes=sum(count.without_boxes for count in counts),
            boxes=sum(count.boxes for count in counts),
            by_class=sum((count.by_class for count in counts), np.zeros(len(self.classes), np.int64)),
        )

    def boxes_per_image(self) -> Ints:
        """How many boxes each image has, (I,)."""
        return np.bincount(self.images, minlength=len(self.sizes))


def smallest_side(strides: Sequence[int]) -> float:
    """Half the finest stride: a box with a shorter side fills less than half a cell of the finest map of features.

    Two such boxes side by side fall into one cell, and few of its pixels are the object's.
    """
    return min(strides) / 2


def measure(contents: Contents) -> Statistics:
    """The numbers of every image in ``contents``."""
    entries = contents.entries()
    num_boxes = [len(entry.boxes) for entry in entries]
    return Statistics(
        classes=contents.classes,
        splits={split: _count(entries, len(contents.classes)) for split, entries in contents.splits.items()},
        sizes=np.array([(entry.width, entry.height) for entry in entries], np.float64).reshape(-1, 2),
        boxes=np.array([box for entry in entries for box in entry.boxes], np.float64).reshape(-1, 4),
        labels=np.array([label for entry in entries for label in entry.labels], np.int64),
        images=np.repeat(np.arange(len(entries)), num_boxes),
    )


def _count(entries: Sequence[Entry], num_classes: int) -> Count:
    labels = np.array([label for entry in entries for label in entry.labels], np.int64)
    return Count(
        images=len(entries),
        without_boxes=sum(not entry.labels for entry in entries),
        boxes=len(labels),
        by_class=np.bincount(labels, minlength=num_classes),
    )


def as_dict(statistics: Statistics) -> dict[str, Any]:
    """Images, boxes and classes, whole and by split, as plain values."""

    def of(count: Count) -> dict[str, Any]:
        return {
            "images": count.images,
            "without_boxes": count.without_boxes,
            "boxes": count.boxes,
            "classes": dict(zip(statistics.classes, count.by_class.tolist(), strict=True)),
        }

    return {**of(statistics.total()), "splits": {split: of(count) for split, count in statistics.splits.items()}}
