"""An input of 128x192 (H, W): a grid of 2x3 cells of 64 pixels."""

import pytest
import torch

from onestage.assign.responsible import first_in_cell, responsible
from onestage.types import XYXY

SIZE, GRID = (128, 192), (2, 3)


def cells_of(*boxes: tuple[float, float, float, float], image: list[int] | None = None, num_images: int = 1) -> list:
    values = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    whose = torch.tensor(image or [0] * len(boxes), dtype=torch.int64)
    return first_in_cell(XYXY(values), whose, num_images=num_images, size=SIZE, grid=GRID).tolist()


def around(x: float, y: float) -> tuple[float, float, float, float]:
    return (x - 5, y - 7, x + 5, y + 7)


def test_a_truth_belongs_to_the_cell_of_its_centre_row_by_row() -> None:
    assert cells_of(around(130, 70), around(20, 20), around(63, 127)) == [[1, -1, -1, 2, -1, 0]]


def test_of_truths_in_one_cell_the_first_listed_stays() -> None:
    assert cells_of(around(100, 20), around(70, 60), around(127, 5)) == [[-1, 0, -1, -1, -1, -1]]


@pytest.mark.parametrize("num", [500, 5000])
def test_the_first_stays_of_however_many(num: int) -> None:
    boxes = [around(10, 10)] + [around(100, 10)] * num + [around(10, 10)] * num
    assert cells_of(*boxes) == [[0, 1, -1, -1, -1, -1]]


def test_a_centre_between_two_cells_belongs_to_the_later() -> None:
    assert cells_of(around(64, 64)) == [[-1, -1, -1, -1, 0, -1]]


@pytest.mark.parametrize(("x", "y", "cell"), [(192, 128, 5), (250, 30, 2), (-9, 1e9, 3)])
def test_a_centre_on_the_border_or_outside_belongs_to_the_nearest_cell(x: float, y: float, cell: int) -> None:
    assert cells_of(around(x, y))[0].index(0) == cell


def test_images_are_kept_apart() -> None:
    found = cells_of(around(10, 10), around(10, 10), around(100, 10), image=[1, 0, 1], num_images=3)
    assert found == [[1, -1, -1, -1, -1, -1], [0, 2, -1, -1, -1, -1], [-1] * 6]


def test_no_truths_leave_every_cell_without() -> None:
    assert cells_of(num_images=2) == [[-1] * 6, [-1] * 6]


TRUTH = XYXY(torch.tensor([[[20.0, 20, 40, 40]]]))


def chosen(*boxes: tuple[float, float, float, float]) -> int:
    return int(responsible(XYXY(torch.tensor([[boxes]])), TRUTH, size=SIZE).predictor)


def test_the_box_of_highest_iou_answers() -> None:
    at = responsible(XYXY(torch.tensor([[[[30.0, 20, 50, 40], [20, 20, 40, 30]]]])), TRUTH, size=SIZE)
    assert at.iou[0, 0].tolist() == pytest.approx([200 / 600, 200 / 400])
    assert int(at.predictor) == 1


def test_any_overlap_counts_more_than_nearness() -> None:
    assert chosen((41, 20, 61, 40), (0, 0, 192, 128)) == 1


def test_where_none_overlaps_the_nearest_in_units_of_the_input_answers() -> None:
    # The first is 30 of 192 px to the right, the second 25 of 128 px below: 0.156 and 0.195.
    assert chosen((50, 20, 70, 40), (20, 45, 40, 65)) == 0
    assert chosen((50, 20, 70, 40), (20, 45, 40, 50), (20, 42, 40, 62)) == 0


def test_size_counts_for_nearness_too() -> None:
    assert chosen((30, 60, 30, 60), (20, 50, 40, 70)) == 1


def test_among_equals_the_first_answers() -> None:
    assert chosen((20, 20, 40, 40), (20, 20, 40, 40)) == 0
    assert chosen((0, 90, 20, 99), (0, 90, 20, 99)) == 0


def test_a_truth_without_area_has_an_answer_too() -> None:
    point = XYXY(torch.tensor([[[30.0, 30, 30, 30]]]))
    at = responsible(XYXY(torch.tensor([[[[90.0, 90, 99, 99], [25, 25, 35, 35]]]])), point, size=SIZE)
    assert at.iou.tolist() == [[[0, 0]]]
    assert int(at.predictor) == 1
