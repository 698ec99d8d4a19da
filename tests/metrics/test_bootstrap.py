"""The interval against COCO's own evaluator and against what intervals are for."""

from typing import NamedTuple

import pytest
import torch

from onestage.metrics.bootstrap import map_interval, mean_ap, point_estimate
from onestage.metrics.matching import matched
from onestage.metrics.mean_ap import MeanAP
from onestage.types import Detections, Target


class Found(NamedTuple):
    detections: Detections
    target: Target


def some(num_images: int, *, seed: int, crowds: bool = True, noise: float = 6.0) -> list[Found]:
    """Truths of three classes (an image in eight without any), each found with a shaken box, and others invented."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for image in range(num_images):
        count = 0 if image % 8 == 7 else int(torch.randint(1, 6, (), generator=generator))
        low = torch.rand(count, 2, generator=generator) * 80
        boxes = torch.cat([low, low + 8 + torch.rand(count, 2, generator=generator) * 40], dim=1)
        labels = torch.randint(0, 3, (count,), generator=generator)
        crowd = torch.rand(count, generator=generator) < 0.15 if crowds else None
        more = torch.rand(3, 2, generator=generator) * 80
        invented = torch.cat([more, more + 20], dim=1)
        shaken = boxes + (torch.rand(count, 4, generator=generator) - 0.5) * noise
        drawn = torch.cat([shaken, shaken + 1, invented])
        named = torch.cat([labels, labels, torch.randint(0, 4, (3,), generator=generator)])
        scores = torch.rand(len(drawn), generator=generator)
        order = scores.argsort(descending=True)
        found.append(
            Found(
                Detections(drawn[order], scores[order], named[order]),  # type: ignore[arg-type]
                Target(boxes, labels, image, crowd=crowd),  # type: ignore[arg-type]
            )
        )
    return found


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("crowds", [False, True])
def test_each_image_once_is_cocos_own_score(seed: int, crowds: bool) -> None:
    found = some(40, seed=seed, crowds=crowds)
    expected = MeanAP(classes=["a", "b", "c", "d"])(found)["map"]
    assert point_estimate(found) == pytest.approx(expected, abs=1e-6)


def test_an_image_that_stands_twice_counts_twice() -> None:
    found = some(12, seed=3)
    weights = torch.tensor([2, 0, 1, 3] * 3).numpy()
    repeated = [one for one, times in zip(found, weights.tolist(), strict=True) for _ in range(times)]
    assert mean_ap(list(matched(found)), weights) == pytest.approx(point_estimate(repeated), abs=1e-3)


def test_the_interval_holds_the_score_and_narrows_with_more_images() -> None:
    few, many = some(30, seed=1), some(480, seed=1)
    widths = []
    for found in (few, many):
        low, high = map_interval(found) or (1.0, 0.0)
        assert low < (point_estimate(found) or 0.0) < high
        widths.append(high - low)
    assert 2.5 < widths[0] / widths[1] < 6.5  # sixteen times the images: about a quarter of the width


def test_it_holds_the_truth_nearly_always() -> None:
    """Of 40 samples of 60 images, most intervals cover the score of 2,000: of many samples 87 % did."""
    truth = point_estimate(some(2000, seed=100)) or 0.0
    intervals = [map_interval(some(60, seed=200 + i), resamples=100) or (1.0, 0.0) for i in range(40)]
    assert sum(low <= truth <= high for low, high in intervals) >= 30


def test_the_same_seed_gives_the_same_interval() -> None:
    found = some(20, seed=2)
    assert map_interval(found, seed=4) == map_interval(found, seed=4) != map_interval(found, seed=5)


def test_without_a_truth_there_is_none() -> None:
    empty = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 0)  # type: ignore[arg-type]
    nothing = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))  # type: ignore[arg-type]
    assert map_interval([Found(nothing, empty)]) is None
    assert map_interval([]) is None


def test_found_perfectly_it_is_a_point() -> None:
    found = [Found(Detections(one.target.boxes, torch.ones(len(one.target.labels)), one.target.labels), one.target)
             for one in some(20, seed=6, crowds=False)]  # fmt: skip
    assert map_interval(found) == (pytest.approx(1.0), pytest.approx(1.0))
