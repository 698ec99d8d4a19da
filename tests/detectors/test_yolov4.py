"""By hand and by properties; against an independent reading of Darknet in test_against_darknet.py."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from onestage.detectors.yolov4 import YOLOv4
from onestage.errors import InputError
from onestage.types import XYXY, Target

Make = Callable[..., YOLOv4]


@pytest.fixture
def small(make_detector: Make) -> YOLOv4:
    """Three classes, an input of 64x96: 2x3 and 4x6 cells."""
    return make_detector("yolov4_tiny", "width=0.125", "num_classes=3", "input_size=[64,96]")


def target(*boxes: tuple[float, float, float, float], labels: list[int]) -> Target:
    return Target(XYXY(torch.tensor(boxes).view(-1, 4)), torch.tensor(labels, dtype=torch.int64), 0)


def zero_maps() -> list[Tensor]:
    """On which every probability is a half and every size its prior."""
    return [torch.zeros(1, 24, 2, 3), torch.zeros(1, 24, 4, 6)]


def losses(detector: YOLOv4, *targets: Target) -> dict[str, float]:
    output = detector.from_raw_maps([raw.repeat(len(targets), 1, 1, 1) for raw in zero_maps()], (64, 96))
    return {name: float(part) for name, part in detector.losses(output, targets).items()}


# In the middle of cell (1, 0) of the finer level, of the shape of its prior 1, (23, 27).
BOX = (24 - 11.5, 8 - 13.5, 24 + 11.5, 8 + 13.5)


def test_the_loss_of_one_box_that_is_met_exactly(small: YOLOv4) -> None:
    found = losses(small, target(BOX, labels=[1]))
    assert found["box"] == pytest.approx(0, abs=1e-5)
    assert found["class"] == pytest.approx(3 * math.log(2), rel=1e-5)
    assert found["objectness"] == pytest.approx(90 * math.log(2), rel=1e-5)


def test_a_box_aside_costs_its_lack_of_overlap_and_its_distance(small: YOLOv4) -> None:
    """CIoU (arXiv:1911.08287, eq. 10), of equal aspects: 1 - IoU + d^2 / c^2."""
    aside = (BOX[0] + 4, BOX[1], BOX[2] + 4, BOX[3])
    lack = 1 - 19 / 27 + 4**2 / (27**2 + 27**2)  # 23 wide, 19 shared; the box around both is 27x27
    assert losses(small, target(aside, labels=[1]))["box"] == pytest.approx(small.box_weight * lack, rel=1e-5)
    small.loss = "darknet"
    assert losses(small, target(aside, labels=[1]))["box"] == pytest.approx(0.07 * lack, rel=1e-5)


def test_another_aspect_costs_as_well(small: YOLOv4) -> None:
    """CIoU's v and alpha (arXiv:1911.08287, eq. 8 and 11), for a truth twice as wide as the prediction around it."""
    wide = (24 - 23.0, 8 - 13.5, 24 + 23.0, 8 + 13.5)  # 46x27
    small.priors[2:] = 1000.0  # so that prior 1, 23x27, fits it best
    parts = small.losses(small.from_raw_maps(zero_maps(), (64, 96)), [target(wide, labels=[1])])
    iou = 0.5
    v = 4 / math.pi**2 * (math.atan(46 / 27) - math.atan(23 / 27)) ** 2
    lack = 1 - iou + v * v / (1 - iou + v)
    assert float(parts["box"]) == pytest.approx(small.box_weight * lack, rel=1e-5)


@pytest.mark.parametrize("sizes", [(-20.0, -20.0), (0.0, -20.0), (-90.0, 90.0), (90.0, 90.0)])
def test_predictions_without_area_or_enormous_ones_give_finite_gradients(
    small: YOLOv4, sizes: tuple[float, float]
) -> None:
    maps = zero_maps()
    maps[1].view(1, 3, 8, 4, 6)[0, 0, 2:4, 0, 1] = torch.tensor(sizes)
    leaves = [raw.requires_grad_() for raw in maps]
    parts = small.losses(small.from_raw_maps(leaves, (64, 96)), [target(BOX, labels=[1])])
    torch.stack(list(parts.values())).sum().backward()
    assert all(part.isfinite() for part in parts.values())
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)


def test_every_prior_that_fits_well_enough_answers(small: YOLOv4) -> None:
    """Shapes of priors 1 to 5 on the two levels; (23, 27) has an IoU of 621 / 2146 = 0.289 with (37, 58)."""
    one = losses(small, target(BOX, labels=[1]))
    small.anchor_iou = 0.28
    two = losses(small, target(BOX, labels=[1]))
    assert two["class"] == pytest.approx(2 * one["class"], rel=1e-5)
    small.anchor_iou = 0.30
    assert losses(small, target(BOX, labels=[1])) == pytest.approx(one)


def test_label_smoothing_moves_the_targets_of_the_classes(small: YOLOv4) -> None:
    small.label_smoothing = 0.2
    maps = zero_maps()
    maps[1].view(1, 3, 8, 4, 6)[0, 0, 5:, 0, 1] = torch.tensor([0.9, 0.1, 0.1]).logit()  # prior 1, column 1, row 0
    parts = small.losses(small.from_raw_maps(maps, (64, 96)), [target(BOX, labels=[0])])
    entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))  # the targets are 0.9, 0.1 and 0.1
    assert float(parts["class"]) == pytest.approx(3 * entropy, rel=1e-5)


def test_stretched_centres_reach_the_border_of_their_cell(make_detector: Make) -> None:
    """Sec. 3.4 "eliminate grid sensitivity": 1.2 sigmoid - 0.1 at stride 8, 1.1 and 1.05 at 16 and 32."""
    detector = make_detector("yolov4", "width=0.125", "num_classes=1", "input_size=[32,32]")
    maps = [torch.full((1, 18, side, side), 1.0) for side in (1, 2, 4)]
    boxes = detector.from_raw_maps(maps, (32, 32)).boxes[0]
    sigmoid = 1 / (1 + math.exp(-1))
    for first, stride, scale in ((0, 32, 1.05), (3, 16, 1.1), (3 + 12, 8, 1.2)):
        centre = float(boxes[first, 0] + boxes[first, 2]) / 2  # of the first cell
        assert centre == pytest.approx(stride * (scale * sigmoid - (scale - 1) / 2), rel=1e-4)


def test_a_centre_scale_for_another_number_of_levels_is_refused(make_detector: Make) -> None:
    with pytest.raises(InputError, match=r"^detector.centre_scale names 1 levels, the neck has 2$"):
        make_detector("yolov4_tiny", "centre_scale=[1.05]")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("box_weight=-1.0", "detector.box_weight must be above 0, got -1.0"),
        ("ignore_iou=2.0", "detector.ignore_iou must be from 0 to 1, got 2.0"),
        ("label_smoothing=-0.1", "detector.label_smoothing must be from 0 to 1, got -0.1"),
        ("priors=[[0,14]]", "detector.priors must be pairs of a width and a height above 0, got [[0, 14]]"),
        ("objectness_prior=0.0", "detector.objectness_prior must be between 0 and 1, got 0.0"),
    ],
)
def test_values_without_meaning_are_refused(make_detector: Make, override: str, says: str) -> None:
    with pytest.raises(InputError) as error:
        make_detector("yolov4_tiny", "width=0.125", override)
    assert str(error.value) == says


def test_an_activation_that_is_not_there_is_refused_with_those_that_are(make_detector: Make) -> None:
    with pytest.raises(InputError, match=r"^detector.backbone.activation must be leaky or mish, got foo$"):
        make_detector("yolov4", "width=0.125", "backbone.activation=foo")


def crowd() -> list[Tensor]:
    """Three predictions of one class on the coarser level (prior 0: 81x82), side by side in a row: 32 px apart."""
    maps = [torch.full((1, 24, 2, 3), -20.0), torch.full((1, 24, 4, 6), -20.0)]
    row = maps[0].view(1, 3, 8, 2, 3)[0, 0, :, 1]
    row[:4] = 0.0
    row[4] = torch.tensor([3.0, 2.0, 1.0])
    row[5] = 9.0
    return maps


@pytest.mark.parametrize(("power", "num"), [(None, 2), (0.6, 3)])
def test_greedy_nms_spares_neighbours_with_their_centres_apart(small: YOLOv4, power: float | None, num: int) -> None:
    """IoU of neighbours (81 - 32) / (81 + 32) = 0.434.

    In an image of 1 by 1, d^2 = (1/3)^2 and c^2 = (113/96)^2 + (82/64)^2: the penalty is (0.0367)^0.6 = 0.138.
    """
    small.nms_distance_power, small.nms_iou = power, 0.4
    (found,) = small.detect(small.from_raw_maps(crowd(), (64, 96)))
    assert len(found) == num


def test_distances_are_those_of_an_image_of_1_by_1(small: YOLOv4) -> None:
    """As in Darknet: 0.434 - 0.138 = 0.296; in pixels d^2 / c^2 = 1024 / 19493 would make it 0.434 - 0.171 = 0.263."""
    small.nms_distance_power = 0.6
    for nms_iou, num in ((0.29, 2), (0.30, 3)):
        small.nms_iou = nms_iou
        (found,) = small.detect(small.from_raw_maps(crowd(), (64, 96)))
        assert len(found) == num


@pytest.mark.parametrize("loss", ["paper", "darknet"])
def test_points_lines_and_500_boxes_give_finite_gradients(small: YOLOv4, loss: str) -> None:
    small.loss = loss  # type: ignore[assignment]
    many = [(n % 20 * 4.0, n // 20 * 2.0, n % 20 * 4.0 + 10, n // 20 * 2.0 + 8) for n in range(500)]
    targets = [target(*many, labels=[0] * 500), target((5, 5, 5, 5), (0, 9, 96, 9), labels=[1, 2])]
    parts = small.losses(small(torch.rand(2, 3, 64, 96)), targets)
    torch.stack(list(parts.values())).sum().backward()
    gradients: list[Tensor | None] = [value.grad for value in small.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
