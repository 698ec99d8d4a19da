"""The necks and the head of YOLOv2 to YOLOv4. Maps go in and come out finest first."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from onestage.errors import InputError
from onestage.nn.blocks import ConvBlock, Reorg, SpatialPyramid, scaled


def conv_set(in_channels: int, channels: int, *, spp: bool = False) -> nn.Sequential:
    """Five convolutions, 1x1 to ``channels`` and 3x3 to twice that in turn: YOLOv3's convolutional set (Sec. 2.3).

    ``spp`` puts a spatial pyramid, and a 1x1 that reduces it, behind the third.
    """
    layers: list[nn.Module] = [
        ConvBlock(in_channels, channels, kernel=1),
        ConvBlock(channels, 2 * channels, kernel=3),
        ConvBlock(2 * channels, channels, kernel=1),
        ConvBlock(channels, 2 * channels, kernel=3),
        ConvBlock(2 * channels, channels, kernel=1),
    ]
    if spp:
        layers[3:3] = [SpatialPyramid(), ConvBlock(4 * channels, channels, kernel=1)]
    return nn.Sequential(*layers)


class LastMap(nn.Module):
    """The coarsest map as it is."""

    def __init__(self, in_channels: Sequence[int]) -> None:
        super().__init__()
        self.channels = tuple(in_channels[-1:])

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return list(maps[-1:])

    def darknet_layers(self, heads: Sequence[Sequence[nn.Module]]) -> list[nn.Module]:
        return [*heads[0]]


class Passthrough(nn.Module):
    """Two 3x3 on the coarsest map, and before them the next finer one, reduced and reorganised to its size.

    YOLOv2, arXiv:1612.08242, Sec. 2, "Fine-Grained Features". ``reduced`` channels of the finer map become four times
    as many.
    """

    def __init__(self, in_channels: Sequence[int], *, channels: int, reduced: int, width: float = 1.0) -> None:
        super().__init__()
        if len(in_channels) < 2:
            raise InputError("detector.neck: Passthrough needs a backbone with two maps or more")
        finer, coarse = in_channels[-2:]
        deep, thin = scaled(channels, width), scaled(reduced, width)
        self.deepen = nn.Sequential(ConvBlock(coarse, deep, kernel=3), ConvBlock(deep, deep, kernel=3))
        self.reduce = ConvBlock(finer, thin, kernel=1)
        self.reorg = Reorg()
        self.channels = (4 * thin + deep,)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        finer = self.reorg(self.reduce(maps[-2]))
        return [torch.cat((finer, self.deepen(maps[-1])), dim=1)]

    def darknet_layers(self, heads: Sequence[Sequence[nn.Module]]) -> list[nn.Module]:
        return [self.deepen, self.reduce, *heads[0]]


class TopDown(nn.Module):
    """Coarse to fine: each coarser level, reduced by a 1x1 and doubled in size, is put before the finer map.

    ``channels`` are the levels' widths at 1.0, finest first. With ``conv_sets`` every level ends in a convolutional set
    (YOLOv3, ``spp``: the coarsest with a spatial pyramid); without, the coarsest ends in one 1x1 and the finer ones in
    the bare concatenation (yolov3-tiny, yolov4-tiny).
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        *,
        channels: Sequence[int],
        width: float = 1.0,
        conv_sets: bool = True,
        spp: bool = False,
    ) -> None:
        super().__init__()
        _check_levels("neck.channels", channels, in_channels)
        outputs = [scaled(c, width) for c in channels]
        levels = len(outputs)
        self.fuse = nn.ModuleList()
        self.lateral = nn.ModuleList()
        self.channels: tuple[int, ...] = ()
        above = 0
        for level in reversed(range(levels)):
            entering = in_channels[level] + above
            if conv_sets:
                self.fuse.append(conv_set(entering, outputs[level], spp=spp and above == 0))
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

    def darknet_layers(self, heads: Sequence[Sequence[nn.Module]]) -> list[nn.Module]:
        layers: list[nn.Module] = []
        for number, head in enumerate(reversed(heads)):
            layers += [self.fuse[number], *head, *self.lateral[number : number + 1]]
        return layers


class PathAggregation(nn.Module):
    """Coarse to fine and back to coarse, joined by concatenation, a spatial pyramid at the coarsest: YOLOv4's neck.

    arXiv:2004.10934, Sec. 3.3, Fig. 6 (b). ``channels`` are the levels' widths at 1.0, finest first.
    """

    def __init__(self, in_channels: Sequence[int], *, channels: Sequence[int], width: float = 1.0) -> None:
        super().__init__()
        _check_levels("neck.channels", channels, in_channels)
        outputs = [scaled(c, width) for c in channels]
        pairs = list(pairwise(outputs))  # finer, coarser
        self.channels = tuple(outputs)
        self.pyramid = conv_set(in_channels[-1], outputs[-1], spp=True)
        self.reduce = nn.ModuleList(ConvBlock(coarse, fine, kernel=1) for fine, coarse in reversed(pairs))
        self.lateral = nn.ModuleList(
            ConvBlock(c, n, kernel=1) for c, n in zip(in_channels[-2::-1], outputs[-2::-1], strict=True)
        )
        self.down_sets = nn.ModuleList(conv_set(2 * fine, fine) for fine, _ in reversed(pairs))
        self.stride = nn.ModuleList(ConvBlock(fine, coarse, kernel=3, stride=2) for fine, coarse in pairs)
        self.up_sets = nn.ModuleList(conv_set(2 * coarse, coarse) for _, coarse in pairs)
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        levels = [self.pyramid(maps[-1])]
        for reduce, lateral, fuse, finer in zip(self.reduce, self.lateral, self.down_sets, maps[-2::-1], strict=True):
            coarser = self.upsample(reduce(levels[0]))
            levels.insert(0, fuse(torch.cat((lateral(finer), coarser), dim=1)))
        for level, (stride, fuse) in enumerate(zip(self.stride, self.up_sets, strict=True), start=1):
            levels[level] = fuse(torch.cat((stride(levels[level - 1]), levels[level]), dim=1))
        return levels

    def darknet_layers(self, heads: Sequence[Sequence[nn.Module]]) -> list[nn.Module]:
        layers: list[nn.Module] = [self.pyramid]
        for step in zip(self.reduce, self.lateral, self.down_sets, strict=True):
            layers += step
        layers += heads[0]
        for stride, fuse, head in zip(self.stride, self.up_sets, heads[1:], strict=True):
            layers += [stride, fuse, *head]
        return layers


class LevelHeads(nn.Module):
    """A 3x3 to ``hidden`` channels and a 1x1 without activation on each level: ``out_channels`` raw values a cell."""

    def __init__(
        self, in_channels: Sequence[int], *, out_channels: Sequence[int], hidden: Sequence[int], width: float = 1.0
    ) -> None:
        super().__init__()
        _check_levels("head.hidden", hidden, in_channels)
        widths = [scaled(h, width) for h in hidden]
        self.hidden = nn.ModuleList(ConvBlock(c, h, kernel=3) for c, h in zip(in_channels, widths, strict=True))
        self.out = nn.ModuleList(nn.Conv2d(h, n, kernel_size=1) for h, n in zip(widths, out_channels, strict=True))

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        return [out(hidden(x)) for hidden, out, x in zip(self.hidden, self.out, levels, strict=True)]

    def darknet_layers(self) -> list[tuple[nn.Module, nn.Module]]:
        """Both convolutions of each level, finest first: the neck says where they stand in the cfg."""
        return list(zip(self.hidden, self.out, strict=True))


def _check_levels(key: str, given: Sequence[int], in_channels: Sequence[int]) -> None:
    if len(given) != len(in_channels):
        raise InputError(f"detector.{key} names {len(given)} levels, what comes before has {len(in_channels)}")
