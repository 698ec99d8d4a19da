"""Against Darknet's detection layer written out in loops, and the interpreter in tests/references."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from onestage.detectors.yolov1 import YOLOv1
from onestage.errors import InputError
from onestage.types import XYXY, Target
from onestage.weights import darknet

Make = Callable[..., YOLOv1]
NAMES = ("yolov1", "yolov1_darknet", "yolov1_tiny")
SMALL = ("width=0.125", "num_classes=3", "input_size=[128,192]")  # 2x3 cells


def target(*boxes: tuple[float, float, float, float], labels: list[int] | None = None, image_id: int = 0) -> Target:
    values = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    return Target(XYXY(values), torch.tensor(labels or [0] * len(boxes), dtype=torch.int64), image_id)


@pytest.fixture
def small(make_detector: Make) -> YOLOv1:
    """Three classes, 2x3 cells of two boxes: 78 values."""
    return make_detector("yolov1_tiny", *SMALL)


# Darknet's detection layer, in loops


def overlap(a: list[float], b: list[float]) -> float:
    """IoU of boxes by centre and size."""
    shared = 1.0
    for axis in (0, 1):
        low = max(a[axis] - a[axis + 2] / 2, b[axis] - b[axis + 2] / 2)
        high = min(a[axis] + a[axis + 2] / 2, b[axis] + b[axis + 2] / 2)
        shared *= max(high - low, 0)
    return shared / (a[2] * a[3] + b[2] * b[3] - shared) if shared else 0.0


def delta_of(
    raw: np.ndarray, boxes: list[list[float]], labels: list[int], grid: tuple[int, int], k: int, p: int
) -> Any:
    """Darknet's delta for values ``raw`` and truths as centre and size relative to the input."""
    rows, columns = grid
    truth_at: dict[int, tuple[list[float], int]] = {}
    for box, label in zip(boxes, labels, strict=True):
        place = min(int(box[1] * rows), rows - 1) * columns + min(int(box[0] * columns), columns - 1)
        truth_at.setdefault(place, (box, label))
    num, delta = rows * columns, np.zeros_like(raw)
    for cell in range(num):
        objectness = [num * k + cell * p + j for j in range(p)]
        for at in objectness:
            delta[at] = 0.5 * (0 - raw[at])
        if cell not in truth_at:
            continue
        box, label = truth_at[cell]
        for c in range(k):
            delta[cell * k + c] = (c == label) - raw[cell * k + c]
        row, column = divmod(cell, columns)
        best, best_iou, best_error = -1, 0.0, math.inf
        for j in range(p):
            x, y, w, h = raw[num * (k + p) + (cell * p + j) * 4 :][:4]
            found = [(column + x) / columns, (row + y) / rows, w * w, h * h]
            iou, error = overlap(found, box), sum((a - b) ** 2 for a, b in zip(found, box, strict=True))
            if best_iou > 0 or iou > 0:
                if iou > best_iou:
                    best, best_iou = j, iou
            elif error < best_error:
                best, best_error = j, error
        delta[objectness[best]] = best_iou - raw[objectness[best]]
        at = num * (k + p) + (cell * p + best) * 4
        wanted = [box[0] * columns - column, box[1] * rows - row, math.sqrt(box[2]), math.sqrt(box[3])]
        delta[at : at + 4] = 5 * (wanted - raw[at : at + 4])
    return delta


RELATIVE = [
    [0.31, 0.42, 0.3, 0.2],
    [0.30, 0.40, 0.6, 0.5],  # in the cell of the first
    [0.95, 0.5, 0.1, 0.9],  # touches the right border
    [0.5, 0.97, 0.2, 0.06],  # touches the bottom
    [0.64, 0.13, 1e-3, 1e-3],  # smaller than what most predictions overlap
    [0.02, 0.02, 0.04, 0.04],  # touches the corner
    [0.8, 0.2, 0.3, 0.4],
]
LABELS = [0, 1, 2, 2, 1, 0, 2]


@pytest.mark.parametrize(("name", "size", "p"), [("yolov1_tiny", (448, 448), 2), ("yolov1_darknet", (128, 192), 3)])
@pytest.mark.parametrize(("low", "high"), [(-0.5, 1.0), (0.0, 0.1), (-2.0, 3.0)])
def test_loss_darknets_gradient_is_minus_darknets_delta(
    make_detector: Make, name: str, size: tuple[int, int], p: int, low: float, high: float
) -> None:
    height, width = size
    detector = make_detector(name, "width=0.125", "num_classes=3", f"input_size=[{height},{width}]", "loss=darknet")
    grid = (height // 64, width // 64)
    num = grid[0] * grid[1] * (3 + 5 * p)
    raw = np.random.default_rng(0).uniform(low, high, num).astype(np.float32)
    expected = delta_of(raw.astype(np.float64), RELATIVE, LABELS, grid, 3, p)
    boxes = torch.tensor(RELATIVE, dtype=torch.float64) * torch.tensor([width, height, width, height])
    corners = torch.cat((boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2), dim=1).float()
    maps = torch.from_numpy(raw)[None].requires_grad_()
    parts = detector.losses(detector.from_raw_maps([maps], size), [Target(XYXY(corners), torch.tensor(LABELS), 0)])
    torch.stack(list(parts.values())).sum().backward()
    assert maps.grad is not None
    assert abs(-maps.grad[0].numpy() - expected).max() <= 5e-5


def test_some_of_these_truths_overlap_no_prediction_and_some_do() -> None:
    """Or the test above would not reach both ways to choose a box."""
    raw = np.random.default_rng(0).uniform(0.0, 0.1, 49 * 13)
    delta = delta_of(raw, RELATIVE, LABELS, (7, 7), 3, 2)
    objectness = slice(49 * 3, 49 * 5)
    answers = delta[49 * 5 :].reshape(98, 4).any(axis=1)
    targets = (delta + raw)[objectness][answers]
    assert answers.sum() == 6  # two of the seven truths share a cell
    assert (abs(targets) < 1e-12).any() and (targets > 1e-6).any()


@pytest.mark.parametrize("name", ["yolov1-tiny", "yolov1"])
@pytest.mark.slow
def test_the_network_equals_darknets(reference: Any, make_detector: Make, tmp_path: Path, name: str) -> None:
    """Forward and detections of a full-size file that the code under test has not written."""
    net, own = reference.nets.net(name), {"yolov1": "yolov1_darknet", "yolov1-tiny": "yolov1_tiny"}[name]
    parameters, image = reference.darknet.draw(net), reference.darknet.noise(448, 448)
    reference.darknet.write(tmp_path / "net.weights", net, parameters)
    maps = reference.darknet.forward(net, parameters, image)
    del parameters
    options = ("max_detections=5000", "score_threshold=0.05")
    detector = make_detector(own, f"weights={tmp_path}/net.weights", *options).eval()
    with torch.no_grad():
        (raw,) = detector.raw_maps(torch.from_numpy(image)[None])
    (expected,) = (values.reshape(-1) for values in maps.values())
    assert abs(raw[0].numpy() - expected).max() <= 1e-4 * abs(expected).max()
    assert int(detector.seen) == 32_013_312

    (found,) = detector.detect(detector.from_raw_maps([torch.from_numpy(expected)[None]], (448, 448)))
    theirs = reference.darknet.detect(net, maps, (448, 448), threshold=0.05, nms_iou=0.5)
    assert len(found) == len(theirs) > 0
    boxes = torch.tensor([one.box for one in theirs])
    corners = (torch.cat((boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2), dim=1) * 448).clamp(0, 448)
    scores = torch.tensor([one.score for one in theirs]).clamp(max=1)
    labels = torch.tensor([one.label for one in theirs])
    rows = torch.column_stack((found.boxes / 448, found.scores, found.labels))
    same = (rows[:, None] - torch.column_stack((corners / 448, scores, labels))).abs().amax(dim=2) <= 1e-4
    assert same.any(dim=0).all() and same.any(dim=1).all()


# The loss, by its properties


def losses_of(detector: YOLOv1, images: Tensor, targets: list[Target]) -> dict[str, Tensor]:
    return detector.losses(detector(images), targets)


MANY = [(n % 20 * 9.0, n // 20 * 5.0, n % 20 * 9.0 + 10, n // 20 * 5.0 + 8) for n in range(500)]
BATCHES = {
    "no boxes at all": [target(), target()],
    "one image without": [target((5, 5, 40, 40), (70, 10, 90, 60)), target()],
    "500 boxes": [target(*MANY), target(*MANY[::-1])],
    "mixed": [target(*MANY), target((5, 5, 40, 40), labels=[2])],
    "points and lines": [target((5, 5, 5, 5)), target((0, 9, 192, 9), (0, 0, 192, 128), (9, 9, 3, 3))],
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("loss", ["paper", "darknet"])
def test_any_number_of_boxes_gives_finite_losses_and_gradients(small: YOLOv1, batch: str, loss: str) -> None:
    small.loss = loss  # type: ignore[assignment]
    parts = losses_of(small, torch.rand(2, 3, 128, 192), BATCHES[batch])
    assert set(parts) == {"box", "objectness", "class"}
    assert all(part.shape == () and part.isfinite() for part in parts.values())
    torch.stack(list(parts.values())).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in small.parameters())  # type: ignore[union-attr]
    assert parts["objectness"] > 0
    has_boxes = batch != "no boxes at all"
    assert (bool(parts["box"] > 0), bool(parts["class"] > 0)) == (has_boxes, has_boxes)


def test_the_loss_of_one_box_by_hand(small: YOLOv1) -> None:
    """Eq. 3. Cell (0, 1), the second; its second box has the truth's centre and height, and half its width."""
    raw = torch.zeros(1, 78)
    raw[0, 3:6] = torch.tensor([0.1, 0.7, 0.0])
    raw[0, 18:30] = 0.2
    raw[0, 30:].view(6, 2, 4)[1, 1] = torch.tensor([0.5, 0.25, math.sqrt(0.125), math.sqrt(0.5)])
    truth = (96 - 24, 16 - 32, 96 + 24, 16 + 32)  # a quarter of the width, half of the height
    parts = small.losses(small.from_raw_maps([raw], (128, 192)), [target(truth, labels=[1])])
    assert float(parts["box"]) == pytest.approx(5 * (math.sqrt(0.25) - math.sqrt(0.125)) ** 2, rel=1e-5)
    assert float(parts["objectness"]) == pytest.approx((0.5 - 0.2) ** 2 + 0.5 * 11 * 0.2**2, rel=1e-5)
    assert float(parts["class"]) == pytest.approx(0.1**2 + 0.3**2, rel=1e-5)


def test_loss_darknet_is_half_the_papers(small: YOLOv1) -> None:
    output, targets = small(torch.rand(2, 3, 128, 192)), BATCHES["mixed"]
    paper = small.losses(output, targets)
    small.loss = "darknet"
    for name, part in small.losses(output, targets).items():
        assert float(part.detach()) == pytest.approx(float(paper[name].detach()) / 2, rel=1e-6)


def test_loss_parts_do_not_depend_on_the_batch_size(small: YOLOv1) -> None:
    images, targets = torch.rand(2, 3, 128, 192), BATCHES["one image without"]
    small.eval()
    with torch.no_grad():
        once = losses_of(small, images, targets)
        twice = losses_of(small, images.repeat(2, 1, 1, 1), targets * 2)
    for name, part in once.items():
        assert float(twice[name]) == pytest.approx(float(part), rel=1e-5)


def test_the_first_listed_of_two_truths_in_one_cell_counts(small: YOLOv1) -> None:
    small.eval()
    output = small(torch.rand(1, 3, 128, 192))
    first, second = (10, 10, 40, 50), (5, 5, 60, 60)
    alone = small.losses(output, [target(first)])
    both = small.losses(output, [target(first, second, labels=[0, 2])])
    assert all(float(both[name].detach()) == float(part.detach()) for name, part in alone.items())


# Detections


def test_boxes_are_centres_in_their_cell_and_squared_sizes(small: YOLOv1) -> None:
    raw = torch.zeros(1, 78)
    raw[0, 30:].view(6, 2, 4)[5, 0] = torch.tensor([0.25, 0.5, 0.5, -0.25])
    output = small.from_raw_maps([raw], (128, 192))
    # centre ((2 + 1/4) * 64, (1 + 1/2) * 64) = (144, 96), size (192 / 4, 128 / 16) = (48, 8)
    assert output.boxes[0, 5, 0].tolist() == [144 - 24, 96 - 4, 144 + 24, 96 + 4]


def found_in(small: YOLOv1, *boxes: tuple[int, float, list[float], float]) -> list[tuple[int, float]]:
    """Labels and scores for (cell, objectness, classes, x) of first boxes as large as a sixteenth of the input."""
    raw = torch.zeros(1, 78)
    for cell, objectness, classes, x in boxes:
        raw[0, 3 * cell : 3 * cell + 3] = torch.tensor(classes)
        raw[0, 18 + 2 * cell] = objectness
        raw[0, 30:].view(6, 2, 4)[cell, 0] = torch.tensor([x, 0.5, 0.5, 0.5])
    (found,) = small.detect(small.from_raw_maps([raw], (128, 192)))
    return list(zip(found.labels.tolist(), [round(score, 4) for score in found.scores.tolist()], strict=True))


def test_a_score_is_objectness_times_class(small: YOLOv1) -> None:
    assert found_in(small, (0, 0.5, [0.0, 0.8, 0.1], 0.5), (4, 0.9, [0.7, 0.0, 0.0], 0.5)) == [
        (0, 0.63), (1, 0.4), (2, 0.05)
    ]  # fmt: skip


def test_scores_are_kept_within_0_and_1_in_the_order_that_they_had(small: YOLOv1) -> None:
    """The second box overlaps the first by more than half, and had 1.4 to 1.2."""
    boxes = ((0, 1.2, [1.0, 0.0, 0.0], 0.95), (1, 1.4, [1.0, -0.5, 0.0], 0.05))
    assert found_in(small, *boxes) == [(0, 1.0)]
    small.nms_iou = 1.0
    assert found_in(small, *boxes) == [(0, 1.0), (0, 1.0)]


def test_boxes_are_clipped_to_the_input(small: YOLOv1) -> None:
    raw = torch.zeros(1, 78)
    raw[0, 0], raw[0, 18] = 1.0, 1.0
    raw[0, 30:34] = torch.tensor([0.5, 0.5, 2.0, 0.5])
    (found,) = small.detect(small.from_raw_maps([raw], (128, 192)))
    assert found.boxes.tolist() == [[0, 16, 192, 48]]


# What is refused


@pytest.mark.parametrize(("height", "width"), [(192, 128), (128, 256), (448, 448), (100, 192)])
def test_another_size_than_its_own_is_refused_with_both(small: YOLOv1, height: int, width: int) -> None:
    with pytest.raises(InputError) as error:
        small(torch.rand(1, 3, height, width))
    assert str(error.value) == (
        f"YOLOv1 has connected layers for inputs of 128x192 alone, got {height}x{width}: set detector.input_size"
    )


@pytest.mark.parametrize(("height", "width"), [(416, 448), (448, 100), (0, 64)])
def test_an_input_size_that_is_no_multiple_is_refused_at_birth(make_detector: Make, height: int, width: int) -> None:
    with pytest.raises(InputError, match=rf"multiples of 64, got {height}x{width}: set detector.input_size"):
        make_detector("yolov1_tiny", f"input_size=[{height},{width}]")


def test_no_boxes_a_cell_are_refused(make_detector: Make) -> None:
    with pytest.raises(InputError, match=r"detector.boxes_per_cell must be at least 1, got 0"):
        make_detector("yolov1_tiny", *SMALL, "boxes_per_cell=0")


# What it is at birth, and how its pieces go together


@pytest.mark.parametrize("name", NAMES)
def test_values_are_those_of_all_cells_in_one_row(make_detector: Make, name: str) -> None:
    detector = make_detector(name, *SMALL)
    maps = detector.raw_maps(torch.rand(2, 3, 128, 192))
    assert [tuple(raw.shape) for raw in maps] == [(2, 6 * (3 + 5 * (3 if name == "yolov1_darknet" else 2)))]


def test_forward_is_raw_maps_then_the_rest(small: YOLOv1) -> None:
    images = torch.rand(2, 3, 128, 192)
    small.eval()
    with torch.no_grad():
        whole, halves = small(images), small.from_raw_maps(small.raw_maps(images), (128, 192))
    assert whole.size == halves.size == (128, 192)
    assert all(torch.equal(a, b) for a, b in zip(whole[:4], halves[:4], strict=True))


@pytest.mark.parametrize(("name", "rate"), [("yolov1", 0.5), ("yolov1_darknet", 0.5)])
def test_half_of_the_hidden_features_drop_out_in_training_alone(make_detector: Make, name: str, rate: float) -> None:
    detector = make_detector(name, *SMALL)
    x = torch.rand(1, 128, 2, 3)
    trained, asleep = detector.hidden(x), detector.eval().hidden(x)
    assert (trained == 0).float().mean().item() == pytest.approx(rate, abs=0.12)
    assert (asleep != 0).all()


def test_boxes_of_a_cell_are_born_apart(make_detector: Make) -> None:
    detector = make_detector("yolov1_darknet", *SMALL).eval()
    with torch.no_grad():
        detector.out.weight.zero_()
        boxes = detector(torch.zeros(1, 3, 128, 192)).boxes[0, 0]
    sides = (boxes[:, 2] - boxes[:, 0]) / 192
    assert sides.tolist() == pytest.approx([1 / 4, 2 / 4, 3 / 4], rel=1e-5)
    assert ((boxes[:, :2] + boxes[:, 2:]) / 2).flatten().tolist() == pytest.approx([32] * 6, rel=1e-5)


@pytest.mark.parametrize("frozen", [True, False])
def test_freeze_norm_holds_from_birth(make_detector: Make, frozen: bool) -> None:
    detector = make_detector("yolov1_tiny", *SMALL, f"freeze_norm={frozen}")
    before = {name: value.clone() for name, value in detector.named_buffers() if "running" in name}
    detector(torch.rand(2, 3, 128, 192))
    after = dict(detector.named_buffers())
    assert len(before) == 2 * 8
    assert all(torch.equal(after[name], value) == frozen for name, value in before.items())


@pytest.mark.parametrize("name", NAMES)
def test_weights_named_in_the_config_are_loaded(make_detector: Make, tmp_path: Path, name: str) -> None:
    first = make_detector(name, *SMALL)
    assert first.seen.dtype == torch.int64 and int(first.seen) == 0
    first.seen.fill_(77)
    with torch.no_grad():
        for value in first.parameters():
            value.add_(0.01)
    darknet.save(first, tmp_path / "first.weights")
    second = make_detector(name, *SMALL, f"weights={tmp_path}/first.weights")
    assert int(second.seen) == 77
    assert all(torch.equal(second.get_parameter(key), value) for key, value in first.named_parameters())
