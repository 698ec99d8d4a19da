"""ResNets with bottlenecks (arXiv:1512.03385), the stride in the 3x3 convolution as in torchvision."""

from typing import Final, Literal

from torch import Tensor, nn

from onestage.nn.blocks import scaled

NUM_BLOCKS: Final[dict[int, tuple[int, ...]]] = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}  # Table 1
EXPANSION: Final = 4


class Bottleneck(nn.Module):
    """1x1 to ``channels``, 3x3, 1x1 to four times that, added to the input (Sec. 4.1, Fig. 5)."""

    def __init__(self, in_channels: int, channels: int, *, stride: int, norm_eps: float) -> None:
        super().__init__()
        out_channels = EXPANSION * channels
        self.branch = nn.Sequential(
            nn.Conv2d(in_channels, channels, 1, bias=False),
            nn.BatchNorm2d(channels, eps=norm_eps),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(channels, eps=norm_eps),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels, eps=norm_eps),
        )
        self.shortcut = nn.Sequential()
        if stride > 1 or in_channels != out_channels:
            self.shortcut.append(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(out_channels, eps=norm_eps))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.relu(self.branch(x) + self.shortcut(x))
        return added

    def torchvision_layers(self) -> dict[str, nn.Module]:
        conv1, bn1, _, conv2, bn2, _, conv3, bn3 = self.branch
        layers = {"conv1": conv1, "bn1": bn1, "conv2": conv2, "bn2": bn2, "conv3": conv3, "bn3": bn3}
        return layers | {f"downsample.{name}": layer for name, layer in self.shortcut.named_children()}


class ResNet(nn.Module):
    """ResNet-50 or -101 without its classifier: the maps C3, C4 and C5 at strides 8, 16 and 32."""

    def __init__(self, *, depth: Literal[50, 101], width: float = 1.0, norm_eps: float = 1e-5) -> None:
        super().__init__()
        if depth not in NUM_BLOCKS:
            raise ValueError(f"detector.backbone.depth must be one of {sorted(NUM_BLOCKS)}, got {depth}")
        channels = [scaled(64 * 2**stage, width) for stage in range(4)]
        self.channels = tuple(EXPANSION * c for c in channels[1:])
        self.strides = (8, 16, 32)
        self.stem = nn.Sequential(
            nn.Conv2d(3, channels[0], 7, stride=2, padding=3, bias=False),
            nn.BatchNorm2d(channels[0], eps=norm_eps),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        self.stages = nn.ModuleList()
        entering = channels[0]
        for stage, num in enumerate(NUM_BLOCKS[depth]):
            blocks = nn.Sequential()
            for number in range(num):
                stride = 2 if stage > 0 and number == 0 else 1
                blocks.append(Bottleneck(entering, channels[stage], stride=stride, norm_eps=norm_eps))
                entering = EXPANSION * channels[stage]
            self.stages.append(blocks)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> list[Tensor]:
        maps, x = [], self.stem(images)
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps[1:]

    def torchvision_layers(self) -> dict[str, nn.Module]:
        """By their names in the state dict of torchvision's ``resnet50`` or ``resnet101``."""
        layers = {"conv1": self.stem[0], "bn1": self.stem[1]}
        for stage, blocks in enumerate(self.stages, start=1):
            for number, block in blocks.named_children():
                inner: dict[str, nn.Module] = block.torchvision_layers()  # type: ignore[operator]
                layers |= {f"layer{stage}.{number}.{name}": layer for name, layer in inner.items()}
        return layers
