"""Darknet backbones. Each returns its maps finest first; ``channels`` and ``strides`` say of what."""

from collections.abc import Callable
from itertools import pairwise
from typing import Final

from torch import Tensor, nn

from onestage.nn.blocks import ConvBlock, Residual, SamePool, scaled


class Darknet19(nn.Module):
    """Darknet-19 without its classifier (arXiv:1612.08242, Table 6): maps at strides 16 and 32."""

    NUM_CONVOLUTIONS: Final = (1, 1, 3, 3, 5, 5)

    def __init__(self, *, width: float = 1.0) -> None:
        super().__init__()
        channels = [scaled(32 * 2**stage, width) for stage in range(6)]
        self.channels = tuple(channels[4:])
        self.strides = (16, 32)
        self.stages = nn.ModuleList()
        inputs = 3
        for outputs, num in zip(channels, self.NUM_CONVOLUTIONS, strict=True):
            stage = nn.Sequential()
            for number in range(num):
                # 3x3 and, in between, 1x1 to half the channels
                after = outputs // 2 if number % 2 else outputs
                stage.append(ConvBlock(inputs, after, kernel=1 if number % 2 else 3))
                inputs = after
            self.stages.append(stage)
        self.pool = nn.MaxPool2d(2)

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = [self.stages[0](images)]
        for stage in self.stages[1:]:
            maps.append(stage(self.pool(maps[-1])))
        return maps[-2:]


class FiveStages(nn.Module):
    """A 3x3 stem, and five stages that each halve the size and double the channels: maps at strides 8, 16 and 32.

    ``stage(in_channels, channels, number)`` makes the stages, counted from 0.
    """

    def __init__(self, stage: Callable[[int, int, int], nn.Module], *, width: float, activation: str) -> None:
        super().__init__()
        channels = [scaled(32 * 2**number, width) for number in range(6)]
        self.channels = tuple(channels[3:])
        self.strides = (8, 16, 32)
        self.stem = ConvBlock(3, channels[0], kernel=3, activation=activation)
        self.stages = nn.ModuleList(stage(*pair, number) for number, pair in enumerate(pairwise(channels)))

    def forward(self, images: Tensor) -> list[Tensor]:
        maps, x = [], self.stem(images)
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps[2:]


class Darknet53(FiveStages):
    """Darknet-53 without its classifier (arXiv:1804.02767, Table 1)."""

    NUM_RESIDUALS: Final = (1, 2, 8, 8, 4)

    def __init__(self, *, width: float = 1.0) -> None:
        super().__init__(self._stage, width=width, activation="leaky")

    def _stage(self, in_channels: int, channels: int, number: int) -> nn.Module:
        return nn.Sequential(
            ConvBlock(in_channels, channels, kernel=3, stride=2),
            *(Residual(channels) for _ in range(self.NUM_RESIDUALS[number])),
        )


class DarknetTiny(nn.Module):
    """The seven convolutions that yolov2-tiny.cfg and yolov3-tiny.cfg begin with: maps at strides 16 and 32."""

    def __init__(self, *, width: float = 1.0) -> None:
        super().__init__()
        channels = [scaled(16 * 2**stage, width) for stage in range(7)]
        self.channels = (channels[4], channels[6])
        self.strides = (16, 32)
        blocks = [
            ConvBlock(inputs, outputs, kernel=3) for inputs, outputs in zip([3, *channels], channels, strict=False)
        ]
        self.fine = nn.Sequential()
        for block in blocks[:4]:
            self.fine.extend([block, nn.MaxPool2d(2)])
        self.fine.append(blocks[4])
        self.coarse = nn.Sequential(nn.MaxPool2d(2), blocks[5], SamePool(), blocks[6])

    def forward(self, images: Tensor) -> list[Tensor]:
        fine = self.fine(images)
        return [fine, self.coarse(fine)]
