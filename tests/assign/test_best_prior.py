"""A 64x96 input (H, W) with two levels: stride 32 (2x3 cells) before stride 16 (4x6)."""

from typing import Any

import torch

from onestage.assign.best_prior import Assigned, best_prior

STRIDES, SHAPES = (32, 16), ((2, 3), (4, 6))
PRIORS, MASKS = torch.tensor([[8.0, 8], [16, 4], [40, 40], [20, 60]]), ([2, 3], [0, 1])


def assign(*truths: tuple[float, float, float, float], **others: Any) -> list[Assigned]:
    """Truths as centre x, centre y, width, height."""
    values = torch.tensor(truths, dtype=torch.float32).view(-1, 4)
    levels = {"priors": PRIORS, "masks": MASKS, "strides": STRIDES, "shapes": SHAPES}
    return best_prior(values[:, :2], values[:, 2:], **(levels | others))


def as_tuples(at: Assigned) -> list[tuple[int, ...]]:
    """(truth, anchor, row, column)."""
    return list(zip(*(tensor.tolist() for tensor in at), strict=True))


def test_level_anchor_and_cell_by_hand() -> None:
    coarse, fine = assign(
        (70, 10, 10, 7),  # nearest in shape to 8x8; 70 / 16 = 4.4, 10 / 16 = 0.6
        (70, 40, 38, 44),  # 40x40; 70 / 32 = 2.2, 40 / 32 = 1.25
        (33, 63, 15, 5),  # 16x4; 33 / 16 = 2.1, 63 / 16 = 3.9
        (31, 31, 18, 64),  # 20x60; both below 32
    )
    assert as_tuples(coarse) == [(1, 0, 1, 2), (3, 1, 0, 0)]
    assert as_tuples(fine) == [(0, 0, 0, 4), (2, 1, 3, 2)]


def test_every_truth_belongs_to_one_level() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.rand(50, 2, generator=generator) * 64
    sizes = torch.rand(50, 2, generator=generator) * 60 + 1
    levels = assign(*torch.cat((centres, sizes), dim=1).tolist())
    assert all(len(level.truth) > 0 for level in levels)
    assert sorted(torch.cat([level.truth for level in levels]).tolist()) == list(range(50))


def test_a_centre_between_two_cells_belongs_to_the_later() -> None:
    coarse, _ = assign((32, 32, 40, 40))
    assert as_tuples(coarse) == [(0, 0, 1, 1)]


def test_a_centre_on_the_right_or_bottom_border_belongs_to_the_last_cell() -> None:
    coarse, fine = assign((96, 64, 40, 40), (96, 64, 8, 8))
    assert as_tuples(coarse) == [(0, 0, 1, 2)]
    assert as_tuples(fine) == [(1, 0, 3, 5)]


def test_a_centre_outside_belongs_to_the_nearest_cell() -> None:
    _, fine = assign((-20, 200, 8, 8))
    assert as_tuples(fine) == [(0, 0, 3, 0)]


def test_among_equally_good_priors_the_first_wins() -> None:
    coarse, fine = assign((5, 5, 8, 8), priors=torch.tensor([[8.0, 8], [8, 8], [8, 8]]), masks=([1, 2], [0]))
    assert as_tuples(coarse) == []
    assert as_tuples(fine) == [(0, 0, 0, 0)]


def test_a_prior_on_two_levels_answers_on_both_and_one_on_none_nowhere() -> None:
    """As yolov4-tiny.cfg has it: masks 3, 4, 5 and 1, 2, 3 of six."""
    coarse, fine = assign((33, 33, 40, 40), (5, 5, 8, 8), masks=([2, 3], [1, 2]))
    assert as_tuples(coarse) == [(0, 0, 1, 1)]
    assert as_tuples(fine) == [(0, 1, 2, 2)]


def test_priors_above_a_threshold_answer_as_well() -> None:
    # 30x45 = 1350: with 40x40 it shares 30x40 = 1200, an IoU of 1200 / 1750 = 0.686; with 20x60 900 / 1650 = 0.545
    truth = (33.0, 33.0, 30.0, 45.0)
    assert as_tuples(assign(truth, also_above=0.6)[0]) == [(0, 0, 1, 1)]
    assert as_tuples(assign(truth, also_above=0.5)[0]) == [(0, 0, 1, 1), (0, 1, 1, 1)]
    # 8x8 is 64 / 1350 = 0.047 of it
    assert as_tuples(assign(truth, also_above=0.04)[1]) == [(0, 0, 2, 2), (0, 1, 2, 2)]


def test_truths_may_share_a_place() -> None:
    _, fine = assign((5, 5, 8, 8), (6, 6, 9, 8))
    assert as_tuples(fine) == [(0, 0, 0, 0), (1, 0, 0, 0)]


def test_no_truths_leave_every_level_empty() -> None:
    for level in assign():
        assert as_tuples(level) == []
        assert level.truth.dtype == level.anchor.dtype == level.row.dtype == level.column.dtype == torch.int64
