"""How large a split's boxes are where the network sees them."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from onestage.data.faults import Unreadable
from onestage.data.manifest import Manifest
from onestage.data.shards import ShardReader
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
    found: list[Tensor] = []
    skipped: list[Skipped] = []
    for done, key in enumerate(keys, start=1):
        try:
            found.append(_sizes(reader.read(key, members=("json",)), size=size, fit=fit))
        except Unreadable as error:
            skipped.append(Skipped(key, str(error)))
        if progress is not None:
            progress(done, len(keys))
    return BoxSizes(torch.cat(found) if found else torch.empty(0, 2).double(), len(found), skipped)


def _sizes(raw: Mapping[str, Any], *, size: Sequence[int], fit: Fit) -> Tensor:
    """The boxes' (G, 2) of one sample of a shard."""
    try:
        truth = json.loads(raw["json"])
        boxes = torch.tensor(truth["boxes"], dtype=torch.float64).reshape(-1, 4)
        wanted = ~torch.tensor(truth["crowd"], dtype=torch.bool)
        scale = torch.tensor(_scale(truth["width"], truth["height"], size=size, fit=fit), dtype=torch.float64)
        sizes = (boxes[:, 2:] - boxes[:, :2])[wanted] * scale
    except (KeyError, TypeError, ValueError, RuntimeError, IndexError, ZeroDivisionError) as error:
        where = f"sample {raw['__key__']} in {raw.get('__url__')}"
        raise Unreadable(f"{where} has no annotation that can be read: make the dataset again") from error
    return sizes[(sizes > 0).all(dim=1) & sizes.isfinite().all(dim=1)]


def _scale(width: float, height: float, *, size: Sequence[int], fit: Fit) -> tuple[float, float]:
    """Factors for x and y, which are those of ``transforms.letterbox``: sides become whole pixels."""
    if fit == "stretch":
        return size[1] / width, size[0] / height
    factor = min(size[0] / height, size[1] / width)
    return max(1, round(width * factor)) / width, max(1, round(height * factor)) / height
