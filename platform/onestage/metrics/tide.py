"""What kinds of errors a detector makes, and what each costs: TIDE (Bolya et al. 2020, arXiv:2008.08115).

D detections and G truths of one image.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

from onestage.metrics.matching import NO_TRUTH, Bools, Drawn, Floats, Ints, Truths, drawn_of, match, overlap, truths_of
from onestage.metrics.mean_ap import Found

FOREGROUND_IOU: Final = 0.5  # t_f
BACKGROUND_IOU: Final = 0.1  # t_b
KINDS: Final = ("classification", "localisation", "both", "duplicate", "background", "missed")
CLASSIFICATION, LOCALISATION, BOTH, DUPLICATE, BACKGROUND, MISSED = range(6)
RECALLS: Final = np.linspace(0.0, 1.0, 101)  # as the authors' tidecv has them
HIT: Final = -1
UNCOUNTED: Final = -2
"""A detection in a crowd, or behind the 100 best of its class."""


class Judged(NamedTuple):
    """One image's ``drawn`` and ``truths``, and of what ``kind`` (D,) each detection is: of KINDS, HIT or UNCOUNTED.

    ``truth`` (D,) is the place of the truth that a detection finds, or would find were its one error mended; else
    NO_TRUTH. ``unfound`` (G,) are the truths that nothing finds, ``missed`` (G,) those of them that no mended error
    would find either.
    """

    drawn: Drawn
    truths: Truths
    kind: Ints
    truth: Ints
    unfound: Bools
    missed: Bools


def judge(one: Found, *, threshold: float = 0.0) -> Judged:
    """The errors of one image among detections with a score of at least ``threshold`` (Sec. 2.2).

    Crowds are no truths.
    """
    drawn, truths = drawn_of(one, threshold=threshold), truths_of(one)
    found = match(drawn, truths, ious=np.array([FOREGROUND_IOU]))
    truth, counts = found.truth[0], found.counts[0]
    unfound = ~truths.crowd
    unfound[truth[truth != NO_TRUTH]] = False
    kind = np.where(counts, BACKGROUND, UNCOUNTED)
    kind[truth != NO_TRUTH] = HIT
    if (~truths.crowd).any():
        kind, truth = _errors(drawn, truths, kind, truth, unfound)
    missed = unfound.copy()
    missed[truth[(truth != NO_TRUTH) & (kind != HIT)]] = False
    return Judged(drawn, truths, kind, truth, unfound, missed)


def _errors(drawn: Drawn, truths: Truths, kind: Ints, truth: Ints, unfound: Bools) -> tuple[Ints, Ints]:
    """The kinds of what is no hit, and the truths that mended errors would find; the first definition that holds."""
    share = overlap(drawn.boxes, truths.boxes) * ~truths.crowd  # (D, G)
    same = drawn.labels[:, None] == truths.labels[None]
    own, other = share * same, share * ~same
    own_best, other_best = own.max(axis=1), other.max(axis=1)
    localisation = (own_best >= BACKGROUND_IOU) & (own_best < FOREGROUND_IOU)
    classification = ~localisation & (other_best >= FOREGROUND_IOU)
    nothing = np.maximum(own_best, other_best) <= BACKGROUND_IOU
    kinds = np.select(
        [localisation, classification, own_best >= FOREGROUND_IOU, nothing],
        [LOCALISATION, CLASSIFICATION, DUPLICATE, BACKGROUND],
        default=BOTH,
    )
    near = np.where(localisation, own.argmax(axis=1), other.argmax(axis=1))
    would_find = np.where((localisation | classification) & unfound[near], near, NO_TRUTH)
    wrong = kind == BACKGROUND
    return np.where(wrong, kinds, kind), np.where(wrong, would_find, truth)


def counts(judged: Sequence[Judged]) -> dict[str, int]:
    """How many errors of each kind there are."""
    number = {name: sum(int((one.kind == kind).sum()) for one in judged) for kind, name in enumerate(KINDS)}
    number["missed"] = sum(int(one.missed.sum()) for one in judged)
    return number


class Detected(NamedTuple):
    """All that counts, whatever its image: ``labels``, ``scores``, ``kind`` (N,), and ``mends`` (N,).

    ``mends`` is the class that the detection would have as a hit, were its error mended; -1 where it would go away: it
    finds nothing, or a surer one finds it. ``truths`` and ``missed`` (K,) are counts by class.
    """

    labels: Ints
    scores: Floats
    kind: Ints
    mends: Ints
    truths: Ints
    missed: Ints


def costs(judged: Sequence[Judged]) -> dict[str, float]:
    """How much the AP at IoU 0.5 (0 to 1) would gain, were all errors of a kind mended and no others (Sec. 2.3).

    A wrong class or place is put right where a truth waits for it, for the surest such detection; all others of the
    kind go away, as do duplicates and background. Missed truths are no longer asked for.
    """
    all_ = _gathered(judged)
    before = _mean_ap(all_.labels, all_.scores, all_.kind == HIT, all_.truths)
    gains = {}
    for kind, name in enumerate(KINDS):
        mine = all_.kind == kind
        mended = mine & (all_.mends >= 0)
        stays = ~mine | mended
        labels = np.where(mended, all_.mends, all_.labels)[stays]
        hit = (mended | (all_.kind == HIT))[stays]
        truths = all_.truths - all_.missed if kind == MISSED else all_.truths
        gains[name] = max(_mean_ap(labels, all_.scores[stays], hit, truths) - before, 0.0)
    return gains


def _gathered(judged: Sequence[Judged]) -> Detected:
    none = np.zeros(0, dtype=np.int64)
    parts = [one.kind != UNCOUNTED for one in judged]
    labels = np.concatenate([none, *(one.drawn.labels[part] for one, part in zip(judged, parts, strict=True))])
    truths = np.concatenate([none, *(one.truths.labels[~one.truths.crowd] for one in judged)])
    missed = np.concatenate([none, *(one.truths.labels[one.missed] for one in judged)])
    num_classes = int(max(labels.max(initial=-1), truths.max(initial=-1))) + 1
    return Detected(
        labels,
        np.concatenate([none, *(one.drawn.scores[part] for one, part in zip(judged, parts, strict=True))]),
        np.concatenate([none, *(one.kind[part] for one, part in zip(judged, parts, strict=True))]),
        np.concatenate([none, *(_mends(one)[part] for one, part in zip(judged, parts, strict=True))]),
        np.bincount(truths, minlength=num_classes),
        np.bincount(missed, minlength=num_classes),
    )


def _mends(one: Judged) -> Ints:
    """The class of the truth that each detection (D,) finds once its error is mended, -1 where it finds none."""
    mends = np.full(len(one.kind), -1)
    taken: set[int] = set()
    for at in np.argsort(-one.drawn.scores, kind="stable"):
        near = int(one.truth[at])
        # A truth is found by the surest, of either kind: where that one has another kind, this one goes away.
        if one.kind[at] in (CLASSIFICATION, LOCALISATION) and near != NO_TRUTH and near not in taken:
            mends[at] = one.truths.labels[near]
            taken.add(near)
    return mends


def _mean_ap(labels: Ints, scores: Floats, hit: Bools, truths: Ints) -> float:
    """COCO's AP at one IoU, the mean over classes with a truth."""
    order = np.argsort(-scores, kind="stable")
    labels, hit = labels[order], hit[order]
    values = []
    for label in np.flatnonzero(truths):
        hits = np.cumsum(hit[labels == label])
        best = np.append(np.maximum.accumulate((hits / np.arange(1, len(hits) + 1))[::-1])[::-1], 0.0)
        values.append(best[np.searchsorted(hits / truths[label], RECALLS, side="left")].mean())
    return float(np.mean(values)) if values else 0.0
