"""How large a split's boxes are where the network sees them."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from onestage.data.faults import Unreadable
from onestage.data.manifest import Manifest
from onestage.data.shards import ShardReader
from onestage.data.transforms import letterboxed
from onestage.data.truth import named, truth_of
from onestage.types import Skipped

Fit = Literal["letterbox", "stretch"]
"""How an image comes to the input's size: with its aspect kept, or not."""


class BoxSizes(NamedTuple):
    """``sizes`` (N, 2) are the boxes' widths and heights in pixels of the input, float64, those of ``num_images``.

    ``skipped`` images are those whose annotation could not be read.
    """

    sizes: Tensor
    num_images: int
    skipped: list[Skipped]


def box_sizes(
    root: Path | str,
    split: str,
    *,
    size: Sequence[int],
    fit: Fit = "letterbox",
    progress: Callable[[int, int], None] | None = None,
) -> BoxSizes:
    """The boxes of a dataset folder's split, as evaluation puts its images on an input of ``size`` [H, W].

    Difficult boxes count, as training learns them; crowds, which are no one object's shape, and boxes without area do
    not. No image is read. ``progress`` is told (images done, images in all) after each.
    """
    manifest = Manifest.load(root)
    reader, keys = ShardReader(root, split, manifest=manifest), manifest.split(split).keys()
    reader.expect(keys)
    num_classes = len(manifest.classes)
    found: list[Tensor] = []
    skipped: list[Skipped] = []
    for done, key in enumerate(keys, start=1):
        try:
            found.append(_sizes(reader.read(key, members=("json",)), num_classes=num_classes, size=size, fit=fit))
        except Unreadable as error:
            skipped.append(Skipped(key, str(error)))
        if progress is not None:
            progress(done, len(keys))
    return BoxSizes(torch.cat(found) if found else torch.empty(0, 2).double(), len(found), skipped)


def _sizes(raw: Mapping[str, Any], *, num_classes: int, size: Sequence[int], fit: Fit) -> Tensor:
    """The boxes' (G, 2) of one sample of a shard."""
    truth = truth_of(raw, num_classes=num_classes, sized=True)
    width, height = truth.size
    if width < 1 or height < 1:
        what = f"no annotation that can be read ({width}x{height} pixels)"
        raise Unreadable(f"{named(raw, truth.source)} has {what}: make the dataset again")
    boxes = torch.tensor(truth.boxes, dtype=torch.float64).reshape(-1, 4)
    sizes = (boxes[:, 2:] - boxes[:, :2])[~torch.tensor(truth.crowd, dtype=torch.bool)]
    sizes *= torch.tensor(_scale(width, height, size=size, fit=fit), dtype=torch.float64)
    return sizes[(sizes > 0).all(dim=1) & sizes.isfinite().all(dim=1)]


def _scale(width: float, height: float, *, size: Sequence[int], fit: Fit) -> tuple[float, float]:
    """Factors for x and y."""
    new_height, new_width = size if fit == "stretch" else letterboxed(height, width, size=size)
    return new_width / width, new_height / height
