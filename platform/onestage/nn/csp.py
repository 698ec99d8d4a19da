"""Cross-stage partial backbones (arXiv:1911.11929, as in YOLOv4). Maps finest first."""

import torch
from torch import Tensor, nn

from onestage.nn.blocks import ConvBlock, Residual, scaled
from onestage.nn.darknet import Darknet53, FiveStages


class CrossStage(nn.Module):
    """Halves the size; part of the channels goes through the residuals, part past them, and a 1x1 joins the two.

    With ``whole`` both parts keep all channels, as in the first stage of CSPDarknet-53.
    """

    def __init__(self, in_channels: int, channels: int, *, num_residuals: int, whole: bool, activation: str) -> None:
        super().__init__()
        part = channels if whole else channels // 2

        def pointwise(inputs: int, outputs: int) -> ConvBlock:
            return ConvBlock(inputs, outputs, kernel=1, activation=activation)

        self.down = ConvBlock(in_channels, channels, kernel=3, stride=2, activation=activation)
        self.past = pointwise(channels, part)
        self.enter = pointwise(channels, part)
        hidden = part // 2 if whole else part
        self.residuals = nn.Sequential(
            *(Residual(part, hidden=hidden, activation=activation) for _ in range(num_residuals))
        )
        self.leave = pointwise(part, part)
        self.join = pointwise(2 * part, channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        past = self.past(x)
        through = self.leave(self.residuals(self.enter(x)))
        joined: Tensor = self.join(torch.cat((through, past), dim=1))
        return joined


class CSPDarknet53(FiveStages):
    """CSPDarknet-53 (arXiv:2004.10934, Sec. 3.1), with Mish: Darknet-53's stages, each cross-stage partial."""

    def __init__(self, *, width: float = 1.0, activation: str = "mish") -> None:
        def stage(in_channels: int, channels: int, number: int) -> nn.Module:
            return CrossStage(
                in_channels,
                channels,
                num_residuals=Darknet53.NUM_RESIDUALS[number],
                whole=number == 0,
                activation=activation,
            )

        super().__init__(stage, width=width, activation=activation)


class PartialBlock(nn.Module):
    """Two 3x3 over the second half of the channels, and all of it side by side: yolov4-tiny.cfg's CSP.

    Gives the whole, twice as wide as what came in, and the part of it that the finer head reads.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.enter = ConvBlock(channels, channels, kernel=3)
        half = channels // 2
        self.first = ConvBlock(half, half, kernel=3)
        self.second = ConvBlock(half, half, kernel=3)
        self.join = ConvBlock(2 * half, channels, kernel=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.enter(x)
        first = self.first(x.chunk(2, dim=1)[1])
        joined = self.join(torch.cat((self.second(first), first), dim=1))
        return torch.cat((x, joined), dim=1), joined


class CSPDarknetTiny(nn.Module):
    """The backbone of yolov4-tiny.cfg, with leaky ReLU: maps at strides 16 and 32."""

    def __init__(self, *, width: float = 1.0) -> None:
        super().__init__()
        first, second = scaled(32, width), scaled(64, width)
        channels = [second, 2 * second, 4 * second]  # each block gives twice what it takes
        last = 2 * channels[-1]
        self.channels = (channels[-1], last)
        self.strides = (16, 32)
        self.stem = nn.Sequential(ConvBlock(3, first, kernel=3, stride=2), ConvBlock(first, second, kernel=3, stride=2))
        self.blocks = nn.ModuleList(PartialBlock(c) for c in channels)
        self.last = ConvBlock(last, last, kernel=3)
        self.pool = nn.MaxPool2d(2)

    def forward(self, images: Tensor) -> list[Tensor]:
        x, joined = self.stem(images), images
        for block in self.blocks:
            x, joined = block(x)
            x = self.pool(x)
        return [joined, self.last(x)]
