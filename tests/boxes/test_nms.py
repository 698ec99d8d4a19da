import pytest
import torch
from torch import Tensor

from onestage.boxes.nms import MAX_CANDIDATES, no_detections, suppress
from onestage.types import XYXY, Detections

Found = tuple[float, int, list[float]]  # score, label, box


def plain_nms(boxes: Tensor, scores: Tensor, *, threshold: float, nms_iou: float) -> list[Found]:
    """NMS as one would tell it to a friend, in float64; best first."""

    def iou(a: list[float], b: list[float]) -> float:
        width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
        height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
        union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
        return width * height / union if width * height else 0.0

    candidates = [
        (float(scores[i, k]), k, boxes[i].tolist())
        for i in range(len(boxes))
        for k in range(scores.shape[1])
        if scores[i, k] > threshold
    ]
    kept: list[Found] = []
    for candidate in sorted(candidates, reverse=True):
        if all(candidate[1] != other[1] or iou(candidate[2], other[2]) <= nms_iou for other in kept):
            kept.append(candidate)
    return kept


def as_tuples(found: Detections) -> list[Found]:
    return list(zip(found.scores.tolist(), found.labels.tolist(), found.boxes.tolist(), strict=True))


def crowded(seed: int, num: int = 80, num_classes: int = 3) -> tuple[XYXY, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(num, 2, generator=generator) * 60
    size = torch.rand(num, 2, generator=generator) * 40 + 5
    return XYXY(torch.cat((corner, corner + size), dim=1)), torch.rand(num, num_classes, generator=generator)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("nms_iou", [0.0, 0.3, 0.45, 1.0])
def test_keeps_what_the_plain_algorithm_keeps(seed: int, nms_iou: float) -> None:
    boxes, scores = crowded(seed)
    found = suppress(boxes, scores, score_threshold=0.4, nms_iou=nms_iou, max_detections=1000)
    assert as_tuples(found) == plain_nms(boxes, scores, threshold=0.4, nms_iou=nms_iou)


def test_classes_do_not_suppress_each_other() -> None:
    boxes = XYXY(torch.tensor([[0.0, 0, 10, 10]]).repeat(3, 1))
    scores = torch.tensor([[0.9, 0.0], [0.8, 0.0], [0.0, 0.7]])
    found = suppress(boxes, scores, score_threshold=0.1, nms_iou=0.5, max_detections=10)
    assert found.labels.tolist() == [0, 1]
    assert found.scores.tolist() == pytest.approx([0.9, 0.7])


def test_a_box_counts_for_every_class_above_the_threshold() -> None:
    scores = torch.tensor([[0.5, 0.25, 0.75]])  # 0.25 is not above 0.25
    found = suppress(XYXY(torch.ones(1, 4)), scores, score_threshold=0.25, nms_iou=0.5, max_detections=10)
    assert found.labels.tolist() == [2, 0]


def test_overlap_of_just_the_threshold_is_allowed() -> None:
    boxes = XYXY(torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 1]]))  # IoU 1/2, exact in floating point
    scores = torch.tensor([[0.9], [0.8]])
    assert len(suppress(boxes, scores, score_threshold=0.1, nms_iou=0.5, max_detections=10)) == 2
    assert len(suppress(boxes, scores, score_threshold=0.1, nms_iou=0.49, max_detections=10)) == 1


def test_the_best_max_detections_are_returned_best_first() -> None:
    boxes, scores = crowded(0)
    found = suppress(boxes, scores, score_threshold=0.4, nms_iou=0.45, max_detections=7)
    assert as_tuples(found) == plain_nms(boxes, scores, threshold=0.4, nms_iou=0.45)[:7]


def test_classes_do_not_suppress_each_other_beyond_the_left_or_top_border() -> None:
    boxes = XYXY(torch.tensor([[-400.0, -400, 10, 10], [-390.0, -390, 20, 20]]))
    found = suppress(boxes, torch.eye(2) * 0.9, score_threshold=0.1, nms_iou=0.45, max_detections=10)
    assert sorted(found.labels.tolist()) == [0, 1]


@pytest.mark.parametrize("size", [3e6, float("inf")])
def test_one_enormous_box_changes_nothing_for_the_others(size: float) -> None:
    boxes, scores = crowded(1, num_classes=40)
    enormous = XYXY(torch.cat((torch.tensor([[-size, -size, size, size]]), boxes)))
    with_it = torch.cat((torch.zeros(1, 40), scores))
    with_it[0, 39] = 1.0
    found = suppress(enormous, with_it, score_threshold=0.8, nms_iou=0.45, max_detections=1000)
    assert as_tuples(found)[0][:2] == (1.0, 39)
    assert as_tuples(found)[1:] == plain_nms(boxes, scores, threshold=0.8, nms_iou=0.45)


def test_a_detector_that_fires_everywhere_is_held_to_its_best_candidates() -> None:
    num = MAX_CANDIDATES + 500
    left = torch.arange(num, dtype=torch.float32) * 10
    boxes = XYXY(torch.stack((left, left * 0, left + 5, left * 0 + 5), dim=1))  # apart from each other
    scores = torch.linspace(0.1, 0.9, num)[:, None]
    found = suppress(boxes, scores, score_threshold=0.05, nms_iou=0.45, max_detections=num)
    assert torch.equal(found.scores, scores[:, 0].flip(0)[:MAX_CANDIDATES])


@pytest.mark.parametrize("num", [0, 4])
def test_nothing_above_the_threshold_gives_empty_detections(num: int) -> None:
    found = suppress(
        XYXY(torch.rand(num, 4)), torch.full((num, 2), 0.1), score_threshold=0.2, nms_iou=0.5, max_detections=10
    )
    for one in (found, no_detections()):
        assert len(one) == 0
        assert (one.boxes.shape, one.scores.shape, one.labels.shape) == ((0, 4), (0,), (0,))
        assert one.labels.dtype == torch.int64


# Two boxes 10x10, 2 apart: an IoU of 8 / 12; d^2 = 4, the box around both is 12x10, so c^2 = 244.
SHIFTED = XYXY(torch.tensor([[0.0, 0, 10, 10], [2, 0, 12, 10]]))
PENALTY = 4 / 244


@pytest.mark.parametrize("power", [1.0, 0.6])
def test_centres_apart_lower_the_overlap_by_a_power_of_their_distance(power: float) -> None:
    overlap = 8 / 12 - PENALTY**power
    for nms_iou, num in ((overlap - 1e-3, 1), (overlap + 1e-3, 2)):
        found = suppress(
            SHIFTED,
            torch.tensor([[0.9], [0.8]]),
            score_threshold=0.1,
            nms_iou=nms_iou,
            max_detections=10,
            distance_power=power,
        )
        assert len(found) == num


@pytest.mark.parametrize("seed", range(3))
def test_without_weight_the_distance_leaves_the_plain_algorithm(seed: int) -> None:
    """A power so high that the penalty vanishes: distances are below the diagonal."""
    boxes, scores = crowded(seed)
    found = suppress(boxes, scores, score_threshold=0.4, nms_iou=0.45, max_detections=9, distance_power=1e6)
    assert as_tuples(found) == plain_nms(boxes, scores, threshold=0.4, nms_iou=0.45)[:9]


@pytest.mark.parametrize("num", [0, 4])
def test_nothing_above_the_threshold_gives_nothing_by_distance_either(num: int) -> None:
    found = suppress(
        XYXY(torch.rand(num, 4)),
        torch.zeros(num, 2),
        score_threshold=0.2,
        nms_iou=0.5,
        max_detections=10,
        distance_power=0.6,
    )
    assert (found.boxes.shape, found.labels.dtype) == ((0, 4), torch.int64)
