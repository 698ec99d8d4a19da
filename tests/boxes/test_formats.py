import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.ops import box_convert

from onestage.boxes.formats import clip, to_cxcywh, to_xyxy
from onestage.types import CXCYWH, XYXY

BOXES = st.lists(st.tuples(*[st.integers(-1000, 1000)] * 4), max_size=5)  # whole and half pixels are exact in float32


def test_a_box_by_hand() -> None:
    assert to_cxcywh(XYXY(torch.tensor([10.0, 20, 40, 30]))).tolist() == [25, 25, 30, 10]
    assert to_xyxy(CXCYWH(torch.tensor([25.0, 25, 30, 10]))).tolist() == [10, 20, 40, 30]


@given(BOXES)
def test_both_ways_agree_with_torchvision(numbers: list[tuple[int, ...]]) -> None:
    boxes = torch.tensor(numbers, dtype=torch.float32).view(-1, 4)
    assert torch.equal(to_cxcywh(XYXY(boxes)), box_convert(boxes, "xyxy", "cxcywh"))
    assert torch.equal(to_xyxy(CXCYWH(boxes)), box_convert(boxes, "cxcywh", "xyxy"))


@given(BOXES)
def test_there_and_back_is_the_same_box(numbers: list[tuple[int, ...]]) -> None:
    boxes = torch.tensor(numbers, dtype=torch.float32).view(-1, 4)
    assert torch.equal(to_xyxy(to_cxcywh(XYXY(boxes))), boxes)


def test_leading_dimensions_are_kept() -> None:
    boxes = torch.arange(48.0).view(2, 3, 2, 4)
    assert torch.equal(to_cxcywh(XYXY(boxes))[1, 2], to_cxcywh(XYXY(boxes[1, 2])))
    assert torch.equal(to_xyxy(CXCYWH(boxes))[1, 2], to_xyxy(CXCYWH(boxes[1, 2])))


def test_clip_cuts_x_at_the_width_and_y_at_the_height() -> None:
    boxes = torch.tensor([[-5.0, -6, 50, 70], [1, 2, 3, 4], [30, 70, 35, 90], [float("-inf"), 0, float("inf"), 1]])
    cut = clip(XYXY(boxes), height=60, width=20)
    assert cut.tolist() == [[0, 0, 20, 60], [1, 2, 3, 4], [20, 60, 20, 60], [0, 0, 20, 1]]
