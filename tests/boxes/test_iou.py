import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import box_iou

from onestage.boxes.iou import area, paired_iou, pairwise_iou, shape_iou
from onestage.types import XYXY


def random_boxes(num: int, *, seed: int) -> XYXY:
    corners = torch.rand(num, 2, 2, generator=torch.Generator().manual_seed(seed)) * 100
    return XYXY(corners.sort(dim=1).values.flatten(1))


def boxes_of(numbers: list[tuple[float, ...]]) -> XYXY:
    return XYXY(torch.tensor(numbers, dtype=torch.float32).view(-1, 4))


# Any corners: lines, points and swapped corners, too.
ANY_BOXES = st.lists(
    st.tuples(*[st.sampled_from([0.0, 1.0, 1e-30]) | st.floats(-1e4, 1e4, width=32)] * 4), min_size=1, max_size=6
).map(boxes_of)


def test_equals_torchvision() -> None:
    a, b = random_boxes(40, seed=0), random_boxes(30, seed=1)
    expected = box_iou(a, b)
    assert (expected > 0).sum() > 300  # most pairs overlap, so that there is something to compare
    torch.testing.assert_close(pairwise_iou(a, b), expected, rtol=1e-5, atol=1e-7)


def test_by_hand() -> None:
    box = boxes_of([(0, 0, 4, 4)])
    others = boxes_of([(0, 0, 4, 4), (2, 2, 6, 6), (4, 0, 8, 4), (9, 9, 10, 10)])
    assert pairwise_iou(box, others).tolist() == [[1, pytest.approx(4 / 28), 0, 0]]


def test_images_of_a_batch_are_compared_with_their_own() -> None:
    a, b = random_boxes(10, seed=2).view(2, 5, 4), random_boxes(6, seed=3).view(2, 3, 4)
    both = pairwise_iou(XYXY(a), XYXY(b))
    assert both.shape == (2, 5, 3)
    torch.testing.assert_close(both[1], box_iou(a[1], b[1]), rtol=1e-5, atol=1e-7)


def test_no_boxes_give_an_empty_table() -> None:
    none, some = boxes_of([]), random_boxes(3, seed=0)
    assert pairwise_iou(none, some).shape == (0, 3)
    assert pairwise_iou(some, none).shape == (3, 0)


@given(ANY_BOXES, ANY_BOXES)
def test_symmetric_and_between_zero_and_one(a: XYXY, b: XYXY) -> None:
    iou = pairwise_iou(a, b)
    assert torch.equal(iou, pairwise_iou(b, a).T)
    assert ((iou >= 0) & (iou <= 1 + 1e-6)).all()


@given(ANY_BOXES, ANY_BOXES)
def test_degenerate_boxes_give_zero_never_nan(a: XYXY, b: XYXY) -> None:
    iou = pairwise_iou(a, b)
    assert not iou.isnan().any()
    degenerate = ((a[:, 2] <= a[:, 0]) | (a[:, 3] <= a[:, 1]))[:, None] | ((b[:, 2] <= b[:, 0]) | (b[:, 3] <= b[:, 1]))
    assert (iou[degenerate] == 0).all()


@pytest.mark.parametrize("degenerate", [(3, 3, 3, 3), (0, 5, 10, 5), (10, 10, 0, 0), (10, 0, 0, 10)])
def test_a_point_a_line_and_swapped_corners_overlap_nothing(degenerate: tuple[float, ...]) -> None:
    both = pairwise_iou(boxes_of([degenerate]), boxes_of([degenerate, (0, 0, 10, 10)]))
    assert both.tolist() == [[0, 0]]


def concentric(sizes: Tensor) -> XYXY:
    return XYXY(torch.cat((-sizes / 2, sizes / 2), dim=1))


def test_shape_iou_is_the_iou_of_boxes_with_one_centre() -> None:
    a, b = torch.rand(20, 2) * 50 + 1, torch.rand(9, 2) * 50 + 1
    torch.testing.assert_close(shape_iou(a, b), box_iou(concentric(a), concentric(b)), rtol=1e-5, atol=1e-7)


def test_a_shape_without_area_fits_nothing() -> None:
    assert shape_iou(torch.zeros(1, 2), torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist() == [[0, 0]]


def test_area_by_hand() -> None:
    assert area(boxes_of([(1, 2, 4, 6), (4, 6, 1, 2), (0, 0, 0, 9)])).tolist() == [12, 0, 0]


def test_paired_iou_is_the_diagonal_of_pairwise_iou() -> None:
    a, b = random_boxes(40, seed=0), random_boxes(40, seed=1)
    assert torch.equal(paired_iou(a, b), box_iou(a, b).diagonal())
