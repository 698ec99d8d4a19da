"""Convolution without weight sharing."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onestage.nn.blocks import LEAKY_SLOPE


class LocallyConnected(nn.Module):
    """A convolution of stride 1 with weights of its own at each place of an (h, w) map: Darknet's ``[local]``.

    ``bias`` is (out, h, w), ``weight`` (h * w, out, in * k * k), in the order of a ``.weights`` file. The map is padded
    to keep its size; starts from He's initialisation (arXiv:1502.01852) for a leaky activation behind it.
    """

    def __init__(self, in_channels: int, out_channels: int, *, kernel: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.kernel = kernel
        self.bias = nn.Parameter(torch.zeros(out_channels, *size))
        fan_in = in_channels * kernel**2
        bound = math.sqrt(6 / (fan_in * (1 + LEAKY_SLOPE**2)))
        # Of three dimensions: channels_last would take five for a volume, and refuse them.
        self.weight = nn.Parameter(torch.empty(math.prod(size), out_channels, fan_in).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """Of a map (B, in, h, w), a map (B, out, h, w)."""
        patches = F.unfold(x, self.kernel, padding=self.kernel // 2).permute(2, 1, 0)  # (h * w, in * k * k, B)
        places = torch.bmm(self.weight, patches)  # (h * w, out, B)
        return places.permute(2, 1, 0).reshape(-1, *self.bias.shape) + self.bias
