"""What SSD puts on its backbone (arXiv:1512.02325, Fig. 2). Maps go in and come out finest first."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onestage.nn.blocks import scaled


class ScaledL2Norm(nn.Module):
    """Each cell's channels at length one times a learnt scale a channel (ParseNet, arXiv:1506.04579, eq. 2)."""

    def __init__(self, channels: int, *, scale: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((channels,), scale))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale.view(-1, 1, 1) * F.normalize(x, dim=1)


class ExtraLayers(nn.Module):
    """Coarser and coarser maps: for each of ``layers`` a 1x1 convolution and one of its kernel, stride and padding.

    A layer is {reduce, channels, kernel, stride, padding}: ``reduce`` are the channels after the 1x1.
    """

    def __init__(self, in_channels: int, *, layers: Sequence[Mapping[str, int]], width: float = 1.0) -> None:
        super().__init__()
        self.channels = tuple(scaled(layer["channels"], width) for layer in layers)
        self.layers = nn.ModuleList()
        for layer, inputs, outputs in zip(layers, (in_channels, *self.channels), self.channels, strict=False):
            reduced = scaled(layer["reduce"], width)
            self.layers.append(
                nn.Sequential(
                    nn.Conv2d(inputs, reduced, kernel_size=1),
                    nn.ReLU(inplace=True),
                    nn.Conv2d(reduced, outputs, layer["kernel"], layer["stride"], layer["padding"]),
                    nn.ReLU(inplace=True),
                )
            )
        start_by_xavier(self)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for layer in self.layers:
            x = layer(x)
            maps.append(x)
        return maps


class DefaultBoxHead(nn.Module):
    """A 3x3 convolution for the classes and one for the offsets of the default boxes of each level (Sec. 2.1).

    ``per_cell`` counts the default boxes of a cell on each level, ``num_classes`` the background, too.
    """

    def __init__(self, in_channels: Sequence[int], *, per_cell: Sequence[int], num_classes: int) -> None:
        super().__init__()
        levels = list(zip(in_channels, per_cell, strict=True))
        self.classes = nn.ModuleList(nn.Conv2d(c, n * num_classes, kernel_size=3, padding=1) for c, n in levels)
        self.offsets = nn.ModuleList(nn.Conv2d(c, n * 4, kernel_size=3, padding=1) for c, n in levels)
        start_by_xavier(self)

    def forward(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Logits (B, boxes a cell * num_classes, h, w) and deltas (B, boxes a cell * 4, h, w) of each level."""
        logits = [conv(x) for conv, x in zip(self.classes, maps, strict=True)]
        deltas = [conv(x) for conv, x in zip(self.offsets, maps, strict=True)]
        return logits, deltas


def start_by_xavier(module: nn.Module) -> None:
    """Sec. 3.1: what is new beside VGG16 starts with the "xavier" method, biases at zero."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
