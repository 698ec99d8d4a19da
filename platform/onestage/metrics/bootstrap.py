"""How sure a mean average precision is: its spread over other images of the same kind, by the bootstrap."""

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from onestage.metrics.matching import IOUS, RECALLS, Matched, matched
from onestage.metrics.mean_ap import Found

RESAMPLES: Final = 200
LEVEL: Final = 0.95


def map_interval(
    found: Sequence[Found], *, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> tuple[float, float] | None:
    """The interval that holds COCO's mAP (IoU 0.5 to 0.95) with probability ``level``, drawing images anew.

    The basic bootstrap (Davison and Hinkley 1997, Sec. 2.4), of as many images as there are, with replacement: it
    takes off that few images score too well, which precision's envelope makes them do. None without a truth.
    """
    by_class = list(matched(found))
    rng = np.random.default_rng(seed)
    tail = (1 - level) / 2
    draws = (np.bincount(rng.integers(len(found), size=len(found)), minlength=len(found)) for _ in range(resamples))
    scores = [score for weights in draws if (score := mean_ap(by_class, weights)) is not None]
    if not scores:
        return None
    here = mean_ap(by_class, np.ones(len(found), dtype=np.int64))
    assert here is not None
    low, high = np.clip(2 * here - np.quantile(scores, [1 - tail, tail]), 0.0, 1.0)
    return float(low), float(high)


def point_estimate(found: Sequence[Found]) -> float | None:
    """COCO's mAP of these images, each once: what the resamples vary about."""
    return mean_ap(list(matched(found)), np.ones(len(found), dtype=np.int64))


def mean_ap(by_class: Sequence[Matched], weights: NDArray[np.int64]) -> float | None:
    """COCO's mAP where image i stands ``weights[i]`` times; None where no truth is left."""
    scores = [score for one in by_class if (score := average_precision(one, weights)) is not None]
    return float(np.mean(scores)) if scores else None


def average_precision(one: Matched, weights: NDArray[np.int64]) -> float | None:
    """Of one class, the mean over the thresholds; interpolated at 101 recalls, as COCO does."""
    truths = int((one.truths * weights).sum())
    if truths == 0:
        return None
    times = weights[one.image] * one.counts  # (T, N)
    hits = np.cumsum(times * one.hit, axis=1)
    seen = np.cumsum(times, axis=1)
    precision = hits / np.maximum(seen, 1)
    envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    total = 0.0
    for row, best in zip(hits, envelope, strict=True):
        at = np.searchsorted(row / truths, RECALLS, side="left")
        total += float(best[at[at < len(best)]].sum())
    return total / (len(RECALLS) * len(IOUS))
