"""Anchors that fit a dataset: k-means on 1 - IoU (YOLO9000, arXiv:1612.08242, Sec. 2, "Dimension Clusters").

N boxes, k clusters. Sizes are width and height; boxes are compared as if they shared a centre.
"""

from typing import Final

import torch
from torch import Tensor

from onestage.boxes.iou import shape_iou

RECALL_IOU: Final = 0.5
"""From this IoU on with an anchor a box can be found, as COCO's mAP@0.5 counts, by moving that anchor alone."""
RESTARTS: Final = 20
SEEDING_BOXES: Final = 10_000
"""The restarts look at as many boxes, drawn by the seed, and the best of them goes on with all."""
MIN_GAIN: Final = 1e-5
MAX_ROUNDS: Final = 300
CHUNK_BOXES: Final = 2**18


def fit(sizes: Tensor, k: int, *, seed: int) -> Tensor:
    """The k sizes (k, 2) that meet the boxes' sizes (N, 2) with a high average IoU, by area, the smallest first.

    Equal for an equal seed. Raises ValueError for sizes that are not above 0, or fewer different ones than k.
    """
    if k < 1:
        raise ValueError(f"need k >= 1, got {k}")
    if len(sizes) < k or not (sizes.isfinite() & (sizes > 0)).all():
        raise ValueError(f"need at least k = {k} sizes, all of them finite and above 0, got {len(sizes)}")
    sizes = sizes.double()
    generator = torch.Generator().manual_seed(seed)
    few = sizes[torch.randperm(len(sizes), generator=generator)[:SEEDING_BOXES]]
    tries = [_descended(few, _seeded(few, k, generator)) for _ in range(RESTARTS)]
    _, centres = max(tries, key=lambda one: one[0])
    if len(few) < len(sizes):
        _, centres = _descended(sizes, centres)
    if len(centres.unique(dim=0)) < k:
        raise ValueError(f"{k} anchors need as many boxes of different sizes")
    return centres[centres.prod(dim=1).argsort(stable=True)]


def average_iou(sizes: Tensor, anchors: Tensor) -> float:
    """The mean over sizes (N, 2) of the IoU with the anchor (k, 2) that fits best, which the paper's Table 1 compares.

    >>> average_iou(torch.tensor([[2.0, 2.0], [4.0, 2.0]]), torch.tensor([[2.0, 2.0]]))
    0.75
    """
    return float(best_ious(sizes, anchors).mean())


def best_possible_recall(sizes: Tensor, anchors: Tensor, *, threshold: float = RECALL_IOU) -> float:
    """The share of sizes (N, 2) whose IoU with the anchor (k, 2) that fits best is at least ``threshold``.

    >>> best_possible_recall(torch.tensor([[2.0, 2.0], [9.0, 2.0]]), torch.tensor([[2.0, 2.0]]))
    0.5
    """
    return float((best_ious(sizes, anchors) >= threshold).double().mean())


def best_ious(sizes: Tensor, anchors: Tensor) -> Tensor:
    """Of each size (N, 2) the IoU with the anchor (k, 2) that fits it best, as (N,)."""
    return _nearest(sizes, anchors)[0]


def improved(sizes: Tensor, centres: Tensor) -> Tensor:
    """One round: every box to the centre (k, 2) it fits best, every centre to a better place among its boxes.

    That is the best, by average IoU, of where it is, the boxes' mean (the paper's) and their median: the mean is drawn
    away by a few large boxes, and neither is best on all data. So the average IoU over all boxes never falls.
    A centre without a box moves to the box that its own centre fits worst.
    """
    return _moved(sizes.double(), centres.double(), *_nearest(sizes, centres))


def _moved(sizes: Tensor, centres: Tensor, fits: Tensor, nearest: Tensor) -> Tensor:
    worst = iter(sizes[fits.topk(min(len(centres), len(fits)), largest=False).indices])
    moved = []
    for number, centre in enumerate(centres):
        mine = sizes[nearest == number]
        if len(mine) == 0:
            moved.append(next(worst, centre))
            continue
        places = torch.stack((centre, mine.mean(dim=0), mine.T.median(dim=1).values))
        reached = torch.stack([shape_iou(chunk, places).sum(dim=0) for chunk in mine.split(CHUNK_BOXES)]).sum(dim=0)
        moved.append(places[reached.argmax()])
    return torch.stack(moved)


def _descended(sizes: Tensor, centres: Tensor) -> tuple[float, Tensor]:
    """The average IoU that round after round leads to, and its centres."""
    fits, nearest = _nearest(sizes, centres)
    for _ in range(MAX_ROUNDS):
        before = fits.mean()
        centres = _moved(sizes, centres, fits, nearest)
        fits, nearest = _nearest(sizes, centres)
        if fits.mean() - before < MIN_GAIN:
            break
    return float(fits.mean()), centres


def _seeded(sizes: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k of the sizes, each drawn the more likely, the worse those before it fit (as k-means++ does)."""
    chosen = [int(torch.randint(len(sizes), (), generator=generator))]
    fits = torch.zeros(len(sizes), dtype=sizes.dtype)
    while len(chosen) < k:
        fits = torch.maximum(fits, shape_iou(sizes, sizes[chosen[-1:]])[:, 0])
        far = 1 - fits
        # Nothing is far where there are fewer different sizes than k, as far as this sample shows.
        weights = far if far.any() else torch.ones_like(far)
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
    return sizes[chosen]


def _nearest(sizes: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Of each size (N, 2) the IoU (N,) with the centre that fits it best, and its number (N,): the first of equals."""
    parts = [shape_iou(chunk, centres).max(dim=1) for chunk in sizes.double().split(CHUNK_BOXES)]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])
