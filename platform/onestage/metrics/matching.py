"""Which detection finds which truth: COCO's greedy matching, within each class of an image, the surest first.

T IoU thresholds, D detections and G truths of one image, I images; N detections of one class, of all images.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from onestage.metrics.mean_ap import Found

IOUS: Final = np.linspace(0.5, 0.95, 10)
RECALLS: Final = torch.linspace(0.0, 1.0, 101).double().numpy()
"""Where COCO asks for a precision; rounded as torchmetrics has them, which decides where few truths are."""
MAX_DETECTIONS: Final = 100
"""Of one class in one image, as COCO counts them."""
NO_TRUTH: Final = -1

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


class Truths(NamedTuple):
    """Of one image: ``boxes`` (G, 4), ``labels`` (G,), and which are a ``crowd`` and ``difficult`` (G,)."""

    boxes: Floats
    labels: Ints
    crowd: Bools
    difficult: Bools


class Drawn(NamedTuple):
    """What was found in one image: ``boxes`` (D, 4), ``scores`` (D,) and ``labels`` (D,)."""

    boxes: Floats
    scores: Floats
    labels: Ints


class Match(NamedTuple):
    """The ``truth`` (T, D) that each detection finds, its place among G or NO_TRUTH, and whether it ``counts`` (T, D).

    What lies in a crowd counts neither way, nor does what comes behind the ``MAX_DETECTIONS`` best of its class.
    """

    truth: Ints
    counts: Bools


class Matched(NamedTuple):
    """Detections of the class ``label``, of all images, the surest first.

    ``image`` (N,) says which image a detection is of, ``hit`` and ``counts`` (T, N) whether it finds a truth at each
    IoU threshold, and whether it counts at all; ``truths`` (I,) how many truths each image has.
    """

    label: int
    image: Ints
    scores: Floats
    hit: Bools
    counts: Bools
    truths: Ints


def matched(found: Sequence[Found], *, ious: Floats = IOUS) -> Iterator[Matched]:
    """Each class that has a truth or a detection, by its label."""
    truths = [truths_of(one) for one in found]
    drawn = [drawn_of(one) for one in found]
    matches = [match(own, truth, ious=ious) for own, truth in zip(drawn, truths, strict=True)]
    image = np.repeat(np.arange(len(found)), [len(own.scores) for own in drawn])
    scores = _joined([own.scores for own in drawn])
    labels = _joined([own.labels for own in drawn])
    hit = _joined([one.truth != NO_TRUTH for one in matches])
    counts = _joined([one.counts for one in matches])
    of_image = np.repeat(np.arange(len(found)), [int((~one.crowd).sum()) for one in truths])
    of_label = _joined([one.labels[~one.crowd] for one in truths])
    for label in np.union1d(labels, of_label).astype(int).tolist():
        mine = np.flatnonzero(labels == label)
        mine = mine[np.argsort(-scores[mine], kind="stable")]
        number = np.bincount(of_image[of_label == label], minlength=len(found))
        yield Matched(label, image[mine], scores[mine], hit[:, mine], counts[:, mine], number)


def match(drawn: Drawn, truths: Truths, *, ious: Floats = IOUS) -> Match:
    """COCO's matching of one image's detections, class by class.

    A truth is found once; a crowd takes any number, which then count neither way.
    """
    truth = np.full((len(ious), len(drawn.scores)), NO_TRUTH)
    counts = np.tile(_among_the_best(drawn), (len(ious), 1))
    for label in np.intersect1d(drawn.labels, truths.labels):  # the others find nothing
        mine = np.flatnonzero(truths.labels == label)
        chosen = np.flatnonzero((drawn.labels == label) & counts[0])
        order = chosen[np.argsort(-drawn.scores[chosen], kind="stable")]
        at, counted = _greedy(drawn.boxes[order], truths.boxes[mine], truths.crowd[mine], ious)
        truth[:, order] = np.append(mine, NO_TRUTH)[at]
        counts[:, order] = counted
    return Match(truth, counts)


def _among_the_best(drawn: Drawn) -> Bools:
    """Which detections (D,) are among the ``MAX_DETECTIONS`` best of their class."""
    best = np.ones(len(drawn.scores), dtype=bool)
    if len(best) > MAX_DETECTIONS:
        for label in np.unique(drawn.labels):
            chosen = np.flatnonzero(drawn.labels == label)
            best[chosen[np.argsort(-drawn.scores[chosen], kind="stable")][MAX_DETECTIONS:]] = False
    return best


def truths_of(one: Found) -> Truths:
    """The truth of an image; without marks of its own no box is a crowd or difficult."""
    target = one.target
    unset = np.zeros(len(target.labels), dtype=bool)
    return Truths(
        target.boxes.numpy().astype(np.float64).reshape(-1, 4),
        target.labels.numpy(),
        unset if target.crowd is None else target.crowd.numpy().astype(bool),
        unset if target.difficult is None else target.difficult.numpy().astype(bool),
    )


def drawn_of(one: Found, *, threshold: float = 0.0) -> Drawn:
    """The detections of an image with a score of at least ``threshold``."""
    detections = one.detections
    scores = detections.scores.numpy().astype(np.float64)
    sure = scores >= threshold
    boxes = detections.boxes.numpy().astype(np.float64).reshape(-1, 4)
    return Drawn(boxes[sure], scores[sure], detections.labels.numpy()[sure])


def overlap(boxes: Floats, truths: Floats, crowd: Bools | None = None) -> Floats:
    """IoU (D, G) of boxes (D, 4) and truths (G, 4); with a ``crowd`` (G,), the share of the box that lies in it."""
    low = np.maximum(boxes[:, None, :2], truths[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], truths[None, :, 2:])
    shared = np.clip(high - low, 0.0, None).prod(axis=2)
    own = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)[:, None]
    theirs = (truths[:, 2:] - truths[:, :2]).prod(axis=1)[None]
    union = own + theirs - shared
    if crowd is not None:
        union = np.where(crowd[None], own, union)
    share: Floats = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    return share


def _greedy(boxes: Floats, truths: Floats, crowd: Bools, ious: Floats) -> tuple[Ints, Bools]:
    """Of one class, detections (D, 4) with the surest first: the truths that they find and what counts, (T, D) each."""
    found = np.full((len(ious), len(boxes)), NO_TRUTH)
    counts = np.ones(found.shape, dtype=bool)
    share = overlap(boxes, truths, crowd)
    free = np.tile(~crowd, (len(ious), 1))  # (T, G)
    rows = np.arange(len(ious))
    in_crowd = share[:, crowd].max(axis=1, initial=-1.0)
    for index, row in enumerate(share):
        able = np.where(free, row, -1.0)
        # Of equal truths COCO takes the last.
        best = able.shape[1] - 1 - able[:, ::-1].argmax(axis=1)
        hit = able[rows, best] >= ious - 1e-10
        free[rows, best] &= ~hit
        found[:, index] = np.where(hit, best, NO_TRUTH)
        counts[:, index] = hit | (in_crowd[index] < ious - 1e-10)
    return found, counts


def _joined(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """The images' arrays as one, along their last axis."""
    return np.concatenate(parts, axis=-1) if parts else np.zeros(0)
