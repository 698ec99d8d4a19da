"""Curves against COCO's evaluator and against counting."""

from types import ModuleType

import numpy as np
import pytest

from onestage.metrics.curves import THRESHOLDS, best_threshold, curves, mean_f1
from onestage.metrics.matching import matched
from onestage.metrics.mean_ap import MeanAP


def test_the_envelopes_mean_is_cocos_average_precision(scenes: ModuleType) -> None:
    found = scenes.scene(4)
    coco = MeanAP(classes=["a", "b", "c"])(found)
    by_class = list(matched(found))
    for name, at in (("map_50", 0), ("map_75", 5)):
        assert np.mean([one.envelope().mean() for one in curves(by_class, at=at)]) == pytest.approx(
            coco[name], abs=1e-6
        )
    each = [np.mean([one.envelope().mean() for one in of_class]) for of_class in
            zip(*(curves(by_class, at=at) for at in range(10)), strict=True)]  # fmt: skip
    assert each == pytest.approx([coco[f"ap/{name}"] for name in "abc"], abs=1e-6)


def test_by_hand(scenes: ModuleType) -> None:
    """Two truths; hit at 0.9, wrong at 0.8, hit at 0.6, wrong at 0.6."""
    truths = [([0, 0, 10, 10], 0), ([50, 50, 60, 60], 0)]
    drawn = [([0, 0, 10, 10], 0, 0.9), ([20, 0, 30, 10], 0, 0.8), ([50, 50, 60, 60], 0, 0.6), ([80, 0, 90, 9], 0, 0.6)]
    (curve,) = curves(list(matched([scenes.one(truths, drawn)])))
    assert curve.precision.tolist() == pytest.approx([1, 1 / 2, 2 / 3, 1 / 2])
    assert curve.recall.tolist() == [0.5, 0.5, 1.0, 1.0]
    # Of the two at 0.6 both are kept or none: 2 * 2 / (2 * 2 + 2 wrong) = 2/3, as with 0.9 alone: 2 / (2 + 1 missed).
    best = curve.best()
    assert (best.f1, best.precision, best.recall) == pytest.approx((2 / 3, 1.0, 0.5))
    assert best.threshold == pytest.approx(0.9)
    assert curve.f1(np.array([0.95, 0.85, 0.7, 0.5])).tolist() == pytest.approx([0, 2 / 3, 1 / 2, 2 / 3])


def test_the_best_threshold_for_all_classes_is_the_best_of_every_thousandth(scenes: ModuleType) -> None:
    found = scenes.scene(5)
    own = curves(list(matched(found)))
    threshold, highest = best_threshold(own)

    def counted(at: float) -> float:
        scores = []
        for one in own:
            kept = int((one.scores >= at).sum())
            hits = round(one.recall[kept - 1] * one.truths) if kept else 0
            scores.append(2 * hits / (kept + one.truths))
        return float(np.mean(scores))

    tried = [counted(at) for at in THRESHOLDS]
    assert highest == pytest.approx(max(tried)) == pytest.approx(counted(threshold))
    assert mean_f1(own).tolist() == pytest.approx(tried)


def test_a_class_that_is_never_found_has_a_curve_of_zeros(scenes: ModuleType) -> None:
    (curve,) = curves(list(matched([scenes.one([([0, 0, 9, 9], 0)], [])])))
    assert curve.envelope().max() == 0.0 and curve.f1().max() == 0.0
    assert curve.best() == (1.0, 0.0, 0.0, 0.0)
