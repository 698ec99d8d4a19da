"""Who finds whom, by hand; that the sums are COCO's own is asked in test_bootstrap.py."""

from types import ModuleType

import numpy as np
import pytest

from onestage.metrics.matching import MAX_DETECTIONS, NO_TRUTH, drawn_of, match, matched, overlap, truths_of

HALF = np.array([0.5])


def places(image: object, *, ious: np.ndarray = HALF) -> tuple[list[int], list[bool]]:
    found = match(drawn_of(image), truths_of(image), ious=ious)  # type: ignore[arg-type]
    return found.truth[0].tolist(), found.counts[0].tolist()


def test_the_surest_of_a_class_gets_the_truth_that_it_overlaps_most(scenes: ModuleType) -> None:
    truths = [([0, 0, 10, 10], 0), ([2, 0, 12, 10], 0)]
    sure, unsure = ([1.5, 0, 11.5, 10], 0, 0.9), ([0, 0, 10, 10], 0, 0.8)
    assert places(scenes.one(truths, [unsure, sure])) == ([1, 0], [True, True])


def test_a_truth_is_found_once_and_only_by_its_class(scenes: ModuleType) -> None:
    again = [([0, 0, 10, 10], 0, 0.9), ([0, 0, 10, 10], 0, 0.8), ([0, 0, 10, 10], 1, 0.7)]
    assert places(scenes.one([([0, 0, 10, 10], 0)], again)) == ([0, NO_TRUTH, NO_TRUTH], [True] * 3)


def test_what_lies_in_a_crowd_counts_neither_way(scenes: ModuleType) -> None:
    inside, beside = ([10, 10, 20, 20], 0, 0.9), ([60, 60, 80, 80], 0, 0.8)
    assert places(scenes.one([([0, 0, 50, 50], 0)], [inside, beside], crowd=[True])) == ([-1, -1], [False, True])


def test_of_one_class_the_hundred_best_count(scenes: ModuleType) -> None:
    many = [([float(x), 0.0, x + 1.0, 1.0], 0, 1 - x / 1000) for x in range(MAX_DETECTIONS + 5)]
    _, counts = places(scenes.one([([500, 0, 501, 1], 0)], many))
    assert counts == [True] * MAX_DETECTIONS + [False] * 5


def test_a_class_without_truths_is_told_as_well(scenes: ModuleType) -> None:
    images = [scenes.one([([0, 0, 9, 9], 2)], [([0, 0, 9, 9], 5, 0.5)]), scenes.one([], [([0, 0, 9, 9], 5, 0.6)])]
    by_class = list(matched(images))
    assert [(one.label, one.truths.tolist(), one.image.tolist()) for one in by_class] == [
        (2, [1, 0], []),
        (5, [0, 0], [1, 0]),
    ]


@pytest.mark.parametrize(
    ("crowd", "share"), [([False], 25 / 175), ([True], 0.25)], ids=["IoU", "the share of the detection in a crowd"]
)
def test_overlap(crowd: list[bool], share: float) -> None:
    boxes, truths = np.array([[0.0, 0, 10, 10], [3, 3, 3, 9]]), np.array([[5.0, 5, 15, 15]])
    assert overlap(boxes, truths, np.array(crowd)).tolist() == [[pytest.approx(share)], [0.0]]
