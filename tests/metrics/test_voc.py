"""VOC's AP against the development kit's rules, written out once more in its own corners."""

from types import ModuleType

import numpy as np
import pytest

from onestage.metrics.voc import VocAP

A, B, NOWHERE = [0, 0, 10, 10], [20, 0, 30, 10], [50, 50, 60, 60]


def scores(*images: object) -> dict[str, float]:
    return VocAP(classes=["a", "b", "c"])(images)  # type: ignore[arg-type]


def test_by_hand(scenes: ModuleType) -> None:
    """Right, wrong, right of two truths: precision 1 to a recall of 0.5 (6 of eleven recalls), then 2/3 (5)."""
    image = scenes.one([(A, 0), (B, 0)], [(A, 0, 0.9), (NOWHERE, 0, 0.8), (B, 0, 0.7)])
    found = scores(image)
    assert found["voc07/ap/a"] == found["voc07/map"] == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)
    assert found["voc12/ap/a"] == found["voc12/map"] == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)


def test_a_difficult_object_is_not_asked_for_and_finding_it_is_no_error(scenes: ModuleType) -> None:
    drawn = [(B, 0, 0.95), (B, 0, 0.93), (A, 0, 0.9)]
    difficult = scenes.one([(A, 0), (B, 0)], drawn, difficult=[False, True])
    assert scores(difficult)["voc12/map"] == 1.0
    plain = scenes.one([(A, 0), (B, 0)], drawn)
    assert scores(plain)["voc12/map"] == pytest.approx(0.5 + 0.5 * 2 / 3)  # the second on B is wrong


def test_a_class_with_difficult_objects_alone_has_no_score(scenes: ModuleType) -> None:
    image = scenes.one([(A, 0), (B, 1)], [(A, 0, 0.9), (B, 1, 0.9)], difficult=[True, False])
    assert set(scores(image)) == {"voc07/map", "voc07/ap/b", "voc12/map", "voc12/ap/b"}
    assert scores() == {}


def test_a_box_is_held_against_the_truth_that_it_overlaps_most_found_or_not(scenes: ModuleType) -> None:
    """COCO would give the second box the other truth, which it overlaps by more than half as well."""
    near = [3, 0, 13, 10]
    image = scenes.one([(A, 0), (near, 0)], [(A, 0, 0.9), ([1, 0, 11, 10], 0, 0.8)])
    assert scores(image)["voc12/map"] == 0.5


def devkit(images: list, label: int, *, use_07: bool) -> float | None:
    """VOCevaldet.m of the development kit, by its text: corners are first and last pixel, sides are their distance + 1.

    http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCdevkit_18-May-2011.tar; VOC 2007's differs in the AP alone.
    """
    inclusive = np.array([1, 1, 0, 0])  # 1-based first and last pixels of outer edges
    num_truths, rows = 0, []
    for number, one in enumerate(images):
        truths = [box + inclusive for box, own in zip(one.target.boxes.numpy(), one.target.labels, strict=True)
                  if own == label]  # fmt: skip
        difficult = one.target.difficult[one.target.labels == label].tolist()
        num_truths += len(difficult) - sum(difficult)
        chosen = one.detections.labels == label
        for box, score in zip(one.detections.boxes[chosen].numpy(), one.detections.scores[chosen], strict=True):
            rows.append((float(score), number, box + inclusive, truths, difficult))
    if num_truths == 0:
        return None
    tp, fp, detected = [], [], set()
    for _, number, bb, truths, difficult in sorted(rows, key=lambda row: -row[0]):
        best, at = -np.inf, -1
        for place, gt in enumerate(truths):
            left, top, right, bottom = max(bb[0], gt[0]), max(bb[1], gt[1]), min(bb[2], gt[2]), min(bb[3], gt[3])
            if right - left + 1 > 0 and bottom - top + 1 > 0:
                shared = (right - left + 1) * (bottom - top + 1)
                union = (bb[2] - bb[0] + 1) * (bb[3] - bb[1] + 1) + (gt[2] - gt[0] + 1) * (gt[3] - gt[1] + 1) - shared
                if shared / union > best:
                    best, at = shared / union, place
        hit = miss = 0
        if best >= 0.5:
            if not difficult[at]:
                hit, miss = (0, 1) if (number, at) in detected else (1, 0)
                detected.add((number, at))
        else:
            miss = 1
        tp.append(hit)
        fp.append(miss)
    recall = np.cumsum(tp) / num_truths
    precision = np.cumsum(tp) / np.maximum(np.cumsum(fp) + np.cumsum(tp), 1e-9)
    if use_07:
        return float(sum(max(precision[recall >= t / 10], default=0.0) / 11 for t in range(11)))
    mrec, mpre = np.array([0.0, *recall, 1.0]), np.array([0.0, *precision, 0.0])
    for place in range(len(mpre) - 2, -1, -1):
        mpre[place] = max(mpre[place], mpre[place + 1])
    steps = np.flatnonzero(mrec[1:] != mrec[:-1]) + 1
    return float(((mrec[steps] - mrec[steps - 1]) * mpre[steps]).sum())


@pytest.mark.parametrize("seed", range(4))
def test_whole_boxes_have_the_development_kits_score(scenes: ModuleType, seed: int) -> None:
    images = scenes.scene(seed, whole=True)
    found = scores(*images)
    for year, use_07 in (("voc07", True), ("voc12", False)):
        expected = [devkit(images, label, use_07=use_07) for label in range(3)]
        assert [found[f"{year}/ap/{name}"] for name in "abc"] == pytest.approx(expected)
        assert found[f"{year}/map"] == pytest.approx(np.mean(expected))  # type: ignore[arg-type]
