import pytest
import torch
from torchvision.models.detection._utils import Matcher

from onestage.assign.match import IGNORED, NEGATIVE, by_threshold


def test_from_the_positive_threshold_on_and_below_the_negative_one() -> None:
    overlaps = torch.tensor([[0.5, 0.49, 0.4, 0.39, 0.0], [0.1, 0.2, 0.3, 0.1, 0.0]])
    matched = by_threshold(overlaps, positive_iou=0.5, negative_iou=0.4)
    assert matched.tolist() == [0, IGNORED, IGNORED, NEGATIVE, NEGATIVE]
    assert matched.dtype == torch.int64


def test_an_anchor_matches_the_truth_that_it_overlaps_most() -> None:
    overlaps = torch.tensor([[0.6, 0.9], [0.7, 0.8]])
    assert by_threshold(overlaps, positive_iou=0.5, negative_iou=0.5).tolist() == [1, 0]


@pytest.mark.parametrize(("positive_iou", "negative_iou"), [(0.5, 0.4), (0.5, 0.5), (0.7, 0.3)])
def test_equals_torchvision(positive_iou: float, negative_iou: float) -> None:
    overlaps = torch.rand(3, 5, 400, generator=torch.Generator().manual_seed(0)).pow(4)
    found = by_threshold(overlaps, positive_iou=positive_iou, negative_iou=negative_iou)
    assert {NEGATIVE, 0, 4} <= set(found.unique().tolist())
    for image, matched in zip(overlaps, found, strict=True):
        assert torch.equal(matched, Matcher(positive_iou, negative_iou)(image))


def test_images_without_truths_have_no_matches() -> None:
    assert by_threshold(torch.zeros(2, 0, 3), positive_iou=0.5, negative_iou=0.4).tolist() == [[NEGATIVE] * 3] * 2


def test_padded_truths_match_nothing() -> None:
    overlaps = torch.tensor([[0.9, 0.45, 0.1], [0.0, 0.0, 0.0]])
    assert by_threshold(overlaps, positive_iou=0.5, negative_iou=0.4).tolist() == [0, IGNORED, NEGATIVE]


def test_thresholds_the_wrong_way_round_are_refused_with_their_values() -> None:
    with pytest.raises(ValueError, match=r"need negative_iou <= positive_iou, got 0.6 > 0.5"):
        by_threshold(torch.zeros(1, 1), positive_iou=0.5, negative_iou=0.6)
