"""Kinds of errors by the paper's definitions, and what they cost as its authors' tidecv 1.0.1 has it."""

from types import ModuleType

import pytest

from onestage.metrics.matching import NO_TRUTH
from onestage.metrics.tide import (
    BACKGROUND,
    BOTH,
    CLASSIFICATION,
    DUPLICATE,
    HIT,
    KINDS,
    LOCALISATION,
    UNCOUNTED,
    costs,
    counts,
    judge,
)

TRUTH = [0.0, 0, 10, 10]
OFF = [0.0, 0, 10, 4]  # IoU 0.4
FAR = [0.0, 0, 10, 0.5]  # IoU 0.05


@pytest.mark.parametrize(
    ("box", "label", "kind", "would_find"),
    [
        (TRUTH, 0, HIT, 0),
        ([0, 0, 10, 5.1], 0, HIT, 0),
        (OFF, 0, LOCALISATION, 0),
        (TRUTH, 1, CLASSIFICATION, 0),
        (OFF, 1, BOTH, NO_TRUTH),
        (FAR, 0, BACKGROUND, NO_TRUTH),
        (FAR, 1, BACKGROUND, NO_TRUTH),
        ([50, 50, 60, 60], 0, BACKGROUND, NO_TRUTH),
    ],
)
def test_each_kind_of_error(scenes: ModuleType, box: list[float], label: int, kind: int, would_find: int) -> None:
    judged = judge(scenes.one([(TRUTH, 0)], [(box, label, 0.5)]))
    assert judged.kind.tolist() == [kind]
    assert judged.truth.tolist() == [would_find]
    assert judged.unfound.tolist() == [kind != HIT]
    assert judged.missed.tolist() == [would_find == NO_TRUTH]


def test_a_second_detection_is_a_duplicate(scenes: ModuleType) -> None:
    judged = judge(scenes.one([(TRUTH, 0)], [(TRUTH, 0, 0.9), ([0, 0, 10, 9], 0, 0.8)]))
    assert judged.kind.tolist() == [HIT, DUPLICATE]


def test_a_wrong_name_on_what_was_found_does_not_find_it_again(scenes: ModuleType) -> None:
    judged = judge(scenes.one([(TRUTH, 0)], [(TRUTH, 0, 0.9), (TRUTH, 1, 0.8)]))
    assert judged.kind.tolist() == [HIT, CLASSIFICATION]
    assert judged.truth.tolist() == [0, NO_TRUTH]


def test_a_crowd_is_neither_missed_nor_an_error(scenes: ModuleType) -> None:
    judged = judge(scenes.one([([0, 0, 40, 40], 0)], [(TRUTH, 0, 0.9)], crowd=[True]))
    assert judged.kind.tolist() == [UNCOUNTED] and not judged.unfound.any() and not judged.missed.any()


def test_below_the_threshold_nothing_is_found(scenes: ModuleType) -> None:
    judged = judge(scenes.one([(TRUTH, 0)], [(TRUTH, 0, 0.3)]), threshold=0.5)
    assert judged.kind.tolist() == [] and judged.unfound.tolist() == [True]


def test_what_mending_gains_by_hand(scenes: ModuleType) -> None:
    """Two truths of one class, in two images: one found at 0.5, behind a box from nowhere; one with a box that is off.

    The AP is at 51 recalls (0 to 0.5) of 101 the precision 1/2. Without the box from nowhere it is 1 there. With the
    box put right, at 0.4: two of three are right, so 2/3 at all 101 recalls.
    """
    images = [
        scenes.one([(TRUTH, 0)], [(TRUTH, 0, 0.5), ([50, 50, 60, 60], 0, 0.9)]),
        scenes.one([(TRUTH, 0)], [(OFF, 0, 0.4)]),
    ]
    gains = costs([judge(one) for one in images])
    before = 0.5 * 51 / 101
    expected = dict.fromkeys(KINDS, 0.0) | {"background": 51 / 101 - before, "localisation": 2 / 3 - before}
    assert gains == pytest.approx(expected)


# tidecv 1.0.1's TIDE().evaluate(truths, detections, mode=TIDE.BOX) of the same scenes: get_main_errors(), in percent,
# and count_errors(), each as Cls, Loc, Both, Dupe, Bkg, Miss.
TIDECV = {
    0: (
        (1.966139715846463, 22.831150935369113, 2.36649633346806, 2.1927368668778193, 2.522555127055618,
         8.527839435527252),
        (10, 40, 8, 23, 23, 25),
    ),
    1: (
        (1.8583021743722092, 12.715431255609868, 1.2708112179724225, 2.4926967831184292, 4.837538911496832,
         12.38916427785217),
        (14, 32, 6, 27, 24, 27),
    ),
    2: (
        (3.186338946359104, 24.52045323201849, 1.8706416600945168, 0.9110915283114736, 4.685138719409565,
         6.546165481230322),
        (15, 40, 16, 19, 30, 18),
    ),
}  # fmt: skip


@pytest.mark.parametrize("seed", TIDECV)
def test_gains_and_numbers_are_tidecvs(scenes: ModuleType, seed: int) -> None:
    found = scenes.scene(seed)
    gains, numbers = TIDECV[seed]
    judged = [judge(one) for one in found]
    assert list(costs(judged).values()) == pytest.approx([gain / 100 for gain in gains], abs=1e-9)
    assert tuple(counts(judged).values()) == numbers


def test_without_images_nothing_is_lost() -> None:
    assert costs([]) == dict.fromkeys(KINDS, 0.0)
    assert counts([]) == dict.fromkeys(KINDS, 0)
