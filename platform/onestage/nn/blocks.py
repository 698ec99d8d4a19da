"""Convolution blocks shared by the backbones, necks and heads."""

from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onestage.errors import InputError

DARKNET_BN_MOMENTUM: Final = 0.1  # rolling = 0.9 * old + 0.1 * new
LEAKY_SLOPE: Final = 0.1
ACTIVATIONS: Final[dict[str, Callable[[], nn.Module]]] = {
    "leaky": lambda: nn.LeakyReLU(LEAKY_SLOPE, inplace=True),
    "mish": lambda: nn.Mish(inplace=True),
}


def scaled(channels: int, width: float) -> int:
    """``channels`` times ``width``, as a multiple of 8 (vector units want it), at least 8; the paper's own at 1.0.

    >>> scaled(512, 0.25), scaled(16, 0.25), scaled(255, 1.0)
    (128, 8, 255)
    """
    return channels if width == 1.0 else max(8, round(channels * width / 8) * 8)


def made(activation: str) -> nn.Module:
    """The activation of that name; raises InputError where there is none."""
    if activation not in ACTIVATIONS:
        raise InputError(f"detector.backbone.activation must be {' or '.join(ACTIVATIONS)}, got {activation}")
    return ACTIVATIONS[activation]()


class ConvBlock(nn.Sequential):
    """Convolution without bias, batch norm, activation: Darknet's ``[convolutional]`` with ``pad=1``."""

    def __init__(
        self, in_channels: int, out_channels: int, *, kernel: int, stride: int = 1, activation: str = "leaky"
    ) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False),
            nn.BatchNorm2d(out_channels, eps=1e-5, momentum=DARKNET_BN_MOMENTUM),
            made(activation),
        )


class Residual(nn.Module):
    """1x1 to ``hidden`` channels, 3x3 back, added to the input (Darknet-53, arXiv:1804.02767, Table 1: to half)."""

    def __init__(self, channels: int, *, hidden: int | None = None, activation: str = "leaky") -> None:
        super().__init__()
        hidden = channels // 2 if hidden is None else hidden
        self.reduce = ConvBlock(channels, hidden, kernel=1, activation=activation)
        self.expand = ConvBlock(hidden, channels, kernel=3, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = x + self.expand(self.reduce(x))
        return added


class SamePool(nn.Module):
    """2x2 max pooling of stride 1 that keeps the size: padded at the right and the bottom only, as Darknet does."""

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=float("-inf")), kernel_size=2, stride=1)


class SpatialPyramid(nn.Module):
    """The map beside its max pools of several windows, the largest first: YOLO's SPP, four times the channels."""

    def __init__(self, *, windows: Sequence[int] = (13, 9, 5)) -> None:
        super().__init__()
        self.windows = tuple(windows)

    def forward(self, x: Tensor) -> Tensor:
        pools = [F.max_pool2d(x, window, stride=1, padding=window // 2) for window in self.windows]
        return torch.cat([*pools, x], dim=1)


class Reorg(nn.Module):
    """(B, C, H, W) to (B, 4C, H/2, W/2) in the order of Darknet's ``[reorg]``.

    Not a space-to-depth: Darknet reads the map's memory as (C/4, 2H, 2W), splits that by parity of row and column, and
    reads the result as (4C, H/2, W/2). Weights of YOLOv2 are tied to it.

    >>> Reorg()(torch.arange(16.0).view(1, 4, 2, 2)).flatten().tolist()
    [0.0, 2.0, 8.0, 10.0, 1.0, 3.0, 9.0, 11.0, 4.0, 6.0, 12.0, 14.0, 5.0, 7.0, 13.0, 15.0]
    """

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        split = x.reshape(batch, channels // 4, height, 2, width, 2).permute(0, 3, 5, 1, 2, 4)
        return split.reshape(batch, 4 * channels, height // 2, width // 2)
