"""Against Darknet's own numbers where there are any (shared/refs), against arithmetic and properties elsewhere."""

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from onestage.detectors.yolov3 import YOLOv3
from onestage.errors import InputError
from onestage.types import XYXY, Target
from onestage.weights import darknet

Make = Callable[..., YOLOv3]
SIZES = [(416, 416), (320, 416)]  # width, height
DETECTION_LAYERS = (82, 94, 106)  # of yolov3.cfg, with 13, 26 and 52 cells a side
CELLS = (13, 26, 52)


def target(*boxes: tuple[float, float, float, float], labels: list[int] | None = None, image_id: int = 0) -> Target:
    values = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    return Target(XYXY(values), torch.tensor(labels or [0] * len(boxes), dtype=torch.int64), image_id)


@pytest.fixture
def small(make_detector: Make) -> YOLOv3:
    """Three classes, an input of 64x96."""
    return make_detector("yolov3_tiny", "width=0.125", "num_classes=3", "input_size=[64,96]")


# Darknet's numbers: yolov3-tiny, forward and detections


@pytest.fixture
def tiny(make_detector: Make, tiny_weights: Path) -> YOLOv3:
    return make_detector("yolov3_tiny", f"weights={tiny_weights}", "max_detections=1000").eval()


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_forward_equals_darknet(tiny: YOLOv3, darknet_refs: ModuleType, shared: Path, width: int, height: int) -> None:
    reference = np.load(shared / "refs" / "fwd" / "yolov3-tiny.npz")
    image = torch.from_numpy(darknet_refs.image("yolov3-tiny", width, height))[None]
    with torch.no_grad():
        maps = tiny.raw_maps(image)
    for raw, layer in zip(maps, (16, 23), strict=True):
        expected = reference[f"{width}x{height}/L{layer}/raw"]
        found = raw.numpy().reshape(-1)[darknet_refs.sample_idx((77, layer), raw.numel())]
        assert abs(found - expected).max() <= 1e-4 * abs(expected).max()


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("when", ["before_nms", "after_nms"])
def test_detections_equal_darknets(
    tiny: YOLOv3, assert_detections_are_darknets: Callable[..., None], width: int, height: int, when: str
) -> None:
    assert_detections_are_darknets(tiny, "yolov3-tiny", width, height, when)


# Darknet's numbers: the loss of yolov3 on given heads and truths


def deltas(make: Make, refs: ModuleType, folder: Path, *, loss: str, fork: str) -> dict[int, tuple[Tensor, float]]:
    """Minus the gradient with respect to each head map, and the sum of squares that ``fork`` reports for it."""
    reference = json.loads((folder / "yolov3.json").read_text())
    detector = make("yolov3", "width=0.125", f"loss={loss}")
    maps = []
    for layer, side in zip(DETECTION_LAYERS, CELLS, strict=True):
        low, high = reference["runs"][f"{fork}/L{layer}/seen100000"]["head_lo_hi"]
        head = refs.head((zlib.crc32(b"yolov3"), 2000 + layer), 255, side, side, low, high)
        maps.append(torch.from_numpy(head)[None].requires_grad_())
    truths = torch.tensor(reference["truth_xywhc"])
    centres, half = truths[:, :2] * 416, truths[:, 2:4] * 208
    boxes = XYXY(torch.cat((centres - half, centres + half), dim=1))
    parts = detector.losses(detector.from_raw_maps(maps, (416, 416)), [Target(boxes, truths[:, 4].long(), 0)])
    torch.stack(list(parts.values())).sum().backward()
    sums = [reference["runs"][f"{fork}/L{layer}/seen100000"]["delta_sumsq"] for layer in DETECTION_LAYERS]
    return {layer: (-raw.grad, value) for layer, raw, value in zip(DETECTION_LAYERS, maps, sums, strict=True)}


def assert_samples_equal(delta: Tensor, expected: np.ndarray, refs: ModuleType, layer: int) -> None:
    found = delta.numpy().reshape(-1)[refs.sample_idx((78, layer), delta.numel())]
    assert abs(found - expected).max() <= 2e-5


def test_loss_darknet_is_alexeyabs(make_detector: Make, darknet_refs: ModuleType, shared: Path) -> None:
    folder = shared / "refs" / "loss"
    reference = np.load(folder / "yolov3.npz")
    found = deltas(make_detector, darknet_refs, folder, loss="darknet", fork="alexeyab")
    for layer, (delta, sum_of_squares) in found.items():
        assert_samples_equal(delta, reference[f"alexeyab/L{layer}/seen100000/sample"], darknet_refs, layer)
        assert float(delta.double().square().sum()) == pytest.approx(sum_of_squares, rel=1e-4)


def test_loss_paper_is_the_authors(make_detector: Make, darknet_refs: ModuleType, shared: Path) -> None:
    folder = shared / "refs" / "loss"
    reference = np.load(folder / "yolov3.npz")
    found = deltas(make_detector, darknet_refs, folder, loss="paper", fork="pjreddie")
    for layer in (82, 106):
        delta, sum_of_squares = found[layer]
        assert_samples_equal(delta, reference[f"pjreddie/L{layer}/seen100000/sample"], darknet_refs, layer)
        assert float(delta.double().square().sum()) == pytest.approx(sum_of_squares, rel=1e-4)


def test_loss_paper_adds_up_where_the_authors_overwrite(
    make_detector: Make, darknet_refs: ModuleType, shared: Path
) -> None:
    """Truths 0 and 3 share a place on layer 94: 26 cells, so (0.31, 0.42) is column 8, row 10; prior (59, 119)."""
    folder = shared / "refs" / "loss"
    reference = np.load(folder / "yolov3.npz")
    delta, _ = deltas(make_detector, darknet_refs, folder, loss="paper", fork="pjreddie")[94]
    found = delta.numpy().reshape(3, 85, 26, 26)
    authors = np.zeros_like(found)
    authors.reshape(-1)[reference["pjreddie/L94/seen100000/nz_idx"]] = reference["pjreddie/L94/seen100000/nz_val"]
    differ = np.argwhere(abs(found - authors)[:, [0, 1, 2, 3, *range(5, 85)]] > 2e-5)
    assert {(anchor, row, column) for anchor, _, row, column in differ} == {(2, 10, 8)}
    assert {channel for _, channel, _, _ in differ} == {0, 1, 2, 3}


# The loss, by its properties


def losses_of(detector: YOLOv3, images: Tensor, targets: list[Target]) -> dict[str, Tensor]:
    return detector.losses(detector(images), targets)


MANY = [(n % 20 * 4.0, n // 20 * 2.0, n % 20 * 4.0 + 10, n // 20 * 2.0 + 8) for n in range(500)]
BATCHES = {
    "no boxes at all": [target(), target()],
    "one image without": [target((5, 5, 40, 40), (50, 10, 60, 60)), target()],
    "500 boxes": [target(*MANY), target(*MANY[::-1])],
    "mixed": [target(*MANY), target((5, 5, 40, 40), labels=[2])],
    "points and lines": [target((5, 5, 5, 5)), target((0, 9, 96, 9), (0, 0, 96, 64))],
}


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("loss", ["paper", "darknet"])
def test_any_number_of_boxes_gives_finite_losses_and_gradients(small: YOLOv3, name: str, loss: str) -> None:
    small.loss = loss  # type: ignore[assignment]
    parts = losses_of(small, torch.rand(2, 3, 64, 96), BATCHES[name])
    assert set(parts) == {"box", "objectness", "class"}
    assert all(part.shape == () and part.isfinite() for part in parts.values())
    torch.stack(list(parts.values())).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in small.parameters())  # type: ignore[union-attr]
    assert parts["objectness"] > 0
    has_boxes = name != "no boxes at all"
    assert (bool(parts["box"] > 0), bool(parts["class"] > 0)) == (has_boxes, has_boxes)


def test_an_empty_list_of_labels_is_as_good_as_none(small: YOLOv3) -> None:
    empty = Target(XYXY(torch.zeros(0, 4)), torch.tensor([]), 0)  # torch makes that float32
    parts = losses_of(small, torch.rand(1, 3, 64, 96), [empty])
    assert float(parts["box"].detach()) == float(parts["class"].detach()) == 0


def zero_maps(sides: tuple[tuple[int, int], ...] = ((2, 3), (4, 6))) -> list[Tensor]:
    """Head maps of the small detector on which every probability is a half and every size its prior."""
    return [torch.zeros(1, 3 * 8, height, width) for height, width in sides]


def test_the_loss_of_one_box_by_hand(small: YOLOv3) -> None:
    # A truth of the shape of prior (81, 82), so of no loss in size, centred half-way along the top of cell (1, 1).
    box = (48 - 40.5, 32 - 41, 48 + 40.5, 32 + 41)
    parts = small.losses(small.from_raw_maps(zero_maps(), (64, 96)), [target(box, labels=[1])])
    log2 = float(np.log(2))  # the cross-entropy of a half with anything
    # No prediction is ignored: the nearest with that prior are 16 px off, an IoU of (82 - 16) / (82 + 16) = 0.67.
    assert float(parts["objectness"]) == pytest.approx(3 * (2 * 3 + 4 * 6) * log2, rel=1e-5)
    assert float(parts["class"]) == pytest.approx(3 * log2, rel=1e-5)
    assert float(parts["box"]) == pytest.approx((2 - 81 * 82 / (64 * 96)) * 2 * log2, rel=1e-5)


def test_predictions_that_overlap_a_truth_are_not_held_to_be_background(small: YOLOv3) -> None:
    # Cell (0, 1) answers for the truth; the prediction of cell (1, 1) with the same prior (81, 82) lies 17 px off, an
    # IoU of (82 - 17) / (82 + 17) = 0.66.
    small.ignore_iou = 0.6
    box = (48 - 40.5, 31 - 41, 48 + 40.5, 31 + 41)
    parts = small.losses(small.from_raw_maps(zero_maps(), (64, 96)), [target(box)])
    assert float(parts["objectness"]) == pytest.approx((3 * (2 * 3 + 4 * 6) - 1) * float(np.log(2)), rel=1e-5)


@pytest.mark.parametrize(
    ("loss", "score", "num_ignored"), [("paper", 0.24, 1), ("darknet", 0.24, 0), ("darknet", 0.26, 1)]
)
def test_loss_darknet_ignores_only_predictions_with_some_class_above_a_quarter(
    small: YOLOv3, loss: str, score: float, num_ignored: int
) -> None:
    """yolo_layer.c:440, which the references do not reach. The truth is the one above."""
    small.loss, small.ignore_iou = loss, 0.6  # type: ignore[assignment]
    maps = zero_maps()
    for raw in maps:
        raw.unflatten(1, (3, 8))[:, :, 5:] = -20.0
        raw.unflatten(1, (3, 8))[:, :, 6] = float(np.log(score / (1 - score)))
    box = (48 - 40.5, 31 - 41, 48 + 40.5, 31 + 41)
    parts = small.losses(small.from_raw_maps(maps, (64, 96)), [target(box)])
    assert float(parts["objectness"]) == pytest.approx((90 - num_ignored) * float(np.log(2)), rel=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_focal_loss_weighs_entropy_by_how_wrong_it_is(small: YOLOv3, gamma: float) -> None:
    """RetinaNet's eq. 4: (1 - p)^gamma times -log p; on maps of a half everything is half wrong."""
    small.focal_gamma = gamma
    parts = small.losses(small.from_raw_maps(zero_maps(), (64, 96)), [target((48 - 40.5, 32 - 41, 48 + 40.5, 32 + 41))])
    assert float(parts["objectness"]) == pytest.approx(90 * 0.5**gamma * float(np.log(2)), rel=1e-5)
    assert float(parts["class"]) == pytest.approx(3 * 0.5**gamma * float(np.log(2)), rel=1e-5)


def test_loss_parts_do_not_depend_on_the_batch_size(small: YOLOv3) -> None:
    images, targets = torch.rand(2, 3, 64, 96), BATCHES["one image without"]
    small.eval()
    with torch.no_grad():
        once = losses_of(small, images, targets)
        twice = losses_of(small, images.repeat(2, 1, 1, 1), targets * 2)
    for name, part in once.items():
        assert float(twice[name]) == pytest.approx(float(part), rel=1e-5)


def test_losses_do_not_mind_the_order_of_the_boxes(small: YOLOv3) -> None:
    small.eval()
    output = small(torch.rand(1, 3, 64, 96))
    forth, back = small.losses(output, [target(*MANY)]), small.losses(output, [target(*MANY[::-1])])
    for name, part in forth.items():
        assert float(back[name].detach()) == pytest.approx(float(part.detach()), rel=1e-5)


# What is refused


@pytest.mark.parametrize(("height", "width"), [(64, 100), (60, 96), (0, 96), (31, 31)])
def test_a_size_that_is_no_multiple_is_refused_with_the_multiple(small: YOLOv3, height: int, width: int) -> None:
    with pytest.raises(InputError) as error:
        small(torch.rand(1, 3, height, width))
    assert str(error.value) == (
        f"YOLOv3 takes inputs whose height and width are multiples of 32, got {height}x{width}: set detector.input_size"
    )


def test_an_input_size_that_is_no_multiple_is_refused_at_birth(make_detector: Make) -> None:
    with pytest.raises(InputError, match=r"multiples of 32, got 60x96: set detector.input_size"):
        make_detector("yolov3_tiny", "input_size=[60,96]")


@pytest.mark.parametrize("shape", [(1, 1, 64, 96), (1, 4, 64, 96), (3, 64, 96)])
def test_other_than_rgb_batches_are_refused_with_their_shape(small: YOLOv3, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError) as error:
        small(torch.rand(shape))
    assert str(error.value) == f"YOLOv3 takes RGB images of shape (B, 3, H, W), got {shape}"


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_out_of_range_is_refused_with_image_and_range(small: YOLOv3, label: int) -> None:
    targets = [target(), target((1, 1, 9, 9), (5, 5, 9, 9), labels=[0, label], image_id=17)]
    with pytest.raises(InputError, match=rf"image 17 has label {label}, outside 0 to 2: detector.num_classes is 3"):
        losses_of(small, torch.rand(2, 3, 64, 96), targets)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_box_that_is_not_finite_is_refused_with_its_image(small: YOLOv3, value: float) -> None:
    targets = [target((1, 1, 9, 9)), target((1, 1, 9, value), image_id=23)]
    with pytest.raises(InputError, match=rf"image 23 has a box that is not finite: \[1.0, 1.0, 9.0, {value}\]"):
        losses_of(small, torch.rand(2, 3, 64, 96), targets)


def test_priors_for_another_number_of_levels_are_refused(make_detector: Make) -> None:
    with pytest.raises(InputError, match=r"^detector.masks names 1 levels, the neck has 2$"):
        make_detector("yolov3_tiny", "masks=[[0,1,2]]")


def test_masks_of_priors_that_are_not_there_are_refused(make_detector: Make) -> None:
    with pytest.raises(
        InputError, match=r"^detector.masks names priors \[\[0, 1, 2\], \[3, 4, 6\]\], detector.priors has 6$"
    ):
        make_detector("yolov3_tiny", "masks=[[0,1,2],[3,4,6]]")


# What it is at birth, and how its pieces go together


def statistics(detector: YOLOv3) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in detector.named_buffers() if "running" in name}


@pytest.mark.parametrize("frozen", [True, False])
def test_freeze_norm_keeps_the_statistics_in_training(make_detector: Make, frozen: bool) -> None:
    detector = make_detector("yolov3_tiny", "width=0.125", f"freeze_norm={frozen}").train()
    before = statistics(detector)
    detector(torch.rand(2, 3, 64, 64))
    after = statistics(detector)
    assert len(before) == 2 * 11  # mean and variance of yolov3-tiny's normalised convolutions
    assert all(torch.equal(after[name], value) == frozen for name, value in before.items())


def test_freeze_norm_still_trains_scale_and_bias(make_detector: Make) -> None:
    detector = make_detector("yolov3_tiny", "width=0.125", "num_classes=3", "freeze_norm=true").train()
    parts = losses_of(detector, torch.rand(1, 3, 64, 64), [target((5, 5, 40, 40))])
    torch.stack(list(parts.values())).sum().backward()
    assert all(parameter.grad is not None for parameter in detector.parameters())


def test_no_image_was_seen_at_birth(small: YOLOv3) -> None:
    assert small.seen.dtype == torch.int64
    assert int(small.seen) == 0
    assert "seen" in small.state_dict()


def test_objectness_is_born_at_its_prior(make_detector: Make) -> None:
    detector = make_detector("yolov3_tiny", "width=0.125", "objectness_prior=0.02").eval()
    with torch.no_grad():
        levels = detector(torch.zeros(1, 3, 64, 64)).levels  # a black image leaves little but the biases
    for level in levels:
        assert level[..., 4].sigmoid().mean().item() == pytest.approx(0.02, rel=0.1)


def test_raw_maps_come_coarsest_first(make_detector: Make) -> None:
    detector = make_detector("yolov3", "width=0.125", "num_classes=3").eval()
    with torch.no_grad():
        maps = detector.raw_maps(torch.rand(2, 3, 64, 96))
    assert [tuple(raw.shape) for raw in maps] == [(2, 24, 2, 3), (2, 24, 4, 6), (2, 24, 8, 12)]


def test_forward_is_raw_maps_then_the_rest(small: YOLOv3) -> None:
    images = torch.rand(2, 3, 64, 96)
    small.eval()
    with torch.no_grad():
        whole, halves = small(images), small.from_raw_maps(small.raw_maps(images), (64, 96))
    assert whole.size == halves.size == (64, 96)
    assert torch.equal(whole.boxes, halves.boxes)
    assert all(torch.equal(a, b) for a, b in zip(whole.levels, halves.levels, strict=True))


def test_boxes_are_decoded_as_in_figure_2(small: YOLOv3) -> None:
    maps = zero_maps()
    at = maps[1].view(1, 3, 8, 4, 6)[0, 2, :4, 1, 5]  # prior (37, 58), row 1, column 5 of the map with stride 16
    at[:] = torch.tensor([np.log(3), 0.0, np.log(2), np.log(0.5)])
    boxes = small.from_raw_maps(maps, (64, 96)).boxes[0]
    # centre ((5 + 3/4) * 16, (1 + 1/2) * 16) = (92, 24), size (74, 29)
    found = boxes[3 * 2 * 3 + 2 * 4 * 6 + 1 * 6 + 5]
    assert found.tolist() == pytest.approx([92 - 37, 24 - 14.5, 92 + 37, 24 + 14.5], rel=1e-5)


def test_a_score_is_objectness_times_class(small: YOLOv3) -> None:
    maps = [torch.full((1, 24, 2, 3), -20.0), torch.full((1, 24, 4, 6), -20.0)]
    one = maps[0].view(1, 3, 8, 2, 3)[0, 0, :, 1, 1]
    one[:] = torch.tensor([0.0, 0.0, 0.0, 0.0, np.log(3), -20.0, np.log(4), -20.0])  # object 3/4, class 1 4/5
    (found,) = small.detect(small.from_raw_maps(maps, (64, 96)))
    assert found.labels.tolist() == [1]
    assert found.scores.tolist() == pytest.approx([0.6], rel=1e-5)
    assert found.boxes.tolist() == [[pytest.approx(48 - 40.5), pytest.approx(48 - 41), pytest.approx(48 + 40.5), 64]]


def test_weights_named_in_the_config_are_loaded(make_detector: Make, tmp_path: Path) -> None:
    first = make_detector("yolov3_tiny", "width=0.125", "num_classes=3")
    first.seen.fill_(77)
    with torch.no_grad():
        first.head.out[0].bias.add_(1)  # type: ignore[index,union-attr]
    darknet.save(first, tmp_path / "first.weights")
    second: Any = make_detector("yolov3_tiny", "width=0.125", "num_classes=3", f"weights={tmp_path}/first.weights")
    assert int(second.seen) == 77
    assert torch.equal(second.head.out[0].bias, first.head.out[0].bias)  # type: ignore[index,union-attr]
