"""Targets of independent logistic classifiers."""

import torch
from torch import Tensor


def shared_targets(shape: torch.Size, where: tuple[Tensor, ...], labels: Tensor) -> tuple[Tensor, Tensor]:
    """Which predictions of ``shape`` (B, A, h, w, 5 + K) answer for a truth, and the classes of each of these.

    ``where`` are the (image, anchor, row, column) of T truths, each (T,), ``labels`` their classes (T,). Gives a mask
    (B, A, h, w) of U predictions, and targets (U, K): truths that share a prediction make it multi-label.

    >>> zero = torch.zeros(2, dtype=torch.int64)
    >>> used, target = shared_targets(torch.Size((1, 1, 1, 1, 8)), (zero,) * 4, torch.tensor([0, 2]))
    >>> target.tolist()
    [[1.0, 0.0, 1.0]]
    """
    target = torch.zeros((*shape[:-1], shape[-1] - 5), device=labels.device)
    target[(*where, labels)] = 1
    used = torch.zeros(shape[:-1], dtype=torch.bool, device=labels.device)
    used[where] = True
    return used, target[used]
