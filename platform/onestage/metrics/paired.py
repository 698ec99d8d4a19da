"""Which of two detectors is better at what, and what of it chance may have done: both on the same images.

K classes, R resamples.
"""

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np

from onestage.metrics.bootstrap import average_precision
from onestage.metrics.matching import Floats, Ints, Matched, matched
from onestage.metrics.mean_ap import Found

RESAMPLES: Final = 500
LEVEL: Final = 0.95
FEWEST_IMAGES: Final = 5
"""With a class in fewer images than these, other images like them can't be told from these."""


class Difference(NamedTuple):
    """COCO's AP (IoU 0.5 to 0.95) of ``a`` and ``b``, and what ``low`` and ``high`` bound: the AP of b less that of a.

    They are None of a class that is in too few images.
    """

    a: float
    b: float
    truths: int
    low: float | None
    high: float | None

    @property
    def value(self) -> float:
        return self.b - self.a

    @property
    def verdict(self) -> str:
        """Of b: better, worse, the same, or that it can't be told."""
        if self.low is None or self.high is None:
            return "too few images"
        return "better" if self.low > 0 else "worse" if self.high < 0 else "within chance"


class Differences(NamedTuple):
    """Of the mAP, None without a truth, and of every class with truths, by its label."""

    mean: Difference | None
    classes: Mapping[int, Difference]


def differences(
    a: Sequence[Found], b: Sequence[Found], *, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> Differences:
    """By the bootstrap of pairs: images are drawn anew, with replacement, for both detectors at once.

    Of all classes together, chance makes one look better or worse in a share of 1 - ``level`` of such comparisons:
    their intervals are as wide as the largest deviation of any class asks for (Westfall and Young 1993, Sec. 2.3), in
    its standard errors. All are moved by the bootstrap's own estimate of bias (Davison and Hinkley 1997, Sec. 2.1).
    """
    if [one.target.image_id for one in a] != [one.target.image_id for one in b]:
        raise ValueError("the images of a and b must be the same, in the same order")
    both = [{one.label: one for one in matched(found)} for found in (a, b)]
    truths = {label: one.truths for label, one in both[0].items() if one.truths.any()}  # which both have
    if not truths:
        return Differences(None, {})
    labels = sorted(truths)
    pairs = [(both[0][label], both[1][label]) for label in labels]
    once = np.ones(len(a), dtype=np.int64)
    here = _aps(pairs, once)  # (2, K)
    rng = np.random.default_rng(seed)
    draws = (np.bincount(rng.integers(len(a), size=len(a)), minlength=len(a)) for _ in range(resamples))
    drawn = np.array([_aps(pairs, weights) for weights in draws])  # (R, 2, K)
    change, spread = here[1] - here[0], drawn[:, 1] - drawn[:, 0]
    enough = np.array([int((truths[label] > 0).sum()) >= FEWEST_IMAGES for label in labels])
    low, high = _together(change[enough], spread[:, enough], level)
    bounds = iter(zip(low.tolist(), high.tolist(), strict=True))
    rows = {}
    for place, label in enumerate(labels):
        low_high = next(bounds) if enough[place] else (None, None)
        rows[label] = Difference(float(here[0, place]), float(here[1, place]), int(truths[label].sum()), *low_high)
    means = np.nanmean(drawn[~np.isnan(drawn).all(axis=(1, 2))], axis=2)  # (R, 2)
    mean = here.mean(axis=1)
    (low_mean,), (high_mean,) = _together(mean[1:] - mean[:1], (means[:, 1] - means[:, 0])[:, None], level)
    total = sum(one.truths for one in rows.values())
    bounded = (float(low_mean), float(high_mean)) if len(a) >= FEWEST_IMAGES else (None, None)
    return Differences(Difference(float(mean[0]), float(mean[1]), total, *bounded), rows)


def _aps(pairs: Sequence[tuple[Matched, Matched]], weights: Ints) -> Floats:
    """Of both (2, K); NaN where no truth of a class is left."""
    scores = [[average_precision(one, weights) for one in pair] for pair in pairs]
    return np.array(scores, dtype=np.float64).T  # None becomes NaN


def _together(change: Floats, spread: Floats, level: float) -> tuple[Floats, Floats]:
    """Bounds (K,) of ``change`` (K,) that hold at once, from its ``spread`` (R, K) over resamples."""
    if not change.size:
        return change, change
    middle, error = np.nanmean(spread, axis=0), np.nanstd(spread, axis=0, ddof=1)
    deviation = np.abs(spread - middle) / np.where(error > 0, error, 1.0)
    width = np.quantile(np.nanmax(deviation, axis=1), level) * error
    unbiased = change - (middle - change)
    return np.clip(unbiased - width, -1, 1), np.clip(unbiased + width, -1, 1)
