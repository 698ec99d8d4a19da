from types import ModuleType

import numpy as np

from onestage.metrics.confusion import confusion

A, B, C, D = [0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10], [60, 0, 70, 10]


def test_by_hand(scenes: ModuleType) -> None:
    truths = [(A, 0), (B, 1), (C, 0)]
    found = [
        (A, 0, 0.9),  # right
        (A, 1, 0.8),  # the same thing again, under another name: A is taken
        (B, 0, 0.7),  # 1 taken for 0
        (D, 1, 0.6),  # nothing there
        (C, 0, 0.2),  # below the threshold: C is not found
    ]
    matrix = confusion([scenes.one(truths, found)], num_classes=2, threshold=0.25)
    assert matrix.tolist() == [[1, 0, 1], [1, 0, 0], [0, 2, 0]]


def test_the_surest_chooses_first_whatever_its_class(scenes: ModuleType) -> None:
    wrong_but_sure, right = (A, 1, 0.9), (A, 0, 0.8)
    matrix = confusion([scenes.one([(A, 0)], [wrong_but_sure, right])], num_classes=2, threshold=0.0)
    assert matrix.tolist() == [[0, 1, 0], [0, 0, 0], [1, 0, 0]]


def test_of_two_truths_in_one_place_each_finds_its_own(scenes: ModuleType) -> None:
    both = [(A, 0), (A, 1)]
    matrix = confusion([scenes.one(both, [(A, 1, 0.9), (A, 0, 0.8)])], num_classes=2, threshold=0.0)
    assert matrix.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 0]]


def test_a_crowd_is_no_truth_and_what_lies_in_it_no_error(scenes: ModuleType) -> None:
    image = scenes.one([([0, 0, 55, 20], 0)], [(A, 1, 0.9), (D, 1, 0.8)], crowd=[True])
    assert confusion([image], num_classes=2, threshold=0.0).tolist() == [[0, 0, 0], [0, 0, 0], [0, 1, 0]]


def test_every_truth_stands_in_its_row_and_every_detection_in_its_column(scenes: ModuleType) -> None:
    found = scenes.scene(7)
    matrix = confusion(found, num_classes=3, threshold=0.3)
    truths = np.concatenate([one.target.labels.numpy() for one in found])
    sure = np.concatenate([one.detections.labels[one.detections.scores >= 0.3].numpy() for one in found])
    assert matrix[:3].sum(axis=1).tolist() == np.bincount(truths, minlength=3).tolist()
    assert matrix[:, :3].sum(axis=0).tolist() == np.bincount(sure, minlength=3).tolist()
    assert matrix[3, 3] == 0
