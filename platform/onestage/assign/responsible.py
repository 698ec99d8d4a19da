"""YOLOv1's assignment: a cell answers for one truth, by one of its predictions (arXiv:1506.02640, Sec. 2 and 2.2).

B images, S cells of a grid, P boxes that a cell predicts, N truths of all images; boxes in pixels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from onestage.assign.match import NEGATIVE
from onestage.boxes.formats import to_cxcywh
from onestage.boxes.iou import pairwise_iou
from onestage.types import XYXY


def first_in_cell(
    boxes: XYXY, image: Tensor, *, num_images: int, size: tuple[int, int], grid: tuple[int, int]
) -> Tensor:
    """For each cell the truth whose centre falls into it, or NEGATIVE, as (B, S) int64, row by row.

    ``boxes`` (N, 4) with the ``image`` (N,) of each; ``size`` is (H, W) of the input, ``grid`` the (rows, columns) that
    it is divided into. Of truths in one cell the first listed stays. A centre on the right or bottom border belongs to
    the last cell.

    >>> boxes = XYXY(torch.tensor([[64.0, 0, 96, 64], [70, 0, 90, 64]]))
    >>> first_in_cell(boxes, torch.tensor([0, 0]), num_images=1, size=(64, 128), grid=(1, 2)).tolist()
    [[-1, 0]]
    """
    (height, width), (rows, columns) = size, grid
    last = boxes.new_tensor([columns - 1, rows - 1])
    cell = to_cxcywh(boxes)[:, :2] * boxes.new_tensor([columns / width, rows / height])
    column, row = torch.minimum(cell.clamp(min=0), last).long().unbind(dim=1)
    place = (image * rows + row) * columns + column
    num_truths = len(boxes)
    first = place.new_full((num_images * rows * columns,), num_truths)
    first = first.scatter_reduce(0, place, torch.arange(num_truths, device=place.device), "amin")
    return first.masked_fill(first == num_truths, NEGATIVE).view(num_images, rows * columns)


class Responsible(NamedTuple):
    """Which of its P boxes answers for a cell's truth, and the IoU of each: (B, S) int64 and (B, S, P)."""

    predictor: Tensor
    iou: Tensor


def responsible(boxes: XYXY, truths: XYXY, *, size: tuple[int, int]) -> Responsible:
    """The box of highest IoU among ``boxes`` (B, S, P, 4) with the truth of their cell, ``truths`` (B, S, 4).

    Where none overlaps it, the nearest: of the least squared error of centre and size in units of the input, (H, W).
    Among equals the first.
    """
    iou = pairwise_iou(boxes, XYXY(truths[:, :, None])).squeeze(3)
    unit = truths.new_tensor([*size[::-1], *size[::-1]])
    error = ((to_cxcywh(boxes) - to_cxcywh(XYXY(truths[:, :, None]))) / unit).square().sum(dim=3)
    overlapping = iou.amax(dim=2) > 0
    return Responsible(torch.where(overlapping, iou.argmax(dim=2), error.argmin(dim=2)), iou)
