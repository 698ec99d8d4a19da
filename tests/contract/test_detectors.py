"""What every detector of ``conf/detector/`` promises, found by its yaml: a new one is tested without an edit here.

Built narrow and small, with three classes, by the same overrides that a user would give. One yaml of each family is
quick; the others are slow tests.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils import _pytree

from onestage.config import CONF, build, compose
from onestage.data.samples import collate
from onestage.data.transforms import Letterbox, Sample, boxes_of, image_of
from onestage.errors import InputError
from onestage.training.module import to_float
from onestage.types import XYXY, Detections, Placement, Target

NAMES = sorted(path.stem for path in (CONF / "detector").glob("*.yaml"))
SIZES = ([128, 160], [128, 192])  # the smallest that have something to them; a detector of one size takes its own
COLOURS = torch.eye(3)

Make = Callable[..., Any]


@cache
def node(name: str) -> dict[str, Any]:
    found: dict[str, Any] = compose("train", [f"detector={name}"])["detector"]
    return found


def _of_each_family() -> set[str]:
    """One of those that share a class: the tiny one, or that of the shortest name."""
    families: dict[str, list[str]] = {}
    for name in NAMES:
        families.setdefault(node(name)["_target_"], []).append(name)
    return {min(names, key=lambda name: ("tiny" not in name, len(name), name)) for names in families.values()}


QUICK = _of_each_family()
pytestmark = pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)


@cache
def small(name: str) -> tuple[str, ...]:
    """Overrides of the detector node."""
    narrow = ("width=0.125", "num_classes=3")
    for size in SIZES:
        sized = (*narrow, f"input_size=[{size[0]},{size[1]}]")
        try:
            build(compose("train", [f"detector={name}", *(f"detector.{one}" for one in sized)])["detector"])
        except InputError:
            continue
        return sized
    return narrow


@pytest.fixture
def make(make_detector: Make, name: str) -> Make:
    """``make("score_threshold=0.0")``: the detector of the test, small."""
    return lambda *overrides: make_detector(name, *small(name), *overrides)


class Image(NamedTuple):
    detections: Detections
    target: Target


def target(boxes: Any, labels: list[int]) -> Target:
    values = torch.as_tensor(boxes, dtype=torch.float32).view(-1, 4)
    return Target(XYXY(values), torch.tensor(labels, dtype=torch.int64), 0)


def boxes_of_all_shapes(detector: Any) -> Target:
    """From 4 % of the height to the whole image, wide and tall, in the middle and in two corners.

    Some for every level and prior: no large box of SSD512's is centred in the middle.
    """
    height, width = detector.input_size
    sides = [height * share for share in (0.04, 0.06, 0.09, 0.14, 0.21, 0.31, 0.47, 0.7, 1.0)]
    shapes = [(w, h) for w in sides for h in sides if 1 / 3 <= w / h <= 3]
    boxes = [
        (x, y, x + w, y + h)
        for w, h in shapes
        for x, y in (((width - w) / 2, (height - h) / 2), (0, 0), (width - w, height - h))
    ]
    return target(boxes, [number % 3 for number in range(len(boxes))])


def many_boxes(detector: Any) -> Target:
    """500, all over the image."""
    height, width = detector.input_size
    corner = torch.rand(500, 2, generator=torch.Generator().manual_seed(0)) * 0.9
    boxes = torch.cat((corner, corner + 0.1), dim=1) * torch.tensor([width, height, width, height])
    return target(boxes, [number % 3 for number in range(500)])


def images(detector: Any, num: int) -> Tensor:
    height, width = detector.input_size
    return torch.rand(num, 3, height, width, generator=torch.Generator().manual_seed(0))


def total(parts: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(parts.values())).sum()


def test_takes_the_keywords_that_every_detector_takes(name: str) -> None:
    common = {"num_classes", "width", "input_size", "weights", "score_threshold", "nms_iou", "max_detections"}
    assert common | {"freeze_norm"} <= set(node(name))


def test_is_built_with_the_classes_and_size_of_the_config(make: Make, name: str) -> None:
    detector = make()
    assert detector.num_classes == 3
    sized = [one for one in small(name) if one.startswith("input_size")]
    size = [128, int(sized[0][-4:-1])] if sized else node(name)["input_size"]
    assert list(detector.input_size) == size


def test_losses_are_finite_scalars_with_no_box_and_with_500(make: Make, name: str) -> None:
    detector = make().train()
    none = target([], [])
    for targets in ([boxes_of_all_shapes(detector), none], [none, none], [many_boxes(detector), none]):
        parts = detector.losses(detector(images(detector, 2)), targets)
        assert set(parts) == set(detector.loss_parts) <= {"box", "objectness", "class", "prior"}
        assert all(part.shape == () and part.isfinite() for part in parts.values())
        total(parts).backward()
        assert all(value.grad is None or value.grad.isfinite().all() for value in detector.parameters())


def test_every_parameter_gets_a_gradient(make: Make, name: str) -> None:
    detector = make().train()
    truth = boxes_of_all_shapes(detector)
    total(detector.losses(detector(images(detector, 2)), [truth, truth])).backward()
    without = [key for key, value in detector.named_parameters() if value.grad is None or not value.grad.any()]
    assert without == []
    assert all(value.grad.isfinite().all() for value in detector.parameters())


def test_images_of_mixed_sizes_come_through_the_collate(make: Make, name: str) -> None:
    detector = make()
    pictures = [np.full((height, width, 3), 90, np.uint8) for height, width in ((40, 60), (300, 70), (33, 500))]
    samples: list[Sample] = [
        {
            "key": str(number),
            "image_id": number,
            "image": image_of(pixels),
            "boxes": boxes_of(torch.tensor([[2.0, 3, 30, 20]]), size=pixels.shape[:2]),
            "labels": torch.tensor([number]),
            "crowd": torch.tensor([False]),
            "difficult": torch.tensor([False]),
            "placement": Placement(),
        }
        for number, pixels in enumerate(pictures)
    ]
    letterbox = Letterbox(size=detector.input_size)
    batch = collate([letterbox(sample) for sample in samples], size=detector.input_size, global_images=3)
    output = detector(to_float(batch.images))
    assert all(part.isfinite() for part in detector.losses(output, batch.targets).values())
    assert len(detector.detect(output)) == 3


def test_every_buffer_and_parameter_is_in_the_state(make: Make, name: str) -> None:
    first, second = make(), make()
    first.train()(images(first, 2))
    with torch.no_grad():
        for value in first.parameters():
            value.add_(0.01)
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        (one,), (other,) = (d.eval().detect(d(images(d, 1))) for d in (first, second))
    assert torch.equal(one.boxes, other.boxes) and torch.equal(one.scores, other.scores)


def test_detections_are_within_the_image_sorted_and_not_too_many(make: Make, name: str) -> None:
    detector = make("score_threshold=0.0", "max_detections=20").eval()
    height, width = detector.input_size
    with torch.no_grad():
        found = detector.detect(detector(images(detector, 2)))
    assert len(found) == 2
    for one in found:
        assert 0 < len(one) <= 20
        assert one.boxes.shape == (len(one), 4) and one.labels.dtype == torch.int64
        assert (one.boxes >= 0).all() and (one.boxes[:, 0::2] <= width).all() and (one.boxes[:, 1::2] <= height).all()
        assert (one.boxes[:, :2] <= one.boxes[:, 2:]).all()
        assert one.scores.tolist() == sorted(one.scores.tolist(), reverse=True)
        assert (one.scores > 0).all() and (one.scores <= 1).all()
        assert (one.labels >= 0).all() and (one.labels < 3).all()


def test_nothing_above_the_threshold_is_no_detections(make: Make, name: str) -> None:
    detector = make("score_threshold=1.0").eval()
    with torch.no_grad():
        found = detector.detect(detector(images(detector, 2)))
    assert [one.boxes.shape for one in found] == [(0, 4), (0, 4)]


def test_bf16_autocast_stays_finite(make: Make, name: str) -> None:
    detector = make("score_threshold=0.0").train()
    with torch.autocast("cpu", torch.bfloat16):
        output = detector(images(detector, 2))
        parts = detector.losses(output, [boxes_of_all_shapes(detector), target([], [])])
    assert all(part.isfinite() and part.dtype == torch.float32 for part in parts.values())
    total(parts).backward()
    assert all(value.grad.isfinite().all() for value in detector.parameters())
    for one in detector.detect(output):
        assert one.boxes.isfinite().all() and one.scores.isfinite().all()
        assert one.boxes.dtype == one.scores.dtype == torch.float32  # bf16 has steps of 1 px from 128 on


def test_forward_compiles_without_a_graph_break(make: Make, name: str) -> None:
    detector = make().eval()
    compiled = torch.compile(detector.forward, fullgraph=True, backend="eager")
    with torch.no_grad():
        found, expected = compiled(images(detector, 1)), detector(images(detector, 1))
    for one, other in zip(_pytree.tree_leaves(found), _pytree.tree_leaves(expected), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("channels", [1, 4])
def test_other_than_three_channels_are_refused_in_one_line(make: Make, name: str, channels: int) -> None:
    detector = make()
    height, width = detector.input_size
    with pytest.raises(
        InputError, match=rf"RGB images of shape \(B, 3, H, W\), got \(1, {channels}, {height}, {width}\)"
    ):
        detector(torch.rand(1, channels, height, width))


def test_another_size_is_refused_with_the_size_or_the_multiple_that_is_needed(make: Make, name: str) -> None:
    detector = make()
    height, width = detector.input_size
    with pytest.raises(InputError, match=rf"({height}x{width}|multiples of \d+).*{height}x{width + 1}") as error:
        detector(torch.rand(1, 3, height, width + 1))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("label", [-1, 3])
def test_a_class_out_of_range_is_refused_with_the_image(make: Make, name: str, label: int) -> None:
    detector = make()
    with pytest.raises(InputError, match=rf"^image 0 has label {label}, outside 0 to 2: detector.num_classes is 3$"):
        detector.losses(detector(images(detector, 1)), [target([(4, 4, 40, 40)], [label])])


def test_a_box_that_is_no_number_is_refused_with_the_image(make: Make, name: str) -> None:
    detector = make()
    with pytest.raises(InputError, match=r"^image 0 has a box that is not finite: \[4.0, nan, 40.0, 40.0\]$"):
        detector.losses(detector(images(detector, 1)), [target([(4, float("nan"), 40, 40)], [0])])


def test_targets_of_too_few_images_are_refused(make: Make, name: str) -> None:
    detector = make()
    with pytest.raises(InputError, match=r"^the output is of 2 images, but there are targets for 1$"):
        detector.losses(detector(images(detector, 2)), [target([(4, 4, 40, 40)], [0])])


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("num_classes=0", "detector.num_classes must be at least 1, got 0"),
        ("max_detections=0", "detector.max_detections must be at least 1, got 0"),
        ("score_threshold=2.0", "detector.score_threshold must be from 0 to 1, got 2.0"),
        ("nms_iou=-0.1", "detector.nms_iou must be from 0 to 1, got -0.1"),
        ("width=-1.0", "detector.width must be above 0, got -1.0"),
        ("input_size=[416]", "detector.input_size must be [H, W] in whole pixels, got [416]"),
    ],
)
def test_values_without_meaning_are_refused_in_one_line(
    make_detector: Make, name: str, override: str, says: str
) -> None:
    with pytest.raises(InputError) as error:
        make_detector(name, override)
    assert str(error.value) == says


def test_a_form_of_the_loss_that_is_not_there_is_refused(make: Make, name: str) -> None:
    key = "loss" if "loss" in node(name) else "box_loss"
    if key not in node(name):
        assert node(name)["_target_"].endswith("SSD")  # which has one form
        return
    with pytest.raises(InputError, match=rf"^detector.{key} must be .* or .*, got drknet$"):
        make(f"{key}=drknet")


# Four images to learn by heart, in 160ths of the width and 128ths of the height; YOLOv1's cells have one object each.
RECTANGLES = (
    ([(10, 20, 60, 70)], [0]),
    ([(90, 50, 150, 120), (8, 8, 32, 40)], [1, 2]),
    ([(30, 60, 130, 120), (100, 6, 150, 36), (8, 8, 40, 36)], [2, 0, 1]),
    ([(60, 10, 100, 110)], [1]),
)


def rectangles(detector: Any) -> tuple[Tensor, list[Target]]:
    """Coloured rectangles on grey, the colour being the class."""
    height, width = detector.input_size
    pictures = torch.full((4, 3, height, width), 0.4) + 0.05 * images(detector, 4)
    unit = torch.tensor([width / 160, height / 128]).repeat(2)
    targets = [target((torch.tensor(boxes) * unit).round(), labels) for boxes, labels in RECTANGLES]
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


@pytest.mark.usefixtures("one_thread")
def test_learns_four_images_by_heart_within_90_s(make: Make, name: str) -> None:
    from onestage.metrics.mean_ap import MeanAP  # seconds, that the two processes below do without

    detector = make().to(memory_format=torch.channels_last)
    pictures, targets = rectangles(detector)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=2e-3)
    score, end = 0.0, time.monotonic() + 90
    while score < 0.95 and time.monotonic() < end:
        detector.train()
        for _ in range(20):
            optimizer.zero_grad()
            total(detector.losses(detector(to_float(pictures)), targets)).backward()
            torch.nn.utils.clip_grad_norm_(detector.parameters(), 10.0)
            optimizer.step()
        detector.eval()
        with torch.no_grad():
            found = detector.detect(detector(to_float(pictures)))
        score = MeanAP(classes=["red", "green", "blue"])([*map(Image, found, targets)])["map_50"]
    assert score >= 0.95


def gradients(name: str, share: slice) -> tuple[Any, Tensor, list[Target]]:
    """The detector with nothing random or common to a batch in it, and a share of four images."""
    overrides = [f"detector.{one}" for one in (*small(name), "freeze_norm=true")]
    torch.manual_seed(0)
    detector = build(compose("train", [f"detector={name}", *overrides])["detector"]).train()
    for module in detector.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()
    pictures, targets = rectangles(detector)
    return detector, pictures[share], targets[share]


@pytest.fixture(scope="session")
def gradients_of_two(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each of two processes got for the detectors of this session, as NAME-RANK.pt: started once for all.

    One has three of the four images, the other one.
    """
    asked = {item.callspec.params["name"] for item in request.session.items if "gradients_of_two" in item.fixturenames}  # type: ignore[attr-defined]
    folder = tmp_path_factory.mktemp("gradients")
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder), *sorted(asked)],
            env={**os.environ, "PYTHONPATH": str(CONF.parent / "platform")},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=280)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    return folder


def test_two_processes_have_the_gradients_of_one(gradients_of_two: Path, name: str) -> None:
    detector, pictures, targets = gradients(name, slice(0, 4))
    total(detector.losses(detector(pictures), targets)).backward()
    for rank in range(2):
        found = torch.load(gradients_of_two / f"{name}-{rank}.pt", weights_only=True)
        assert found.keys() == dict(detector.named_parameters()).keys()
        for key, value in detector.named_parameters():
            torch.testing.assert_close(found[key], value.grad, rtol=0, atol=1e-4 * float(value.grad.abs().max()))


class LossOf(torch.nn.Module):
    """DDP looks at what ``forward`` returns, so the loss has to be there; weighted by images as in training."""

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, pictures: Tensor, targets: list[Target]) -> Tensor:
        share = len(pictures) * torch.distributed.get_world_size() / len(RECTANGLES)
        return share * total(self.detector.losses(self.detector(pictures), targets))


def _mean_over_ranks(value: Tensor) -> Tensor:
    """What training gives a detector."""
    reduced = value.clone()
    torch.distributed.all_reduce(reduced)
    return reduced / torch.distributed.get_world_size()


def one_of_two(rank: int, folder: Path, names: list[str]) -> None:
    """One process of two: the gradients of its share of the images, averaged by DDP."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for name in names:
        detector, pictures, targets = gradients(name, slice(0, 3) if rank == 0 else slice(3, 4))
        detector.mean_over_ranks = _mean_over_ranks
        wrapped = torch.nn.parallel.DistributedDataParallel(LossOf(detector))  # averages only as long as it lives
        wrapped(pictures, targets).backward()
        torch.save({key: value.grad for key, value in detector.named_parameters()}, folder / f"{name}-{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    one_of_two(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
