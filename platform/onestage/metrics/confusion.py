"""Which class is taken for which: a confusion matrix with the background.

K classes; D detections and G truths of one image.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np

from onestage.metrics.matching import NO_TRUTH, Bools, Drawn, Floats, Ints, Truths, drawn_of, overlap, truths_of
from onestage.metrics.mean_ap import Found

IOU: Final = 0.5


def confusion(found: Sequence[Found], *, num_classes: int, threshold: float, iou: float = IOU) -> Ints:
    """How often a truth of each class (row) was found as each class (column), (K + 1, K + 1); the last is background.

    Detections with a score of at least ``threshold`` choose in the order of their scores, whatever their class: of the
    truths that are still free the one that they overlap most, by ``iou`` at least. The row of the background holds
    those that are left, its column the truths that are. Crowds are no truths; what lies in one is left out.
    """
    matrix = np.zeros((num_classes + 1, num_classes + 1), dtype=np.int64)
    for one in found:
        drawn, truths = drawn_of(one, threshold=threshold), truths_of(one)
        chosen, counts = _choose(drawn, truths, iou)
        rows = np.append(truths.labels, num_classes)[chosen]
        np.add.at(matrix, (rows[counts], drawn.labels[counts]), 1)
        left = ~truths.crowd
        left[chosen[chosen != NO_TRUTH]] = False
        matrix[:, num_classes] += np.bincount(truths.labels[left], minlength=num_classes + 1)
    return matrix


def _choose(drawn: Drawn, truths: Truths, iou: float) -> tuple[Ints, Bools]:
    """The place of the truth that each detection (D,) gets, NO_TRUTH for none, and whether it counts."""
    chosen = np.full(len(drawn.scores), NO_TRUTH)
    counts = np.ones(len(drawn.scores), dtype=bool)
    if not len(truths.labels):
        return chosen, counts
    share: Floats = overlap(drawn.boxes, truths.boxes, truths.crowd)
    free = ~truths.crowd
    for at in np.argsort(-drawn.scores, kind="stable"):
        able = np.where(free & (share[at] >= iou), share[at], -1.0)
        # Of equal overlaps the truth of its own class.
        best = int(np.lexsort((truths.labels == drawn.labels[at], able))[-1])
        if able[best] >= 0:
            chosen[at], free[best] = best, False
        else:
            counts[at] = not (share[at][truths.crowd] >= iou).any()
    return chosen, counts
