import math

import pytest
import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder as Reference

from onestage.boxes.coders import BoxCoder
from onestage.types import XYXY, Deltas

SSD_WEIGHTS = (10.0, 10.0, 5.0, 5.0)


def random_boxes(*shape: int, seed: int) -> XYXY:
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(*shape, 2, generator=generator) * 200
    return XYXY(torch.cat((low, low + 2 + torch.rand(*shape, 2, generator=generator) * 100), dim=-1))


def boxes_of(*boxes: tuple[float, float, float, float]) -> XYXY:
    return XYXY(torch.tensor(boxes))


def test_by_hand() -> None:
    anchor, box = boxes_of((0, 0, 20, 10)), boxes_of((10, 0, 30, 20))
    deltas = BoxCoder(weights=SSD_WEIGHTS).encode(anchor, box)  # centres (10, 5) and (20, 10)
    assert deltas.tolist() == [[10 * 10 / 20, 10 * 5 / 10, 0, pytest.approx(5 * math.log(2))]]


def test_no_deltas_are_the_anchor_itself() -> None:
    anchors = random_boxes(9, seed=0)
    torch.testing.assert_close(BoxCoder().decode(anchors, Deltas(torch.zeros(9, 4))), anchors)
    assert BoxCoder().encode(anchors, anchors).tolist() == [[0.0] * 4] * 9


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), SSD_WEIGHTS, (1.0, 2.0, 3.0, 4.0)])
def test_decode_is_the_inverse_of_encode_for_images_of_a_batch(weights: tuple[float, ...]) -> None:
    coder, anchors, boxes = BoxCoder(weights=weights), random_boxes(50, seed=1), random_boxes(3, 50, seed=2)
    deltas = coder.encode(anchors, boxes)
    assert deltas.shape == (3, 50, 4)
    torch.testing.assert_close(coder.decode(anchors, deltas), boxes, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), SSD_WEIGHTS])
def test_equals_torchvision(weights: tuple[float, float, float, float]) -> None:
    anchors, boxes = random_boxes(200, seed=3), random_boxes(200, seed=4)
    deltas: Tensor = 3 * torch.randn(200, 4, generator=torch.Generator().manual_seed(5))
    reference, coder = Reference(weights), BoxCoder(weights=weights)
    torch.testing.assert_close(coder.encode(anchors, boxes), reference.encode_single(boxes, anchors))
    expected = reference.decode_single(deltas, anchors)
    torch.testing.assert_close(coder.decode(anchors, Deltas(deltas)), expected, rtol=1e-5, atol=1e-3)


def test_sizes_are_cut_so_that_boxes_stay_finite() -> None:
    anchor, wild = boxes_of((0, 0, 16, 16)), Deltas(torch.tensor([[0.0, 0.0, 1e4, -1e4]]))
    left, top, right, bottom = BoxCoder().decode(anchor, wild)[0].tolist()
    assert right - left == pytest.approx(1000)  # 16 px by at most 1000 / 16
    assert bottom - top == pytest.approx(0)
