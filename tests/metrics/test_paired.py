"""Differences of two detectors: against COCO's own evaluator, by properties, and by how often chance fools them."""

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from onestage.metrics.mean_ap import MeanAP
from onestage.metrics.paired import Differences, differences
from onestage.types import Detections, Target


def detector(
    scenes: ModuleType, *, seed: int, noise: tuple[float, float], num_images: int = 60, truths: int = 0
) -> list[Any]:
    """Finds each of 1 to 4 truths of two classes with a box that is shaken by the ``noise`` of its class.

    Of equal ``truths`` all have the same images; ``seed`` is the detector's own.
    """
    world, own = np.random.default_rng(truths), np.random.default_rng(seed)
    found = []
    for image_id in range(num_images):
        number = int(world.integers(1, 5))
        low = world.uniform(0, 80, (number, 2))
        boxes, labels = np.hstack([low, low + world.uniform(20, 40, (number, 2))]), world.integers(0, 2, number)
        shaken = boxes + own.normal(0, 1, boxes.shape) * np.array(noise)[labels][:, None]
        found.append(
            scenes.one(
                [(box.tolist(), int(label)) for box, label in zip(boxes, labels, strict=True)],
                [
                    (box.tolist(), int(label), score)
                    for box, label, score in zip(shaken, labels, own.random(number).tolist(), strict=True)
                ],
                image_id=image_id,
            )
        )
    return found


def test_the_aps_are_cocos(scenes: ModuleType) -> None:
    a, b = detector(scenes, seed=1, noise=(2, 4)), detector(scenes, seed=2, noise=(3, 3))
    made = differences(a, b, resamples=10)
    scores = [MeanAP(classes=["x", "y"])(found) for found in (a, b)]
    assert made.mean is not None
    assert (made.mean.a, made.mean.b) == pytest.approx([one["map"] for one in scores], abs=1e-6)
    for label, name in enumerate(("x", "y")):
        one = made.classes[label]
        assert (one.a, one.b) == pytest.approx([scores[0][f"ap/{name}"], scores[1][f"ap/{name}"]], abs=1e-6)
        assert one.truths == sum(int((found.target.labels == label).sum()) for found in a)


def test_the_same_twice_differs_in_nothing(scenes: ModuleType) -> None:
    a = detector(scenes, seed=1, noise=(2, 4))
    made = differences(a, a, resamples=50)
    for one in (made.mean, *made.classes.values()):
        assert one is not None and (one.value, one.low, one.high, one.verdict) == (0.0, 0.0, 0.0, "within chance")


def test_turned_round_it_is_the_opposite(scenes: ModuleType) -> None:
    a, b = detector(scenes, seed=1, noise=(2, 4)), detector(scenes, seed=2, noise=(3, 3))
    there, back = differences(a, b, resamples=100), differences(b, a, resamples=100)
    for one, other in zip(every(there), every(back), strict=True):
        assert (one.value, one.low, one.high) == pytest.approx((-other.value, -other.high, -other.low))


def every(made: Differences) -> list[Any]:
    return [made.mean, *made.classes.values()]


def test_what_is_better_in_one_class_and_worse_in_another_is_seen(scenes: ModuleType) -> None:
    a, b = detector(scenes, seed=1, noise=(2, 6)), detector(scenes, seed=2, noise=(6, 2))
    made = differences(a, b)
    assert (made.classes[0].verdict, made.classes[1].verdict) == ("worse", "better")


def test_equal_detectors_are_seldom_told_apart(scenes: ModuleType) -> None:
    """Of 24 pairs about one (5 %) may look different in some class; more than five has a chance of one in 500."""
    fooled = 0
    for number in range(24):
        a = detector(scenes, seed=2 * number + 1, noise=(3, 3), num_images=40, truths=number)
        b = detector(scenes, seed=2 * number + 2, noise=(3, 3), num_images=40, truths=number)
        made = differences(a, b, resamples=80)
        fooled += any(one.verdict != "within chance" for one in made.classes.values())
    assert fooled <= 5


def test_a_class_in_few_images_is_not_judged(scenes: ModuleType) -> None:
    truth = ([10.0, 10, 40, 40], 0)
    rare = ([50.0, 50, 90, 90], 1)
    a = [
        scenes.one([truth, rare] if image < 4 else [truth], [(truth[0], 0, 0.9)], image_id=image) for image in range(20)
    ]
    b = [
        scenes.one([truth, rare] if image < 4 else [truth], [(truth[0], 0, 0.9), (rare[0], 1, 0.8)], image_id=image)
        for image in range(20)
    ]
    one = differences(a, b, resamples=20).classes[1]
    assert (one.value, one.low, one.high, one.verdict) == (1.0, None, None, "too few images")


def test_without_a_truth_there_is_nothing_to_compare() -> None:
    empty = torch.zeros(0, 4)
    nothing = torch.zeros(0, dtype=torch.int64)

    class Found:
        detections = Detections(empty, torch.zeros(0), nothing)  # type: ignore[arg-type]
        target = Target(empty, nothing, 0)  # type: ignore[arg-type]

    assert differences([Found()], [Found()]) == Differences(None, {})


def test_other_images_are_refused(scenes: ModuleType) -> None:
    a = detector(scenes, seed=1, noise=(2, 2))
    with pytest.raises(ValueError, match="must be the same"):
        differences(a, a[::-1])
