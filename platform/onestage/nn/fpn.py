"""Feature Pyramid Networks (arXiv:1612.03144) with RetinaNet's two coarser levels (arXiv:1708.02002, Sec. 4)."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from onestage.nn.blocks import scaled


class FPN(nn.Module):
    """Maps C3 to C5 in, P3 to P7 out, finest first, all of one number of channels.

    ``coarse_from`` says what P6 is made of: "c5" as in RetinaNet's paper, or "p5". P6 and P7 have half the size of the
    level before, rounded up.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        *,
        channels: int = 256,
        width: float = 1.0,
        coarse_from: Literal["c5", "p5"] = "p5",
    ) -> None:
        super().__init__()
        if coarse_from not in ("c5", "p5"):
            raise ValueError(f"detector.neck.coarse_from must be c5 or p5, got {coarse_from}")
        self.coarse_from = coarse_from
        self.channels = scaled(channels, width)
        self.lateral = nn.ModuleList(nn.Conv2d(c, self.channels, 1) for c in in_channels)
        self.smooth = nn.ModuleList(nn.Conv2d(self.channels, self.channels, 3, padding=1) for _ in in_channels)
        coarse = in_channels[-1] if coarse_from == "c5" else self.channels
        self.p6 = nn.Conv2d(coarse, self.channels, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(self.channels, self.channels, 3, stride=2, padding=1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_uniform_(layer.weight, a=1)
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        merged = [lateral(x) for lateral, x in zip(self.lateral, maps, strict=True)]
        for level in reversed(range(len(merged) - 1)):
            merged[level] = merged[level] + F.interpolate(merged[level + 1], size=merged[level].shape[2:])
        levels = [smooth(x) for smooth, x in zip(self.smooth, merged, strict=True)]
        p6 = self.p6(maps[-1] if self.coarse_from == "c5" else levels[-1])
        return [*levels, p6, self.p7(F.relu(p6))]

    def torchvision_layers(self) -> dict[str, nn.Module]:
        """By their names in the state dict of torchvision's ``FeaturePyramidNetwork``."""
        layers: dict[str, nn.Module] = {"extra_blocks.p6": self.p6, "extra_blocks.p7": self.p7}
        layers |= {f"inner_blocks.{level}.0": layer for level, layer in enumerate(self.lateral)}
        return layers | {f"layer_blocks.{level}.0": layer for level, layer in enumerate(self.smooth)}
