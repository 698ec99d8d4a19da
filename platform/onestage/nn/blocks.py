"""Convolution blocks shared by the backbones, necks and heads."""

from collections.abc import Callable
from typing import Final

from torch import Tensor, nn
from torch.nn import functional as F

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


class ConvBlock(nn.Sequential):
    """Convolution without bias, batch norm, activation: Darknet's ``[convolutional]`` with ``pad=1``."""

    def __init__(
        self, in_channels: int, out_channels: int, *, kernel: int, stride: int = 1, activation: str = "leaky"
    ) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False),
            nn.BatchNorm2d(out_channels, eps=1e-5, momentum=DARKNET_BN_MOMENTUM),
            ACTIVATIONS[activation](),
        )


class Residual(nn.Module):
    """1x1 to half the channels, 3x3 back, added to the input (Darknet-53, arXiv:1804.02767, Table 1)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = ConvBlock(channels, channels // 2, kernel=1)
        self.expand = ConvBlock(channels // 2, channels, kernel=3)

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = x + self.expand(self.reduce(x))
        return added


class SamePool(nn.Module):
    """2x2 max pooling of stride 1 that keeps the size: padded at the right and the bottom only, as Darknet does."""

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=float("-inf")), kernel_size=2, stride=1)
