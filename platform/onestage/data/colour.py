"""Colours of training images: by OpenCV's 8-bit arithmetic here, or for a whole batch on the device that trains."""

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from torch import Tensor

from onestage.data.transforms import Sample, image_of, pixels_of, recoloured, uniform


class PhotometricDistort:
    """SSD's distortion, arXiv:1512.02325 Sec. 2.2 (after Howard, arXiv:1312.5402), each part with probability ``p``.

    Brightness is shifted by up to ``brightness`` of the full scale, contrast and saturation multiplied by a factor
    between their bounds, the hue turned by up to ``hue`` of the circle. Contrast comes before the others or after them.
    """

    def __init__(
        self,
        *,
        brightness: float = 0.125,
        contrast: Sequence[float] = (0.5, 1.5),
        saturation: Sequence[float] = (0.5, 1.5),
        hue: float = 0.1,
        p: float = 0.5,
    ) -> None:
        for name, bounds in (("contrast", contrast), ("saturation", saturation)):
            if not 0 < bounds[0] <= bounds[1]:
                raise ValueError(f"need 0 < {name}[0] <= {name}[1], got {list(bounds)}")
        self.brightness = brightness
        self.contrast = tuple(contrast)
        self.saturation = tuple(saturation)
        self.hue = hue
        self.p = p

    def __call__(self, sample: Sample) -> Sample:
        brightness = self._drawn(-self.brightness, self.brightness, neutral=0.0)
        contrast = self._drawn(*self.contrast, neutral=1.0)
        saturation = self._drawn(*self.saturation, neutral=1.0)
        hue = self._drawn(-self.hue, self.hue, neutral=0.0)
        first, last = (contrast, 1.0) if uniform(0, 1) < 0.5 else (1.0, contrast)
        levels = np.clip(np.arange(256) + 255 * brightness, 0, 255)
        pixels = cv2.LUT(pixels_of(sample["image"]), _rounded(levels * first))
        if (hue, saturation) != (0.0, 1.0):
            pixels = recoloured(pixels, hue=hue, saturation=saturation, value=1.0)  # type: ignore[arg-type]
        if last != 1.0:
            pixels = cv2.LUT(pixels, _rounded(np.arange(256) * last))
        return {**sample, "image": image_of(pixels)}  # type: ignore[arg-type]

    def _drawn(self, low: float, high: float, *, neutral: float) -> float:
        return uniform(low, high) if uniform(0, 1) < self.p else neutral


def recoloured_batch(images: Tensor, factors: Tensor) -> Tensor:
    """``images`` (B, 3, H, W) RGB, uint8 or float in [0, 1], changed by the ``factors`` (B, 3) of an ``HSVJitter``.

    A factor is a turn of the hue in shares of the circle, then what saturation and value are multiplied by. The result
    is of the images' type and lies in memory as they do; it differs from the loader's by the rounding of 8-bit HSV.

    >>> red = torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1)
    >>> recoloured_batch(red, torch.tensor([[1 / 3, 1.0, 0.5]])).flatten().tolist()
    [0.0, 0.5, 0.0]
    """
    levels = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    hue, saturation, value = factors.float().to(images.device)[..., None, None].unbind(dim=1)  # (B, 1, 1)
    red, green, blue = levels.unbind(dim=1)  # (B, H, W)
    brightest = levels.amax(dim=1)
    chroma = brightest - levels.amin(dim=1)
    spread = chroma.clamp(min=torch.finfo(torch.float32).tiny)  # grey has no hue: any will do
    sector = torch.where(
        brightest == red,
        (green - blue) / spread,
        torch.where(brightest == green, 2 + (blue - red) / spread, 4 + (red - green) / spread),
    )  # of the circle's six, from red; below 0 towards magenta
    sector = sector + 6 * hue
    full = (chroma / brightest.clamp(min=torch.finfo(torch.float32).tiny) * saturation).clamp(max=1)
    brightest = (brightest * value).clamp(max=1)
    changed = torch.empty_like(images)
    for channel, start in enumerate((5, 3, 1)):
        place = (start + sector) % 6
        less = torch.minimum(place, 4 - place).clamp(0, 1)
        level = brightest * (1 - full * less)
        changed[:, channel] = (255 * level).round() if images.dtype == torch.uint8 else level
    return changed


def _rounded(levels: np.ndarray) -> np.ndarray:
    return np.clip(np.round(levels), 0, 255).astype(np.uint8)
