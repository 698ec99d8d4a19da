"""How sure a mean average precision is: its spread over other images of the same kind, by the bootstrap."""

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from onestage.metrics.mean_ap import Found

RESAMPLES: Final = 200
LEVEL: Final = 0.95
IOUS: Final = np.linspace(0.5, 0.95, 10)
RECALLS: Final = torch.linspace(0.0, 1.0, 101).double().numpy()  # rounded as torchmetrics has them
MAX_DETECTIONS: Final = 100

Floats = NDArray[np.float64]


class Matched(NamedTuple):
    """Detections of one class, of all images, the surest first.

    ``image`` (N,) says which image a detection is of, ``hit`` and ``counts`` (T, N) whether it finds a truth at each
    IoU threshold, and whether it counts at all; ``truths`` (I,) how many truths each image has.
    """

    image: NDArray[np.int64]
    hit: NDArray[np.bool_]
    counts: NDArray[np.bool_]
    truths: NDArray[np.int64]


def map_interval(
    found: Sequence[Found], *, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> tuple[float, float] | None:
    """The interval that holds COCO's mAP (IoU 0.5 to 0.95) with probability ``level``, drawing images anew.

    The basic bootstrap (Davison and Hinkley 1997, Sec. 2.4), of as many images as there are, with replacement: it
    takes off that few images score too well, which precision's envelope makes them do. None without a truth.
    """
    matched = list(_matched(found))
    if not matched:
        return None
    rng = np.random.default_rng(seed)
    tail = (1 - level) / 2
    draws = (np.bincount(rng.integers(len(found), size=len(found)), minlength=len(found)) for _ in range(resamples))
    scores = [score for weights in draws if (score := mean_ap(matched, weights)) is not None]
    if not scores:
        return None
    here = mean_ap(matched, np.ones(len(found), dtype=np.int64))
    assert here is not None
    low, high = np.clip(2 * here - np.quantile(scores, [1 - tail, tail]), 0.0, 1.0)
    return float(low), float(high)


def point_estimate(found: Sequence[Found]) -> float | None:
    """COCO's mAP of these images, each once: what the resamples vary about."""
    return mean_ap(list(_matched(found)), np.ones(len(found), dtype=np.int64))


def mean_ap(matched: Sequence[Matched], weights: NDArray[np.int64]) -> float | None:
    """COCO's mAP where image i stands ``weights[i]`` times; None where no truth is left."""
    scores = [score for one in matched if (score := _average_precision(one, weights)) is not None]
    return float(np.mean(scores)) if scores else None


def _average_precision(one: Matched, weights: NDArray[np.int64]) -> float | None:
    """Of one class, the mean over the thresholds; interpolated at 101 recalls, as COCO does."""
    truths = int((one.truths * weights).sum())
    if truths == 0:
        return None
    times = weights[one.image] * one.counts  # (T, N)
    hits = np.cumsum(times * one.hit, axis=1)
    seen = np.cumsum(times, axis=1)
    precision = hits / np.maximum(seen, 1)
    envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    total = 0.0
    for row, best in zip(hits, envelope, strict=True):
        at = np.searchsorted(row / truths, RECALLS, side="left")
        total += float(best[at[at < len(best)]].sum())
    return total / (len(RECALLS) * len(IOUS))


def _matched(found: Sequence[Found]) -> Iterator[Matched]:
    """Each class that has truths."""
    truths = [_truths(one) for one in found]
    labels = sorted({int(label) for _, own, crowd in truths for label in own[~crowd]})
    for label in labels:
        image, scores, hit, counts = [], [], [], []
        number = np.zeros(len(found), dtype=np.int64)
        for index, (one, (boxes, own, crowd)) in enumerate(zip(found, truths, strict=True)):
            mine = own == label
            number[index] = int((mine & ~crowd).sum())
            chosen = (one.detections.labels == label).numpy()
            score = one.detections.scores.numpy()[chosen].astype(np.float64)
            order = np.argsort(-score, kind="stable")[:MAX_DETECTIONS]
            drawn = one.detections.boxes.numpy()[chosen][order].astype(np.float64)
            found_here, counted = _match(drawn, boxes[mine], crowd[mine])
            image.append(np.full(len(order), index))
            scores.append(score[order])
            hit.append(found_here)
            counts.append(counted)
        by_score = np.argsort(-np.concatenate(scores), kind="stable")
        yield Matched(
            np.concatenate(image)[by_score],
            np.concatenate(hit, axis=1)[:, by_score],
            np.concatenate(counts, axis=1)[:, by_score],
            number,
        )


def _truths(one: Found) -> tuple[Floats, NDArray[np.int64], NDArray[np.bool_]]:
    target = one.target
    crowd = np.zeros(len(target.labels), dtype=bool) if target.crowd is None else target.crowd.numpy().astype(bool)
    return target.boxes.numpy().astype(np.float64), target.labels.numpy(), crowd


def _match(boxes: Floats, truths: Floats, crowd: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """COCO's greedy matching of detections (D, 4), the surest first: hits and what counts, (T, D) each.

    A truth is found once; a crowd takes any number, which then count neither way.
    """
    hit = np.zeros((len(IOUS), len(boxes)), dtype=bool)
    counts = np.ones_like(hit)
    if not len(truths):
        return hit, counts
    overlap = _overlap(boxes, truths, crowd)
    free = np.tile(~crowd, (len(IOUS), 1))  # (T, G)
    rows = np.arange(len(IOUS))
    in_crowd = overlap[:, crowd].max(axis=1, initial=-1.0)
    for index, row in enumerate(overlap):
        able = np.where(free, row, -1.0)
        # Of equal truths COCO takes the last.
        best = able.shape[1] - 1 - able[:, ::-1].argmax(axis=1)
        hit[:, index] = able[rows, best] >= IOUS - 1e-10
        free[rows, best] &= ~hit[:, index]
        counts[:, index] = hit[:, index] | (in_crowd[index] < IOUS - 1e-10)
    return hit, counts


def _overlap(boxes: Floats, truths: Floats, crowd: NDArray[np.bool_]) -> Floats:
    """IoU (D, G); with a crowd, the share of the detection that lies in it."""
    low = np.maximum(boxes[:, None, :2], truths[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], truths[None, :, 2:])
    shared = np.clip(high - low, 0.0, None).prod(axis=2)
    own = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)[:, None]
    theirs = (truths[:, 2:] - truths[:, :2]).prod(axis=1)[None]
    union = np.where(crowd[None], own, own + theirs - shared)
    overlap: Floats = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    return overlap
