"""YOLOv3's assignment: one prior for each truth, the one whose shape fits best (arXiv:1804.02767, Sec. 2.1)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from onestage.boxes.iou import shape_iou


class Assigned(NamedTuple):
    """The truths that a level answers for, T of them: where in its (B, A, h, w) predictions, and which truth."""

    truth: Tensor
    anchor: Tensor
    row: Tensor
    column: Tensor


def best_prior(
    centres: Tensor, sizes: Tensor, priors: Sequence[Tensor], strides: Sequence[int], shapes: Sequence[tuple[int, int]]
) -> list[Assigned]:
    """For each level, the truths whose best prior it holds, at the cell that their centre falls into.

    ``centres`` and ``sizes`` (N, 2) are all truths of the batch, ``priors`` one (A, 2) tensor a level, all in input
    pixels; ``shapes`` is (h, w) of each level's map. Among equally good priors the first wins, levels in the order
    given. A centre on the right or bottom border belongs to the last cell.
    """
    fit = shape_iou(sizes, torch.cat(list(priors)))  # (N, A of all levels)
    best = fit.argmax(dim=1)
    assigned, first = [], 0
    for level, stride, (height, width) in zip(priors, strides, shapes, strict=True):
        here = ((best >= first) & (best < first + len(level))).nonzero().squeeze(1)
        cell = (centres[here] / stride).long()
        assigned.append(
            Assigned(
                truth=here,
                anchor=best[here] - first,
                row=cell[:, 1].clamp(0, height - 1),
                column=cell[:, 0].clamp(0, width - 1),
            )
        )
        first += len(level)
    return assigned
