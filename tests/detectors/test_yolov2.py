"""Against Darknet's own numbers where there are any (shared/refs), against arithmetic elsewhere."""

import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from onestage.detectors.yolov2 import YOLOv2
from onestage.types import XYXY, Target

Make = Callable[..., YOLOv2]
SIZES = [(416, 416), (320, 416)]  # width, height


@pytest.fixture(scope="module")
def tiny_weights(darknet_refs: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("weights") / "yolov2-tiny-voc.weights"
    darknet_refs.write("yolov2-tiny-voc", path)
    return path


@pytest.fixture
def tiny(make_detector: Make, tiny_weights: Path) -> YOLOv2:
    return make_detector("yolov2_tiny_voc", f"weights={tiny_weights}", "max_detections=1000").eval()


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_forward_equals_darknet(tiny: YOLOv2, darknet_refs: ModuleType, shared: Path, width: int, height: int) -> None:
    expected = np.load(shared / "refs" / "fwd" / "yolov2-tiny-voc.npz")[f"{width}x{height}/L15/raw"]
    with torch.no_grad():
        (raw,) = tiny.raw_maps(torch.from_numpy(darknet_refs.image("yolov2-tiny-voc", width, height))[None])
    found = raw.numpy().reshape(-1)[darknet_refs.sample_idx((77, 15), raw.numel())]
    assert abs(found - expected).max() <= 1e-4 * abs(expected).max()


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("when", ["before_nms", "after_nms"])
def test_detections_equal_darknets(
    tiny: YOLOv2, assert_detections_are_darknets: Callable[..., None], width: int, height: int, when: str
) -> None:
    assert_detections_are_darknets(tiny, "yolov2-tiny-voc", width, height, when)


# The loss, by hand: two priors of 1x1 and 2x2 cells, three classes, an input of 2x3 cells


@pytest.fixture
def small(make_detector: Make) -> YOLOv2:
    priors = "priors=[[1.0,1.0],[2.0,2.0]]"
    return make_detector("yolov2_tiny_voc", "width=0.125", "num_classes=3", "input_size=[64,96]", priors)


def target(*boxes: tuple[float, float, float, float], labels: list[int]) -> Target:
    return Target(XYXY(torch.tensor(boxes).view(-1, 4)), torch.tensor(labels, dtype=torch.int64), 0)


def losses(detector: YOLOv2, *targets: Target, objectness: float = 0.0) -> dict[str, float]:
    """On maps of zeros: centres in the middle of cells, sizes of the priors, equal classes."""
    maps = torch.zeros(len(targets), 2, 8, 2, 3)
    maps[:, :, 4] = objectness
    output = detector.from_raw_maps([maps.flatten(1, 2)], (64, 96))
    return {name: float(part) for name, part in detector.losses(output, targets).items()}


# The truth in cell (1, 0), a quarter of a cell right of its middle and of the size of prior 0: 32 pixels.
BOX = (32 + 8.0, 0.0, 64 + 8.0, 32.0)
IOU = 24 / 40  # with the prediction there, 8 px to the left


def test_the_authors_loss_by_hand(small: YOLOv2) -> None:
    small.seen.fill_(12_800)
    found = losses(small, target(BOX, labels=[1]))
    log2 = math.log(2)
    entropy = -0.5 * math.log(0.5) - 0.5 * math.log(0.5)  # of a half with any target
    assert found["box"] == pytest.approx((2 - 32 * 32 / (64 * 96)) * 2 * entropy, rel=1e-5)
    assert found["class"] == pytest.approx(math.log(3), rel=1e-5)
    assert found["objectness"] == pytest.approx(5 * entropy + 11 * log2, rel=1e-5)  # 12 predictions, none is ignored
    assert found["prior"] == 0


def test_alexeyabs_loss_by_hand(small: YOLOv2) -> None:
    small.loss = "darknet"
    small.seen.fill_(12_800)
    found = losses(small, target(BOX, labels=[1]))
    assert found["box"] == pytest.approx(0.5 * 0.25**2, rel=1e-5)
    assert found["class"] == pytest.approx(math.log(3), rel=1e-5)
    assert found["objectness"] == pytest.approx(5 * 0.5 * (0.5 - IOU) ** 2 + 11 * 0.5 * 0.5**2, rel=1e-5)


@pytest.mark.parametrize(("seen", "weight"), [(0, 0.01), (12_799, 0.01), (12_800, 0.0)])
def test_young_boxes_are_drawn_to_their_priors(small: YOLOv2, seen: int, weight: float) -> None:
    """region_layer.c: towards the cell's middle and the prior's size, for predictions that answer for no truth."""
    small.loss = "darknet"
    small.seen.fill_(seen)
    maps = torch.zeros(1, 2, 8, 2, 3)
    maps[:, :, 0] = math.log(3)  # sigmoid 3/4, a quarter off
    maps[:, :, 2] = 0.2
    parts = small.losses(small.from_raw_maps([maps.flatten(1, 2)], (64, 96)), [target(BOX, labels=[1])])
    assert float(parts["prior"]) == pytest.approx(weight * 11 * 0.5 * (0.25**2 + 0.2**2), rel=1e-5)


def test_predictions_that_overlap_a_truth_are_not_held_to_be_background(small: YOLOv2) -> None:
    small.seen.fill_(12_800)
    small.ignore_iou = 0.0  # then everything that touches it: of prior 0 its own and two, of prior 1 all six
    found = losses(small, target(BOX, labels=[1]))
    touching = 1 + 1 + 6  # prior 0 in cell (2, 0) and its own; the 64-pixel boxes reach everywhere
    assert found["objectness"] == pytest.approx((5 + 12 - touching) * math.log(2), rel=1e-5)


def test_of_two_truths_in_one_place_the_last_counts(small: YOLOv2) -> None:
    other = (32 + 4.0, 0.0, 64 + 4.0, 32.0)
    both = losses(small, target(other, BOX, labels=[2, 1]))
    last = losses(small, target(BOX, labels=[1]))
    assert both == pytest.approx(last, rel=1e-5)


def test_parts_are_means_over_the_images(small: YOLOv2) -> None:
    one = losses(small, target(BOX, labels=[1]))
    assert losses(small, *[target(BOX, labels=[1])] * 3) == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("loss", ["paper", "darknet"])
def test_points_lines_and_500_boxes_give_finite_gradients(small: YOLOv2, loss: str) -> None:
    small.loss = loss  # type: ignore[assignment]
    many = [(n % 20 * 4.0, n // 20 * 2.0, n % 20 * 4.0 + 10, n // 20 * 2.0 + 8) for n in range(500)]
    targets = [target(*many, labels=[0] * 500), target((5, 5, 5, 5), (0, 9, 96, 9), labels=[1, 2])]
    parts = small.losses(small(torch.rand(2, 3, 64, 96)), targets)
    torch.stack(list(parts.values())).sum().backward()
    gradients: list[Tensor | None] = [value.grad for value in small.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
