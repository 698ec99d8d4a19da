import torch
from torch import Tensor
from torchvision.models.detection._utils import SSDMatcher
from torchvision.ops import box_iou

from onestage.assign.bipartite import bipartite
from onestage.assign.match import NEGATIVE


def random_boxes(num: int, *, side: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(num, 2, generator=generator) * 100
    return torch.cat((low, low + 1 + torch.rand(num, 2, generator=generator) * side), dim=1)


def test_every_truth_has_an_anchor_however_little_they_overlap() -> None:
    overlaps = torch.tensor([[[0.1, 0.3, 0.2], [0.05, 0.0, 0.01]]])
    assert bipartite(overlaps, positive_iou=0.5).tolist() == [[1, 0, NEGATIVE]]


def test_other_anchors_match_from_the_threshold_on() -> None:
    overlaps = torch.tensor([[[0.9, 0.5, 0.49], [0.0, 0.0, 0.0]]])
    assert bipartite(overlaps, positive_iou=0.5).tolist() == [[0, 0, NEGATIVE]]


def test_a_truths_best_anchor_is_taken_from_a_truth_that_overlaps_it_more() -> None:
    overlaps = torch.tensor([[[0.9, 0.8], [0.0, 0.6]]])
    assert bipartite(overlaps, positive_iou=0.5).tolist() == [[0, 1]]


def test_an_anchor_that_is_best_for_several_goes_to_the_last() -> None:
    overlaps = torch.tensor([[[0.9, 0.1], [0.2, 0.1], [0.7, 0.6]]])
    assert bipartite(overlaps, positive_iou=0.5).tolist() == [[2, 2]]


def test_equals_torchvision_image_by_image() -> None:
    anchors = random_boxes(300, side=40, seed=0)
    truths = torch.stack([random_boxes(60, side=60, seed=seed) for seed in range(1, 5)])
    overlaps = torch.stack([box_iou(image, anchors) for image in truths])
    found = bipartite(overlaps, positive_iou=0.5)
    best = overlaps.argmax(dim=2)
    assert all(len(image.unique()) < len(image) for image in best)  # truths compete for an anchor
    assert (overlaps.amax(dim=2) < 0.5).any()  # and some match by being best alone
    assert torch.equal(found, torch.stack([SSDMatcher(0.5)(image) for image in overlaps]))


def test_padding_changes_nothing() -> None:
    overlaps = torch.rand(1, 4, 50, generator=torch.Generator().manual_seed(0))
    padded = torch.cat((overlaps, torch.zeros(1, 3, 50)), dim=1)
    assert torch.equal(bipartite(padded, positive_iou=0.5), bipartite(overlaps, positive_iou=0.5))


def test_without_truths_all_is_background() -> None:
    assert bipartite(torch.zeros(2, 0, 3), positive_iou=0.5).tolist() == [[NEGATIVE] * 3] * 2
