"""Focal Loss for Dense Object Detection, arXiv:1708.02002, and torchvision's counts."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models.detection import RetinaNet_ResNet50_FPN_V2_Weights, RetinaNet_ResNet50_FPN_Weights

Make = Callable[..., Any]


@pytest.fixture
def narrow(make_detector: Make) -> Any:
    """At an eighth of its width, which none of the numbers here depends on."""
    return make_detector("retinanet_r50", "width=0.125").eval()


def test_levels_p3_to_p7_at_strides_8_to_128(narrow: Any) -> None:
    with torch.no_grad():
        maps = narrow.raw_maps(torch.zeros(1, 3, 256, 384))
    assert [(256 // raw.shape[2], 384 // raw.shape[3]) for raw in maps[:5]] == [(2**n, 2**n) for n in range(3, 8)]


def test_nine_anchors_a_cell_with_80_classes_and_4_offsets_each(narrow: Any) -> None:
    assert narrow.head.class_out.out_channels == 9 * 80
    assert narrow.head.box_out.out_channels == 9 * 4
    assert narrow(torch.zeros(1, 3, 256, 256)).num_anchors == [9 * (256 // 2**n) ** 2 for n in range(3, 8)]


def test_anchors_cover_the_scales_from_32_to_813_px(narrow: Any) -> None:
    """Sec. 4, "Anchors": areas 32^2 to 512^2 on P3 to P7, at three octave steps and ratios 1:2, 1:1, 2:1."""
    output = narrow(torch.zeros(1, 3, 128, 128))
    sizes = output.anchors[:, 2:] - output.anchors[:, :2]
    first = [level[:9] for level in sizes.split(output.num_anchors)]
    for level, side in zip(first, (32, 64, 128, 256, 512), strict=True):
        expected = [side * 2 ** (n / 3) for _ in range(3) for n in range(3)]
        assert level.prod(dim=1).sqrt().tolist() == pytest.approx(expected, rel=0.03)  # rounded to pixels
        assert (level[:, 1] / level[:, 0]).tolist() == pytest.approx([0.5] * 3 + [1.0] * 3 + [2.0] * 3, rel=0.06)
    assert first[-1].prod(dim=1).sqrt().max().item() == pytest.approx(813, abs=2)


def test_every_class_is_born_at_one_in_a_hundred(narrow: Any) -> None:
    """Sec. 4.1, "Initialization": bias -log((1 - pi) / pi) with pi = 0.01, weights Gaussian of 0.01, bias 0."""
    assert torch.allclose(narrow.head.class_out.bias, torch.tensor(-math.log(99)))
    with torch.no_grad():
        probabilities = narrow(torch.rand(1, 3, 128, 128)).logits.sigmoid()
    assert probabilities.mean().item() == pytest.approx(0.01, rel=0.05)
    assert narrow.head.box_out.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert not narrow.head.box_out.bias.any()


def test_four_convolutions_of_256_channels_in_each_tower(make_detector: Make) -> None:
    head = make_detector("retinanet_r50").head
    for tower in (head.class_tower, head.box_tower):
        layers = [layer for layer in tower.modules() if isinstance(layer, nn.Conv2d)]
        assert [(one.in_channels, one.out_channels, one.kernel_size) for one in layers] == [(256, 256, (3, 3))] * 4


def test_the_papers_constants(narrow: Any) -> None:
    assert (narrow.class_loss.alpha, narrow.class_loss.gamma) == (0.25, 2.0)
    assert (narrow.assigner.positive_iou, narrow.assigner.negative_iou) == (0.5, 0.4)
    assert (narrow.score_threshold, narrow.nms_iou, narrow.candidates_per_level) == (0.05, 0.5, 1000)


def test_the_papers_form_is_a_matter_of_overrides(make_detector: Make) -> None:
    paper = ("box_loss=smooth_l1", "neck.coarse_from=c5", "assigner.claim_best=false", "max_detections=100")
    detector = make_detector("retinanet_r50", "width=0.125", *paper)
    assert detector.neck.p6.in_channels == detector.backbone.channels[-1]


@pytest.mark.parametrize(
    ("name", "weights", "num_norm"),
    [
        ("retinanet_r50", RetinaNet_ResNet50_FPN_Weights.COCO_V1, 2 * 26_560),  # frozen there, so not counted
        ("retinanet_r50_v2", RetinaNet_ResNet50_FPN_V2_Weights.COCO_V1, 0),
    ],
)
def test_has_as_many_parameters_as_torchvision_publishes(
    make_detector: Make, name: str, weights: Any, num_norm: int
) -> None:
    detector = make_detector(name, "num_classes=91")
    assert sum(value.numel() for value in detector.parameters()) == weights.meta["num_params"] + num_norm


@pytest.mark.parametrize(("name", "num_norms"), [("retinanet_r50", 53), ("retinanet_r101", 104)])
def test_the_backbones_have_their_batch_norms(make_detector: Make, name: str, num_norms: int) -> None:
    backbone = make_detector(name, "width=0.125").backbone
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in backbone.modules()) == num_norms
