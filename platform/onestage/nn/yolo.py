"""YOLOv3's necks and head (arXiv:1804.02767, Sec. 2.3). Maps go in and come out finest first."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from onestage.nn.blocks import ConvBlock, scaled


def conv_set(in_channels: int, channels: int) -> nn.Sequential:
    """Five convolutions, 1x1 to ``channels`` and 3x3 to twice that in turn: the paper's convolutional set."""
    return nn.Sequential(
        ConvBlock(in_channels, channels, kernel=1),
        ConvBlock(channels, 2 * channels, kernel=3),
        ConvBlock(2 * channels, channels, kernel=1),
        ConvBlock(channels, 2 * channels, kernel=3),
        ConvBlock(2 * channels, channels, kernel=1),
    )


class TopDown(nn.Module):
    """Coarse to fine: each coarser level, reduced by a 1x1 and doubled in size, is put before the finer map.

    ``channels`` are the levels' widths at 1.0, finest first. With ``conv_sets`` every level ends in a convolutional set
    (YOLOv3); without, the coarsest ends in one 1x1 and the finer ones in the bare concatenation (yolov3-tiny).
    """

    def __init__(
        self, in_channels: Sequence[int], *, channels: Sequence[int], width: float = 1.0, conv_sets: bool = True
    ) -> None:
        super().__init__()
        if len(channels) != len(in_channels):
            raise ValueError(f"neck.channels names {len(channels)} levels, the backbone has {len(in_channels)}")
        outputs = [scaled(c, width) for c in channels]
        levels = len(outputs)
        self.fuse = nn.ModuleList()
        self.lateral = nn.ModuleList()
        self.channels: tuple[int, ...] = ()
        above = 0
        for level in reversed(range(levels)):
            entering = in_channels[level] + above
            if conv_sets:
                self.fuse.append(conv_set(entering, outputs[level]))
            elif above == 0:
                self.fuse.append(ConvBlock(entering, outputs[level], kernel=1))
            else:
                self.fuse.append(nn.Identity())
                outputs[level] = entering
            self.channels = (outputs[level], *self.channels)
            if level > 0:
                above = scaled(channels[level] // 2, width)
                self.lateral.append(ConvBlock(outputs[level], above, kernel=1))
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        fused = [self.fuse[0](maps[-1])]
        for lateral, fuse, finer in zip(self.lateral, self.fuse[1:], reversed(maps[:-1]), strict=True):
            fused.append(fuse(torch.cat((self.upsample(lateral(fused[-1])), finer), dim=1)))
        return fused[::-1]


class LevelHeads(nn.Module):
    """A 3x3 to ``hidden`` channels and a 1x1 without activation on each level: ``out_channels`` raw values a cell."""

    def __init__(
        self, in_channels: Sequence[int], *, out_channels: Sequence[int], hidden: Sequence[int], width: float = 1.0
    ) -> None:
        super().__init__()
        if len(hidden) != len(in_channels):
            raise ValueError(f"head.hidden names {len(hidden)} levels, the neck has {len(in_channels)}")
        widths = [scaled(h, width) for h in hidden]
        self.hidden = nn.ModuleList(ConvBlock(c, h, kernel=3) for c, h in zip(in_channels, widths, strict=True))
        self.out = nn.ModuleList(nn.Conv2d(h, n, kernel_size=1) for h, n in zip(widths, out_channels, strict=True))

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        return [out(hidden(x)) for hidden, out, x in zip(self.hidden, self.out, levels, strict=True)]
