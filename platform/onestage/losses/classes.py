"""Targets of independent logistic classifiers."""

from collections.abc import Sequence

import torch
from torch import Tensor


def shared_targets(where: Sequence[Tensor], labels: Tensor, *, num_classes: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """The predictions that answer for truths, each once, and their classes.

    ``where`` are the indices of T truths' predictions, (T,) for each dimension, ``labels`` (T,) their classes. Gives
    the indices of the U predictions among them, and targets (U, K): truths that share one make it multi-label.

    >>> rows, columns = torch.tensor([0, 3, 0]), torch.tensor([1, 1, 1])
    >>> (row, column), target = shared_targets((rows, columns), torch.tensor([0, 1, 2]), num_classes=3)
    >>> row.tolist(), target.tolist()
    ([0, 3], [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    """
    places, number = torch.stack(list(where), dim=1).unique(dim=0, return_inverse=True)
    target = torch.zeros(len(places), num_classes, device=labels.device)
    target[number, labels] = 1
    return places.unbind(dim=1), target
