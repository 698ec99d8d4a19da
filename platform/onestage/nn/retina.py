"""RetinaNet's head (arXiv:1708.02002, Sec. 4): two towers, the same on every level."""

import math
from collections.abc import Sequence
from typing import Final

from torch import Tensor, nn

NUM_CONVS: Final = 4
CHANNELS_PER_GROUP: Final = 8  # 32 groups of 256 channels (arXiv:1803.08494), at other widths fewer


class RetinaHead(nn.Module):
    """``num_anchors * num_classes`` class logits and ``4 * num_anchors`` box deltas a cell, for each level.

    With ``group_norm`` each of a tower's four convolutions is followed by group normalisation. Every class is born with
    probability ``class_prior``.
    """

    def __init__(
        self, channels: int, *, num_anchors: int, num_classes: int, class_prior: float = 0.01, group_norm: bool = False
    ) -> None:
        super().__init__()
        self.class_tower = _tower(channels, group_norm=group_norm)
        self.class_out = nn.Conv2d(channels, num_anchors * num_classes, 3, padding=1)
        self.box_tower = _tower(channels, group_norm=group_norm)
        self.box_out = nn.Conv2d(channels, num_anchors * 4, 3, padding=1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.01)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        # Sec. 3.3: so that the mass of background does not swamp step one.
        nn.init.constant_(self.class_out.bias, -math.log((1 - class_prior) / class_prior))  # type: ignore[arg-type]

    def forward(self, levels: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits = [self.class_out(self.class_tower(x)) for x in levels]
        return logits, [self.box_out(self.box_tower(x)) for x in levels]

    def torchvision_layers(self) -> dict[str, nn.Module]:
        """By their names in the state dict of torchvision's ``RetinaNetHead``."""
        layers: dict[str, nn.Module] = {}
        for name, tower in (("classification_head", self.class_tower), ("regression_head", self.box_tower)):
            for number, block in enumerate(tower):
                layers |= {f"{name}.conv.{number}.{part}": layer for part, layer in block.named_children()}
        return layers | {"classification_head.cls_logits": self.class_out, "regression_head.bbox_reg": self.box_out}


def _tower(channels: int, *, group_norm: bool) -> nn.Sequential:
    tower = nn.Sequential()
    for _ in range(NUM_CONVS):
        block = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=not group_norm))
        if group_norm:
            block.append(nn.GroupNorm(channels // CHANNELS_PER_GROUP, channels))
        tower.append(block.append(nn.ReLU(inplace=True)))
    return tower
