"""YOLO's assignment by shape: the prior that fits a truth best answers for it (arXiv:1804.02767, Sec. 2.1)."""

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
    centres: Tensor,
    sizes: Tensor,
    *,
    priors: Tensor,
    masks: Sequence[Sequence[int]],
    strides: Sequence[int],
    shapes: Sequence[tuple[int, int]],
    also_above: float = 1.0,
) -> list[Assigned]:
    """For each level, the truths whose best prior it holds, at the cell that their centre falls into.

    ``centres`` and ``sizes`` (N, 2) are all truths of the batch, ``priors`` (P, 2) those of all levels, in pixels;
    ``masks`` are the numbers of each level's priors, ``shapes`` (h, w) of each level's map. Among equally good priors
    the first wins. A centre on the right or bottom border belongs to the last cell. Every other prior whose IoU with
    the truth, by shape, is above ``also_above`` answers as well (YOLOv4, arXiv:2004.10934, Sec. 3.4).
    """
    fit = shape_iou(sizes, priors)  # (N, P)
    chosen = fit > also_above
    chosen[torch.arange(len(fit), device=fit.device), fit.argmax(dim=1)] = True
    assigned = []
    for mask, stride, (height, width) in zip(masks, strides, shapes, strict=True):
        truth, anchor = chosen[:, list(mask)].nonzero(as_tuple=True)
        cell = (centres[truth] / stride).long()
        assigned.append(
            Assigned(
                truth=truth,
                anchor=anchor,
                row=cell[:, 1].clamp(0, height - 1),
                column=cell[:, 0].clamp(0, width - 1),
            )
        )
    return assigned
