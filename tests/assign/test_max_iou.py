"""Against torchvision's matcher, and by hand."""

import pytest
import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from onestage.assign import max_iou
from onestage.assign.match import IGNORED, NEGATIVE
from onestage.assign.max_iou import MaxIoUAssigner
from onestage.types import XYXY


def random_boxes(num: int, seed: int) -> Tensor:
    """In 100x100, on whole pixels, so that some overlaps tie."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.randint(0, 80, (num, 2), generator=generator)
    return torch.cat((low, low + torch.randint(1, 40, (num, 2), generator=generator)), dim=1).float()


def assigner(*, claim_best: bool = True) -> MaxIoUAssigner:
    return MaxIoUAssigner(positive_iou=0.5, negative_iou=0.4, claim_best=claim_best)


@pytest.mark.parametrize("claim_best", [True, False])
@pytest.mark.parametrize("num_truths", [1, 7, 60])
def test_matches_are_torchvisions(num_truths: int, claim_best: bool) -> None:
    anchors, boxes = random_boxes(3000, 1), random_boxes(num_truths, 2)
    expected = Matcher(0.5, 0.4, allow_low_quality_matches=claim_best)(box_iou(boxes, anchors))
    (found,) = assigner(claim_best=claim_best)(XYXY(anchors), XYXY(boxes[None]))
    assert torch.equal(found, expected)
    assert {NEGATIVE, 0} <= set(found.tolist())


ANCHORS = XYXY(torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 20], [50, 0, 60, 10], [80, 80, 90, 90]]))


def matched(*boxes: tuple[float, float, float, float], claim_best: bool = True) -> list[int]:
    values = XYXY(torch.tensor(boxes).view(1, -1, 4))
    found: list[int] = assigner(claim_best=claim_best)(ANCHORS, values)[0].tolist()
    return found


def test_by_hand() -> None:
    # IoU with the first two anchors: 9 / 10 and 9 / 20.
    assert matched((0, 0, 10, 9)) == [0, IGNORED, NEGATIVE, NEGATIVE]


def test_a_truth_that_overlaps_little_claims_the_anchor_that_overlaps_it_most() -> None:
    truth = (59.0, 9.0, 69.0, 19.0)  # an IoU of 1 / 199
    assert matched(truth) == [NEGATIVE, NEGATIVE, 0, NEGATIVE]
    assert matched(truth, claim_best=False) == [NEGATIVE] * 4


def test_an_anchor_that_a_truth_claims_keeps_its_own_best_truth() -> None:
    whole, corner = (50.0, 0.0, 60.0, 10.0), (59.0, 9.0, 69.0, 19.0)
    assert matched(whole, corner)[2] == 0
    assert matched(corner, whole)[2] == 1


def test_boxes_without_area_and_padding_match_nothing() -> None:
    assert matched((5, 5, 5, 5), (0, 0, 10, 0), (0, 0, 0, 0)) == [NEGATIVE] * 4


def test_without_truths_every_anchor_is_background() -> None:
    found = assigner()(ANCHORS, XYXY(torch.zeros(3, 0, 4)))
    assert found.dtype == torch.int64
    assert found.tolist() == [[NEGATIVE] * 4] * 3


def test_every_image_is_matched_for_itself_however_many_go_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    anchors, boxes = XYXY(random_boxes(200, 1)), XYXY(random_boxes(5 * 6, 2).view(5, 6, 4))
    boxes[3, 2:] = 0
    alone = torch.cat([assigner()(anchors, XYXY(one[None])) for one in boxes])
    for limit in (1, 2 * 6 * 200, 2**26):
        monkeypatch.setattr(max_iou, "MAX_OVERLAPS", limit)
        assert torch.equal(assigner()(anchors, boxes), alone)


def test_thresholds_the_wrong_way_round_are_refused() -> None:
    with pytest.raises(ValueError, match=r"need detector.assigner.negative_iou <= positive_iou, got 0.6 > 0.5"):
        MaxIoUAssigner(positive_iou=0.5, negative_iou=0.6, claim_best=True)
