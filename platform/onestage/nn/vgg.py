"""VGG16 as SSD has it (arXiv:1409.1556, Table 1, column D; arXiv:1512.02325, Sec. 3)."""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor, nn

from onestage.nn.blocks import scaled

STAGES: Final = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
"""Channels and number of 3x3 convolutions between the poolings."""
PIXEL_DEVIATION: Final = 0.25
"""Of photographs whose values are in [0, 1], roughly."""


class VGG16(nn.Module):
    """Maps of conv4_3 (stride 8) and fc7 (stride 16), from images (B, 3, H, W) in [0, 1].

    fc6 is a dilated convolution and fc7 a 1x1; pool5 keeps the size. ``image_mean`` and ``image_std`` (R, G, B) are
    what the weights expect the images to be normalised by.
    """

    def __init__(self, *, image_mean: Sequence[float], image_std: Sequence[float], width: float = 1.0) -> None:
        super().__init__()
        channels = [scaled(c, width) for c, _ in STAGES]
        fc = scaled(1024, width)
        self.channels = (channels[3], fc)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(image_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(image_std).view(3, 1, 1), persistent=False)
        stages = [
            _convolutions(inputs, outputs, num)
            for inputs, outputs, (_, num) in zip([3, *channels], channels, STAGES, strict=False)
        ]
        # Rounding up after conv3_3 makes 38 cells of 75, the paper's.
        pools = [nn.MaxPool2d(2), nn.MaxPool2d(2), nn.MaxPool2d(2, ceil_mode=True), nn.MaxPool2d(2)]
        self.to_conv4_3 = nn.Sequential(*stages[0], pools[0], *stages[1], pools[1], *stages[2], pools[2], *stages[3])
        self.to_conv5_3 = nn.Sequential(pools[3], *stages[4])
        self.to_fc7 = nn.Sequential(
            nn.MaxPool2d(3, stride=1, padding=1),
            nn.Conv2d(channels[4], fc, kernel_size=3, padding=6, dilation=6),
            nn.ReLU(inplace=True),
            nn.Conv2d(fc, fc, kernel_size=1),
            nn.ReLU(inplace=True),
        )
        self._start(image_std)

    def _start(self, image_std: Sequence[float]) -> None:
        """He's initialisation (arXiv:1502.01852): without batch norm nothing else keeps the signal's size."""
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        # It takes inputs of deviation one, and pixels up to 255 are far from that.
        first = self.to_conv4_3[0]
        first.weight.data *= torch.tensor(image_std).view(3, 1, 1) / PIXEL_DEVIATION  # type: ignore[operator]

    def forward(self, images: Tensor) -> list[Tensor]:
        conv4_3 = self.to_conv4_3((images - self.mean) / self.std)
        return [conv4_3, self.to_fc7(self.to_conv5_3(conv4_3))]

    def torchvision_layers(self) -> dict[str, nn.Module | nn.Parameter]:
        """The convolutions up to conv5_3 by their names in torchvision's ``vgg16``."""
        layers = enumerate([*self.to_conv4_3, *self.to_conv5_3])
        return {f"features.{n}": layer for n, layer in layers if isinstance(layer, nn.Conv2d)}


def _convolutions(in_channels: int, channels: int, num: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for inputs in [in_channels] + [channels] * (num - 1):
        layers += [nn.Conv2d(inputs, channels, kernel_size=3, padding=1), nn.ReLU(inplace=True)]
    return layers
