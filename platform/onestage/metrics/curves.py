"""Precision, recall and F1 of each class as the score threshold falls.

N detections of one class, of all images.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

from onestage.metrics.matching import RECALLS, Floats, Matched

THRESHOLDS: Final = np.linspace(0.0, 1.0, 1001)


class Point(NamedTuple):
    """What a class has where its detections with a score of at least ``threshold`` are kept."""

    threshold: float
    f1: float
    precision: float
    recall: float


class Curve(NamedTuple):
    """``precision`` and ``recall`` (N,) of a class behind each detection that counts, ``scores`` (N,) falling."""

    label: int
    truths: int
    scores: Floats
    precision: Floats
    recall: Floats

    def f1(self, thresholds: Floats = THRESHOLDS) -> Floats:
        """The harmonic mean of both at each threshold; 0 where nothing is found."""
        kept = np.searchsorted(-self.scores, -thresholds, side="right")  # how many have that score or more
        f1 = np.append(0.0, _f1(self.precision, self.recall))
        at: Floats = f1[kept]
        return at

    def envelope(self) -> Floats:
        """The best precision at each of 101 recalls or any higher one, as COCO draws the curve; its mean is the AP."""
        best = np.append(np.maximum.accumulate(self.precision[::-1])[::-1], 0.0)
        at: Floats = best[np.searchsorted(self.recall, RECALLS, side="left")]
        return at

    def best(self) -> Point:
        """Where F1 is highest; of equal ones, with the highest threshold. Nothing found is a threshold of 1."""
        if len(self.scores) == 0:
            return Point(1.0, 0.0, 0.0, 0.0)
        f1 = _f1(self.precision, self.recall)
        # Of equal scores all are kept or none is.
        f1 = np.where(np.append(self.scores[:-1] > self.scores[1:], True), f1, -1.0)
        at = int(f1.argmax())
        return Point(float(self.scores[at]), float(f1[at]), float(self.precision[at]), float(self.recall[at]))


def curve(one: Matched, *, at: int = 0) -> Curve:
    """Of one class, at the IoU threshold number ``at`` (0.5)."""
    counts = one.counts[at]
    hits = np.cumsum(one.hit[at][counts])
    truths = int(one.truths.sum())
    return Curve(
        one.label, truths, one.scores[counts], hits / np.arange(1, len(hits) + 1), hits / max(truths, 1)
    )  # fmt: skip


def curves(by_class: Sequence[Matched], *, at: int = 0) -> list[Curve]:
    """Of every class that has a truth."""
    return [curve(one, at=at) for one in by_class if one.truths.sum() > 0]


def mean_f1(curves: Sequence[Curve], *, thresholds: Floats = THRESHOLDS) -> Floats:
    """F1's mean over the classes where all of them have the same threshold."""
    mean: Floats = np.mean([one.f1(thresholds) for one in curves], axis=0)
    return mean


def best_threshold(curves: Sequence[Curve]) -> tuple[float, float]:
    """The one threshold for all classes with the highest mean F1, the highest such, and that F1."""
    f1 = mean_f1(curves)
    at = len(f1) - 1 - int(f1[::-1].argmax())
    return float(THRESHOLDS[at]), float(f1[at])


def _f1(precision: Floats, recall: Floats) -> Floats:
    both = precision + recall
    f1: Floats = np.divide(2 * precision * recall, both, out=np.zeros_like(both), where=both > 0)
    return f1
