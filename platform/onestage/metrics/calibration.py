"""Whether a score says how often a detection is right.

N detections of all classes and images; B bins of scores.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

from onestage.metrics.matching import Floats, Ints, Matched

NUM_BINS: Final = 10


class Calibration(NamedTuple):
    """For scores from ``edges[b]`` to ``edges[b + 1]``: how many, their mean (``score``), and how many are right.

    ``score`` and ``precision`` (B,) are NaN in an empty bin. ``error`` is the expected calibration error.
    """

    edges: Floats
    counts: Ints
    score: Floats
    precision: Floats
    error: float


def calibration(by_class: Sequence[Matched], *, at: int = 0, num_bins: int = NUM_BINS) -> Calibration:
    """Of all detections that count, right where they find a truth at the IoU threshold number ``at`` (0.5).

    Bins of one width, each with its upper edge (Guo et al. 2017, arXiv:1706.04599, eq. 2); the expected calibration
    error is the mean distance of precision and score, weighted by the bins' detections (eq. 3). 0 without a detection.
    """
    empty = np.zeros(0)
    scores = np.concatenate([empty, *(one.scores[one.counts[at]] for one in by_class)])
    hits = np.concatenate([empty, *(one.hit[at][one.counts[at]] for one in by_class)])
    edges = np.linspace(0.0, 1.0, num_bins + 1)
    bins = np.clip(np.searchsorted(edges, scores, side="left") - 1, 0, num_bins - 1)
    counts = np.bincount(bins, minlength=num_bins)
    with np.errstate(invalid="ignore"):
        score = np.bincount(bins, weights=scores, minlength=num_bins) / counts
        precision = np.bincount(bins, weights=hits, minlength=num_bins) / counts
    gaps = np.where(counts > 0, np.abs(precision - score), 0.0)
    error = float((gaps * counts).sum() / max(counts.sum(), 1))
    return Calibration(edges, counts, score, precision, error)
