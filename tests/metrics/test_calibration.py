from types import ModuleType

import numpy as np
import pytest

from onestage.metrics.calibration import calibration
from onestage.metrics.matching import matched

A, NOWHERE = [0, 0, 10, 10], [50, 50, 60, 60]


def test_by_hand(scenes: ModuleType) -> None:
    """Four in the bin from 0.7 to 0.8, three of them right; one of 0.125, wrong."""
    scores = (0.72, 0.74, 0.76, 0.78)
    images = [scenes.one([(A, 0)], [(A if at else NOWHERE, 0, score)]) for at, score in enumerate(scores)]
    images.append(scenes.one([], [(NOWHERE, 1, 0.125)]))
    found = calibration(list(matched(images)))
    assert found.counts.tolist() == [0, 1, 0, 0, 0, 0, 0, 4, 0, 0]
    assert found.precision[7] == pytest.approx(0.75) and found.score[7] == pytest.approx(0.75)
    assert np.isnan(found.precision[0]) and np.isnan(found.score[0])
    assert found.error == pytest.approx((4 * 0 + 1 * 0.125) / 5, abs=1e-6)


def test_scores_that_are_right_as_often_as_they_say_have_no_error(scenes: ModuleType) -> None:
    rng = np.random.default_rng(0)
    images = [scenes.one([(A, 0)], [(A if rng.random() < score else NOWHERE, 0, float(score))])
              for score in rng.random(4000)]  # fmt: skip
    honest = calibration(list(matched(images)))
    boastful = calibration([one._replace(scores=one.scores**0.5) for one in matched(images)])
    assert honest.error < 0.03  # about 0.4 / sqrt(400) in each bin
    assert boastful.error == pytest.approx(2 / 3 - 1 / 2, abs=0.03)  # the mean of sqrt(x) - x


def test_what_lies_in_a_crowd_is_left_out(scenes: ModuleType) -> None:
    image = scenes.one([([0, 0, 40, 40], 0)], [(A, 0, 0.9), (NOWHERE, 0, 0.5)], crowd=[True])
    assert calibration(list(matched([image]))).counts.sum() == 1


def test_without_a_detection_there_is_no_error() -> None:
    assert calibration([]).error == 0.0
