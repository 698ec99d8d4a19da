"""AP as PASCAL VOC's devkit has it and the older papers report it: at IoU 0.5, without difficult objects.

N detections of one class, of all images.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np

from onestage.metrics.matching import Bools, Floats, drawn_of, overlap, truths_of
from onestage.metrics.mean_ap import Found

IOU: Final = 0.5


class VocAP:
    """``voc07/map`` (eleven recalls) and ``voc12/map`` (the area), and both ``…/ap/<class>``.

    Difficult objects are no truths, and a detection that overlaps one most counts neither way; so it is with crowds,
    which VOC has not. Every detection counts, however many. The devkit adds a pixel to the sides of boxes: its corners
    are the first and the last pixel. Ours are the outer edges, of the same boxes, so that here nothing is added and
    the overlap is the same. A class without truths has no score and is left out.
    """

    def __init__(self, *, classes: Sequence[str]) -> None:
        self.classes = list(classes)

    def __call__(self, found: Sequence[Found]) -> dict[str, float]:
        """Every score of a split's images by its name; none of a split without truths."""
        by_class = {self.classes[label]: curve for label, curve in _curves(found)}
        values: dict[str, float] = {}
        for year, score in (("voc07", eleven_points), ("voc12", area)):
            scores = {name: score(recall, precision) for name, (recall, precision) in by_class.items()}
            if scores:
                values[f"{year}/map"] = float(np.mean(list(scores.values())))
            values |= {f"{year}/ap/{name}": value for name, value in scores.items()}
        return values


def eleven_points(recall: Floats, precision: Floats) -> float:
    """The mean over the recalls 0, 0.1 to 1 of the best precision there or beyond: VOC 2007 to 2009.

    >>> round(eleven_points(np.array([0.5, 0.5, 1.0]), np.array([1.0, 0.5, 2 / 3])), 4)
    0.8485
    """
    # As tenths: the devkit's 0:0.1:1 has 0.3 as the 3 / 10 that a recall is.
    best = [precision[recall >= tenth / 10].max(initial=0.0) for tenth in range(11)]
    return float(np.mean(best))


def area(recall: Floats, precision: Floats) -> float:
    """The area under precision, made to fall with recall: VOC 2010 and later.

    >>> round(area(np.array([0.5, 0.5, 1.0]), np.array([1.0, 0.5, 2 / 3])), 4)
    0.8333
    """
    best = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(recall, prepend=0.0) * best).sum())


class _Seen(NamedTuple):
    """Of one class in one image: its truths, and the scores and hits (N,) of what counts, the surest first."""

    truths: int
    scores: Floats
    hits: Bools


def _curves(found: Sequence[Found]) -> Iterator[tuple[int, tuple[Floats, Floats]]]:
    """The labels that have truths, each with recall and precision (N,) behind each detection that counts."""
    by_label: dict[int, list[_Seen]] = defaultdict(list)
    for one in found:
        drawn, truths = drawn_of(one), truths_of(one)
        left_out = truths.difficult | truths.crowd
        for label in np.union1d(drawn.labels, truths.labels).tolist():
            mine, chosen = truths.labels == label, np.flatnonzero(drawn.labels == label)
            order = chosen[np.argsort(-drawn.scores[chosen], kind="stable")]
            hit, counts = _judged(drawn.boxes[order], truths.boxes[mine], left_out[mine])
            num_truths = int((mine & ~left_out).sum())
            by_label[int(label)].append(_Seen(num_truths, drawn.scores[order][counts], hit[counts]))
    for label, seen in sorted(by_label.items()):
        if num_truths := sum(one.truths for one in seen):
            by_score = np.argsort(-np.concatenate([one.scores for one in seen]), kind="stable")
            hits = np.cumsum(np.concatenate([one.hits for one in seen])[by_score])
            yield label, (hits / num_truths, hits / np.arange(1, len(hits) + 1))


def _judged(boxes: Floats, truths: Floats, left_out: Bools) -> tuple[Bools, Bools]:
    """Of boxes (N, 4) with the surest first: hits (N,) and which count.

    Other than with COCO a box is held against the truth that it overlaps most, be that found already or left out.
    """
    hit, counts = np.zeros(len(boxes), dtype=bool), np.ones(len(boxes), dtype=bool)
    if not len(truths):
        return hit, counts
    share = overlap(boxes, truths)
    taken: set[int] = set()
    for at, best in enumerate(share.argmax(axis=1).tolist()):
        if share[at, best] < IOU:
            continue
        if left_out[best]:
            counts[at] = False
        elif best not in taken:
            hit[at] = True
            taken.add(best)
    return hit, counts
