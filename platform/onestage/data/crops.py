"""Windows of an image, partly beyond its edges, stretched to the network's input: how SSD and Darknet crop.

A window is only four numbers until the end: whatever was drawn, the pixels are resized once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_iou

from onestage.data.transforms import OnCanvas, Sample, chosen, painted, uniform
from onestage.types import Placement


class RandomWindow(OnCanvas):
    """Darknet's jitter: a window whose every edge lies up to ``jitter`` of the image's side within or outside of it.

    It is stretched to ``size`` [H, W]; outside the image it is ``fill`` (0 to 1). ``painted`` says which boxes stay.
    """

    def __init__(self, *, size: Sequence[int], jitter: float, min_visible: float = 0.2, fill: float = 0.5) -> None:
        if not 0 <= jitter < 0.5:
            raise ValueError(f"need 0 <= jitter < 0.5, or opposite edges could meet, got {jitter}")
        self.size = tuple(size)
        self.jitter = jitter
        self.min_visible = min_visible
        self.fill = fill

    def __call__(self, sample: Sample) -> Sample:
        height, width = sample["image"].shape[-2:]
        shift = (2 * torch.rand(4) - 1) * self.jitter
        window = (torch.tensor([0, 0, 1, 1]) + shift) * torch.tensor([width, height, width, height])
        placement = _stretched(window, size=self.size)
        return painted(sample, placement, size=self.size, min_visible=self.min_visible, fill=self.fill)


class RandomIoUWindow(OnCanvas):
    """SSD, arXiv:1512.02325: zoomed out (Sec. 3.6), cropped (Sec. 2.2 "Data augmentation"), and stretched to ``size``.

    With ``zoom_out_probability`` the view is not the image but a canvas of ``fill`` (0 to 1), up to ``max_zoom_out``
    times as wide and high, with the image somewhere on it. Of the view, the window is all, or a patch whose IoU with
    some box is at least one of ``min_ious`` (1: all of the view): sides of ``min_scale`` and more of the view's, width
    over height of ``max_aspect`` or its inverse at most, drawn ``trials`` times. Boxes whose centre lies outside are
    dropped, the others clipped. An image without boxes is not cropped.
    """

    def __init__(
        self,
        *,
        size: Sequence[int],
        zoom_out_probability: float = 0.5,
        max_zoom_out: float = 4.0,
        min_ious: Sequence[float] = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0),
        min_scale: float = 0.3,
        max_aspect: float = 2.0,
        trials: int = 50,
        fill: float = 0.5,
    ) -> None:
        if max_zoom_out < 1 or max_aspect < 1:
            raise ValueError(f"need max_zoom_out >= 1 and max_aspect >= 1, got {max_zoom_out} and {max_aspect}")
        if not 0 < min_scale <= 1:
            raise ValueError(f"need 0 < min_scale <= 1, got {min_scale}")
        self.size = tuple(size)
        self.zoom_out_probability = zoom_out_probability
        self.max_zoom_out = max_zoom_out
        self.min_ious = tuple(min_ious)
        self.min_scale = min_scale
        self.max_aspect = max_aspect
        self.trials = trials
        self.fill = fill

    def __call__(self, sample: Sample) -> Sample:
        boxes = sample["boxes"].as_subclass(Tensor)
        window = self._window(self._view(*sample["image"].shape[-2:]), boxes)
        inside = _hold_centres(window[None], boxes)[0]
        inner: Sample = {**chosen(sample, inside), "boxes": boxes[inside]}
        return painted(inner, _stretched(window, size=self.size), size=self.size, min_visible=0.0, fill=self.fill)

    def _view(self, height: int, width: int) -> Tensor:
        """The image, or more than it: (4,) XYXY in the image's pixels."""
        zoom = uniform(1, self.max_zoom_out) if uniform(0, 1) < self.zoom_out_probability else 1.0
        image = torch.tensor([width, height])
        left_top = torch.rand(2) * (1 - zoom) * image
        return torch.cat([left_top, left_top + zoom * image])

    def _window(self, view: Tensor, boxes: Tensor) -> Tensor:
        """All of the view, or a patch (4,) for the first of the shuffled minima that one is found for."""
        for index in torch.randperm(len(self.min_ious)).tolist():
            if self.min_ious[index] >= 1:
                break
            patches = self._patches(view)
            fits = box_iou(patches, boxes) >= self.min_ious[index]
            found = (fits.any(dim=1) & _hold_centres(patches, boxes).any(dim=1)).nonzero()
            if len(found):
                return patches[found[0, 0]]
        return view

    def _patches(self, view: Tensor) -> Tensor:
        """Patches (T, 4) of the view that its sides and aspect allow; T is ``trials`` at most."""
        sides = (self.min_scale + (1 - self.min_scale) * torch.rand(self.trials, 2)) * (view[2:] - view[:2])
        aspect = sides[:, 0] / sides[:, 1]
        sides = sides[(aspect <= self.max_aspect) & (aspect >= 1 / self.max_aspect)]
        left_top = view[:2] + torch.rand(len(sides), 2) * (view[2:] - view[:2] - sides)
        return torch.cat([left_top, left_top + sides], dim=1)


def _hold_centres(windows: Tensor, boxes: Tensor) -> Tensor:
    """Whether each window (T, 4) holds the centre of each box (G, 4), as (T, G)."""
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    return ((centres >= windows[:, None, :2]) & (centres < windows[:, None, 2:])).all(dim=-1)


def _stretched(window: Tensor, *, size: Sequence[int]) -> Placement:
    """Where the image lies once ``window`` (4,), in its pixels, fills ``size`` [H, W]."""
    left, top, right, bottom = window.tolist()
    scale_x, scale_y = size[1] / (right - left), size[0] / (bottom - top)
    return Placement(scale=(scale_x, scale_y), offset=(-left * scale_x, -top * scale_y))
