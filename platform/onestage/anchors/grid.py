"""The cells of a feature map, in the order in which a (B, A, h, w) head map is flattened."""

import torch
from torch import Tensor


def cells(height: int, width: int, *, device: torch.device | str = "cpu") -> Tensor:
    """Column and row of each cell, as (height, width, 2) floats.

    >>> cells(1, 3)[0].tolist()
    [[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]]
    """
    rows, columns = torch.meshgrid(
        torch.arange(height, device=device, dtype=torch.float32),
        torch.arange(width, device=device, dtype=torch.float32),
        indexing="ij",
    )
    return torch.stack((columns, rows), dim=-1)
