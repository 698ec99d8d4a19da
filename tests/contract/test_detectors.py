"""What every detector of ``conf/detector/`` promises, found by its yaml: a new one is tested without an edit here.

Built narrow and small, with three classes, by the same overrides that a user would give.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from onestage.config import CONF, build, compose
from onestage.types import XYXY, Detections, Target

NAMES = sorted(path.stem for path in (CONF / "detector").glob("*.yaml"))
HEIGHT, WIDTH = 128, 160
SMALL = ("width=0.125", "num_classes=3", f"input_size=[{HEIGHT},{WIDTH}]")
COLOURS = torch.eye(3)

Make = Callable[..., Any]
pytestmark = pytest.mark.parametrize("name", NAMES)


class Image(NamedTuple):
    detections: Detections
    target: Target


def target(boxes: list[tuple[float, ...]], labels: list[int]) -> Target:
    values = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    return Target(XYXY(values), torch.tensor(labels, dtype=torch.int64), 0)


def boxes_of_all_shapes() -> Target:
    """From 5 px to the whole image, wide and tall: some for every level and prior."""
    sides = [5.0, 8, 12, 18, 27, 40, 60, 90, 128]
    shapes = [(w, h) for w in sides for h in sides if 1 / 3 <= w / h <= 3]
    boxes = [((WIDTH - w) / 2, (HEIGHT - h) / 2, (WIDTH + w) / 2, (HEIGHT + h) / 2) for w, h in shapes]
    return target(boxes, [number % 3 for number in range(len(boxes))])


def images(num: int) -> Tensor:
    return torch.rand(num, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))


def total(parts: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(parts.values())).sum()


def test_takes_the_keywords_that_every_detector_takes(name: str) -> None:
    node = compose("train", [f"detector={name}"])["detector"]
    common = {"num_classes", "width", "input_size", "weights", "score_threshold", "nms_iou", "max_detections"}
    assert common | {"freeze_norm"} <= set(node)


def test_is_built_with_the_classes_and_size_of_the_config(make_detector: Make, name: str) -> None:
    detector = make_detector(name, *SMALL)
    assert detector.num_classes == 3
    assert list(detector.input_size) == [HEIGHT, WIDTH]


def test_losses_are_finite_scalars_with_an_image_without_boxes_too(make_detector: Make, name: str) -> None:
    detector = make_detector(name, *SMALL).train()
    for targets in ([boxes_of_all_shapes(), target([], [])], [target([], []), target([], [])]):
        parts = detector.losses(detector(images(2)), targets)
        assert set(parts) <= {"box", "objectness", "class", "prior"}
        assert all(part.shape == () and part.isfinite() for part in parts.values())
        assert total(parts) > 0


def test_every_parameter_gets_a_gradient(make_detector: Make, name: str) -> None:
    detector = make_detector(name, *SMALL).train()
    total(detector.losses(detector(images(2)), [boxes_of_all_shapes(), boxes_of_all_shapes()])).backward()
    without = [key for key, value in detector.named_parameters() if value.grad is None or not value.grad.any()]
    assert without == []
    assert all(value.grad.isfinite().all() for value in detector.parameters())


def test_every_buffer_and_parameter_is_in_the_state(make_detector: Make, name: str) -> None:
    first, second = make_detector(name, *SMALL), make_detector(name, *SMALL)
    first.train()(images(2))
    with torch.no_grad():
        for value in first.parameters():
            value.add_(0.01)
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        (one,), (other,) = (d.eval().detect(d(images(1))) for d in (first, second))
    assert torch.equal(one.boxes, other.boxes) and torch.equal(one.scores, other.scores)


def test_detections_are_within_the_image_sorted_and_not_too_many(make_detector: Make, name: str) -> None:
    detector = make_detector(name, *SMALL, "score_threshold=0.0", "max_detections=20").eval()
    with torch.no_grad():
        found = detector.detect(detector(images(2)))
    assert len(found) == 2
    for one in found:
        assert len(one) == 20  # of thousands of candidates above 0
        assert one.boxes.shape == (20, 4) and one.labels.dtype == torch.int64
        assert (one.boxes >= 0).all() and (one.boxes[:, 0::2] <= WIDTH).all() and (one.boxes[:, 1::2] <= HEIGHT).all()
        assert (one.boxes[:, :2] <= one.boxes[:, 2:]).all()
        assert one.scores.tolist() == sorted(one.scores.tolist(), reverse=True)
        assert (one.scores > 0).all() and (one.scores <= 1).all()
        assert (one.labels >= 0).all() and (one.labels < 3).all()


def test_nothing_above_the_threshold_is_no_detections(make_detector: Make, name: str) -> None:
    detector = make_detector(name, *SMALL, "score_threshold=1.0").eval()
    with torch.no_grad():
        found = detector.detect(detector(images(2)))
    assert [one.boxes.shape for one in found] == [(0, 4), (0, 4)]


def test_bf16_autocast_stays_finite(make_detector: Make, name: str) -> None:
    detector = make_detector(name, *SMALL, "score_threshold=0.0").train()
    with torch.autocast("cpu", torch.bfloat16):
        output = detector(images(2))
        parts = detector.losses(output, [boxes_of_all_shapes(), target([], [])])
    assert all(part.isfinite() and part.dtype == torch.float32 for part in parts.values())
    total(parts).backward()
    assert all(value.grad.isfinite().all() for value in detector.parameters())
    for one in detector.detect(output):
        assert one.boxes.isfinite().all() and one.scores.isfinite().all()
        assert one.boxes.dtype == one.scores.dtype == torch.float32  # bf16 has steps of 1 px from 128 on


def test_raw_maps_compile_without_a_graph_break(make_detector: Make, name: str) -> None:
    detector = make_detector(name, *SMALL).eval()
    compiled = torch.compile(detector.raw_maps, fullgraph=True, backend="eager")
    with torch.no_grad():
        for found, expected in zip(compiled(images(1)), detector.raw_maps(images(1)), strict=True):
            torch.testing.assert_close(found, expected)


def rectangles() -> tuple[Tensor, list[Target]]:
    """Four images of coloured rectangles on grey, the colour being the class."""
    pictures = torch.full((4, 3, HEIGHT, WIDTH), 0.4) + 0.05 * images(4)
    targets = [
        target([(10, 20, 60, 70)], [0]),
        target([(90, 50, 150, 120), (8, 8, 32, 40)], [1, 2]),
        target([(30, 60, 130, 120), (100, 6, 150, 36), (8, 8, 40, 36)], [2, 0, 1]),
        target([(60, 10, 100, 110)], [1]),
    ]
    for picture, truth in zip(pictures, targets, strict=True):
        for (left, top, right, bottom), label in zip(truth.boxes.int().tolist(), truth.labels.tolist(), strict=True):
            picture[:, top:bottom, left:right] = COLOURS[label][:, None, None]
    return pictures, targets


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Two threads on two busy cores wait for each other: minutes instead of seconds were seen."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_learns_four_images_by_heart_within_90_s(make_detector: Make, name: str) -> None:
    from onestage.metrics.mean_ap import MeanAP  # seconds, that the two processes below do without

    detector = make_detector(name, *SMALL)
    pictures, targets = rectangles()
    optimizer = torch.optim.AdamW(detector.parameters(), lr=2e-3)
    score, end = 0.0, time.monotonic() + 90
    while score < 0.95 and time.monotonic() < end:
        detector.train()
        for _ in range(20):
            optimizer.zero_grad()
            total(detector.losses(detector(pictures), targets)).backward()
            torch.nn.utils.clip_grad_norm_(detector.parameters(), 10.0)
            optimizer.step()
        detector.eval()
        with torch.no_grad():
            found = detector.detect(detector(pictures))
        score = MeanAP(classes=["red", "green", "blue"])([*map(Image, found, targets)])["map_50"]
    assert score >= 0.95


def gradients(name: str, share: slice) -> tuple[Any, Tensor, list[Target]]:
    """The detector with statistics frozen, and a share of four images."""
    torch.manual_seed(0)
    node = compose("train", [f"detector={name}", *(f"detector.{one}" for one in SMALL), "detector.freeze_norm=true"])
    pictures, targets = rectangles()
    return build(node["detector"]).train(), pictures[share], targets[share]


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(tmp_path: Path, name: str) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, name, str(rank), str(tmp_path)],
            env={**os.environ, "PYTHONPATH": str(CONF.parent / "platform")},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=240)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    detector, pictures, targets = gradients(name, slice(0, 4))
    total(detector.losses(detector(pictures), targets)).backward()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found.keys() == dict(detector.named_parameters()).keys()
        for key, value in detector.named_parameters():
            torch.testing.assert_close(found[key], value.grad, rtol=0, atol=1e-4 * float(value.grad.abs().max()))


class LossOf(torch.nn.Module):
    """DDP looks at what ``forward`` returns, so the loss has to be there."""

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, pictures: Tensor, targets: list[Target]) -> Tensor:
        return total(self.detector.losses(self.detector(pictures), targets))


def one_of_two(name: str, rank: int, folder: Path) -> None:
    """One process of two: the gradients of its half of the images, averaged by DDP."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    detector, pictures, targets = gradients(name, slice(2 * rank, 2 * rank + 2))
    wrapped = torch.nn.parallel.DistributedDataParallel(LossOf(detector))  # averages only as long as it lives
    wrapped(pictures, targets).backward()
    torch.save({key: value.grad for key, value in detector.named_parameters()}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    one_of_two(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
