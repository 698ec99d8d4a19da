"""Against torchvision's SSD, live, and against arithmetic and properties elsewhere.

The quick tests give torchvision's SSD the same head outputs; the slow ones its whole ``ssd300_vgg16``.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD as ReferenceSSD

from onestage.detectors.ssd import SSD, Output
from onestage.errors import InputError
from onestage.types import XYXY, Detections, Target

Make = Callable[..., SSD]
SIDES_300 = (38, 19, 10, 5, 3, 1)
NARROW = ("width=0.125", "num_classes=3")


def target(*boxes: tuple[float, float, float, float], labels: list[int] | None = None, image_id: int = 0) -> Target:
    values = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    return Target(XYXY(values), torch.tensor(labels or [0] * len(boxes), dtype=torch.int64), image_id)


def random_target(num: int, *, num_classes: int, seed: int) -> Target:
    """From specks to half the image."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(num, 2, generator=generator) * 280
    high = torch.minimum(low + 2 + 200 * torch.rand(num, 2, generator=generator).square(), torch.tensor(300.0))
    labels = torch.randint(num_classes, (num,), generator=generator)
    return Target(XYXY(torch.cat((low, high), dim=1)), labels, seed)


def random_output(num_images: int, *, num_classes: int, seed: int) -> Output:
    """As of a network in training: background mostly, and a few sure boxes."""
    generator = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn(num_images, 8732, 1 + num_classes, generator=generator)
    logits[..., 0] += 2
    deltas = 2 * torch.randn(num_images, 8732, 4, generator=generator)
    return Output(logits.requires_grad_(), deltas.requires_grad_())


def total(parts: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(parts.values())).sum()


@pytest.fixture(scope="module")
def narrow(make_detector: Make) -> SSD:
    return make_detector("ssd300", *NARROW)


# torchvision's numbers, from the head's outputs on


class Maps(nn.Module):
    """In place of a backbone: maps of SSD300's sizes."""

    out_channels = (1, 1, 1, 1, 1, 1)

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        return OrderedDict((str(side), images.new_zeros(len(images), 1, side, side)) for side in SIDES_300)


class Fixed(nn.Module):
    """In place of a head: always the same output."""

    def __init__(self, output: Output) -> None:
        super().__init__()
        self.output = output

    def forward(self, maps: list[Tensor]) -> dict[str, Tensor]:
        return {"bbox_regression": self.output.deltas, "cls_logits": self.output.logits}


def reference(output: Output, *, num_classes: int) -> Any:
    generator = DefaultBoxGenerator(
        [[2], [2, 3], [2, 3], [2, 3], [2], [2]],
        scales=[0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05],
        steps=[8, 16, 32, 64, 100, 300],
    )
    return ReferenceSSD(Maps(), generator, (300, 300), 1 + num_classes, head=Fixed(output))


def for_torchvision(targets: list[Target]) -> list[dict[str, Tensor]]:
    """With labels from 1 on."""
    return [{"boxes": one.boxes, "labels": one.labels + 1} for one in targets]


def assert_same_losses(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(found["box"], expected["bbox_regression"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["class"], expected["classification"], rtol=1e-5, atol=1e-5)


def assert_same_detections(found: list[Detections], expected: list[dict[str, Tensor]]) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.labels, theirs["labels"] - 1)
        torch.testing.assert_close(ours.scores, theirs["scores"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.boxes, theirs["boxes"], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("counts", [(5,), (20, 0, 3, 100), (1, 1)])
def test_losses_and_their_gradients_equal_torchvisions(narrow: SSD, counts: tuple[int, ...]) -> None:
    targets = [random_target(num, num_classes=3, seed=seed) for seed, num in enumerate(counts)]
    output = random_output(len(counts), num_classes=3, seed=0)
    found = narrow.losses(output, targets)
    gradients = torch.autograd.grad(total(found), list(output))
    expected = reference(output, num_classes=3).train()(
        [torch.zeros(3, 300, 300)] * len(counts), for_torchvision(targets)
    )
    assert_same_losses(found, expected)
    for ours, theirs in zip(gradients, torch.autograd.grad(total(expected), list(output)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("num_classes", [1, 3, 20])
def test_detections_equal_torchvisions(make_detector: Make, num_classes: int) -> None:
    detector = make_detector("ssd300", "width=0.125", f"num_classes={num_classes}").eval()
    output = random_output(2, num_classes=num_classes, seed=1)
    above = (output.logits.softmax(dim=-1)[..., 1:] > 0.01).sum(dim=1)
    assert (above > 400).all()  # the best 400 of a class alone go on
    expected = reference(output, num_classes=num_classes).eval()([torch.zeros(3, 300, 300)] * 2)
    assert all(len(one["labels"]) == 200 for one in expected)
    assert_same_detections(detector.detect(output), expected)


def test_few_detections_equal_torchvisions(narrow: SSD) -> None:
    output = random_output(2, num_classes=3, seed=2)
    with torch.no_grad():
        output.logits[..., 0] += 8.5
        output.logits[1, :, 0] += 20
    expected = reference(output, num_classes=3).eval()([torch.zeros(3, 300, 300)] * 2)
    assert 20 < len(expected[0]["labels"]) < 200
    assert len(expected[1]["labels"]) == 0
    assert_same_detections(narrow.detect(output), expected)


# torchvision's numbers, of the whole network


class Pair(NamedTuple):
    ours: SSD
    theirs: Any


@pytest.fixture(scope="module")
def pair(make_detector: Make) -> Pair:
    """Ours with the random weights of torchvision's, scaled so that some boxes are sure and few overlap an object."""
    torch.manual_seed(1)
    theirs = torchvision.models.detection.ssd300_vgg16(weights=None, weights_backbone=None, num_classes=4)
    with torch.no_grad():
        theirs.backbone.features[0].weight *= 1 / 64
        for head in theirs.head.children():
            for conv in head.module_list:
                conv.weight *= 0.5
                nn.init.normal_(conv.bias, std=0.5)
    ours = make_detector("ssd300", "num_classes=3")
    load(ours, theirs.state_dict())
    return Pair(ours, theirs)


@torch.no_grad()
def load(detector: SSD, state: dict[str, Tensor]) -> None:
    left = dict(state)
    for name, layer in detector.torchvision_layers().items():
        if isinstance(layer, nn.Parameter):
            layer.copy_(left.pop(name))
        else:
            for key, value in layer.state_dict().items():
                value.copy_(left.pop(f"{name}.{key}"))
    assert left == {}


@pytest.mark.slow
def test_head_outputs_and_detections_equal_torchvisions(pair: Pair) -> None:
    ours, theirs = pair.ours.eval(), pair.theirs.eval()
    images = torch.rand(2, 3, 300, 300, generator=torch.Generator().manual_seed(0))
    kept: dict[str, Tensor] = {}
    hook = theirs.head.register_forward_hook(lambda head, inputs, output: kept.update(output))
    with torch.no_grad():
        expected = theirs(list(images))
        output = ours(images)
    hook.remove()
    torch.testing.assert_close(output.logits, kept["cls_logits"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.deltas, kept["bbox_regression"], rtol=1e-5, atol=1e-5)
    assert all(len(one["labels"]) > 100 for one in expected)
    assert_same_detections(ours.detect(output), expected)


@pytest.mark.slow
def test_losses_of_the_network_equal_torchvisions(pair: Pair) -> None:
    images = torch.rand(2, 3, 300, 300, generator=torch.Generator().manual_seed(0))
    targets = [random_target(num, num_classes=3, seed=seed) for seed, num in enumerate((12, 3))]
    ours, theirs = pair.ours.train(), pair.theirs.train()
    with torch.no_grad():
        expected = theirs(list(images), for_torchvision(targets))
        found = ours.losses(ours(images), targets)
    assert_same_losses(found, expected)


def test_every_tensor_of_ssd300_vgg16_has_its_place(make_detector: Make) -> None:
    with torch.device("meta"):
        theirs = torchvision.models.detection.ssd300_vgg16(weights=None, weights_backbone=None, num_classes=4)
    ours = make_detector("ssd300", "num_classes=3")
    found: dict[str, torch.Size] = {}
    for name, layer in ours.torchvision_layers().items():
        entries = {name: layer} if isinstance(layer, nn.Parameter) else layer.state_dict(prefix=f"{name}.")
        found |= {key: value.shape for key, value in entries.items()}
    assert found == {name: value.shape for name, value in theirs.state_dict().items()}
    assert sum(shape.numel() for shape in found.values()) == sum(p.numel() for p in ours.parameters())
    assert [layer.out_channels for layer in ours.output_layers()] == [4 * n for n in (4, 6, 6, 6, 4, 4)]


# losses


def test_a_box_that_is_a_default_box_costs_nothing_where_it_is_told_so(narrow: SSD) -> None:
    """One positive, sure of its class; its three hardest negatives are unsure, the others sure."""
    at = 8732 - 4  # the square of the last map: 261 px, which no other box overlaps by half
    logits = torch.zeros(1, 8732, 4)
    logits[..., 0] = 100
    logits[0, at] = torch.tensor([0.0, 0, 100, 0])
    logits[0, [10, 2000, 4000]] = torch.tensor([0.0, -1000, 0, -1000])  # one half: ln 2 each
    truth = Target(XYXY(narrow.default_boxes[at : at + 1]), torch.tensor([1]), 0)
    match = torchvision.ops.box_iou(truth.boxes, narrow.default_boxes)[0] >= 0.5
    logits[0, match.nonzero().squeeze(1)] = torch.tensor([0.0, 0, 100, 0])
    deltas = narrow.coder.encode(XYXY(narrow.default_boxes), XYXY(truth.boxes.expand(8732, 4)))[None]
    parts = narrow.losses(Output(logits, deltas), [truth])
    assert float(parts["box"]) == pytest.approx(0, abs=1e-5)
    assert float(parts["class"]) == pytest.approx(3 * 0.6931472 / int(match.sum()), abs=1e-5)


def test_without_a_box_there_is_no_loss_and_no_gradient(narrow: SSD) -> None:
    """Sec. 2.2: "If N = 0, [we] set the loss to 0"."""
    output = random_output(2, num_classes=3, seed=3)
    parts = narrow.losses(output, [target(), target()])
    assert [part.item() for part in parts.values()] == [0, 0]
    total(parts).backward()
    assert output.logits.grad is not None and not output.logits.grad.any()
    assert output.deltas.grad is not None and not output.deltas.grad.any()


def test_losses_are_finite_for_any_boxes(narrow: SSD) -> None:
    odd = target(
        (50, 50, 50, 90),  # a line
        (60, 60, 60, 60),  # a point
        (90, 90, 70, 70),  # corners swapped
        (400, 400, 500, 500),  # outside
        (-900, -900, 1200, 1200),
        (10, 10, 10.0001, 10.0001),
    )
    output = random_output(3, num_classes=3, seed=4)
    parts = narrow.losses(output, [odd, random_target(500, num_classes=3, seed=9), target()])
    assert all(part.isfinite() for part in parts.values())
    total(parts).backward()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in output)


def test_a_repeated_batch_has_the_same_losses(narrow: SSD) -> None:
    """Their scale depends on the boxes of an image, not on the number of images."""
    output, targets = random_output(1, num_classes=3, seed=5), [random_target(7, num_classes=3, seed=0)]
    twice = Output(output.logits.repeat(4, 1, 1), output.deltas.repeat(4, 1, 1))
    once, often = narrow.losses(output, targets), narrow.losses(twice, targets * 4)
    for name, value in once.items():
        torch.testing.assert_close(often[name], value)


def test_ranks_average_to_the_whole_batch(narrow: SSD, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two ranks of a training with 2 and 1 images, weighted by their images."""
    output = random_output(3, num_classes=3, seed=6)
    targets = [random_target(num, num_classes=3, seed=num) for num in (9, 1, 4)]
    whole = narrow.losses(output, targets)
    counts: list[Tensor] = []
    monkeypatch.setattr(narrow, "mean_over_ranks", lambda count: counts.append(count) or count)
    shares = [slice(0, 2), slice(2, 3)]
    for share in shares:
        narrow.losses(Output(output.logits[share], output.deltas[share]), targets[share])
    monkeypatch.setattr(narrow, "mean_over_ranks", lambda count: (counts[0] + counts[1]) / 2)
    parts = [narrow.losses(Output(output.logits[share], output.deltas[share]), targets[share]) for share in shares]
    for name, value in whole.items():
        torch.testing.assert_close((2 * parts[0][name] + parts[1][name]) / 3, value)


def test_the_ratio_of_negatives_is_the_configs(make_detector: Make, narrow: SSD) -> None:
    output, targets = random_output(1, num_classes=3, seed=7), [random_target(5, num_classes=3, seed=1)]
    none = make_detector("ssd300", *NARROW, "negatives_per_positive=0").losses(output, targets)
    three = narrow.losses(output, targets)
    assert none["class"] < three["class"]
    torch.testing.assert_close(none["box"], three["box"])


def test_a_label_outside_the_classes_is_refused(narrow: SSD) -> None:
    with pytest.raises(InputError, match=r"image 7 has label 3, outside 0 to 2: detector.num_classes is 3"):
        narrow.losses(random_output(1, num_classes=3, seed=0), [target((0, 0, 9, 9), labels=[3], image_id=7)])


# network


def test_forward_compiles_without_a_graph_break(narrow: SSD) -> None:
    images = torch.rand(1, 3, 300, 300, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(narrow, fullgraph=True, backend="eager")
    with torch.no_grad():
        for found, expected in zip(compiled(images), narrow(images), strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["ssd300", "ssd512"])
def test_boxes_of_all_sizes_train_every_level(make_detector: Make, name: str) -> None:
    detector = make_detector(name, *NARROW)
    side = detector.input_size[0]
    sizes = [side * share for share in (0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9)]
    boxes = [(0.0, 0.0, size, size) for size in sizes] + [(side - size, side - size, side, side) for size in sizes]
    output = detector(torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)))
    total(detector.losses(output, [target(*boxes)])).backward()
    assert [key for key, value in detector.named_parameters() if value.grad is None or not value.grad.any()] == []


def test_bf16_autocast_gives_losses_and_boxes_in_float32(narrow: SSD) -> None:
    images = torch.rand(1, 3, 300, 300, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        output = narrow(images)
        parts = narrow.losses(output, [target((30, 30, 200, 200))])
        (found,) = narrow.detect(output)
    assert all(part.isfinite() and part.dtype == torch.float32 for part in parts.values())
    assert found.boxes.dtype == found.scores.dtype == torch.float32


def test_scores_below_the_threshold_and_background_are_no_detections(make_detector: Make) -> None:
    detector = make_detector("ssd300", *NARROW, "score_threshold=0.3").eval()
    logits = torch.zeros(1, 8732, 4)
    logits[..., 0] = 50
    logits[0, 8731] = torch.tensor([0.0, 1.0, 0.0, 0.0])  # 0.475 for the first class, 0.175 for each other
    (found,) = detector.detect(Output(logits, torch.zeros(1, 8732, 4)))
    assert found.labels.tolist() == [0]
    assert found.scores.tolist() == pytest.approx([0.4754], abs=1e-4)
    expected = detector.default_boxes[8731].clamp(0, 300)
    torch.testing.assert_close(found.boxes[0], expected)


@pytest.mark.parametrize("size", ["[128,160]", "[64,64]", "[512,512]"])
def test_an_input_size_that_the_layers_are_not_made_for_is_refused(make_detector: Make, size: str) -> None:
    height, width = size[1:-1].split(",")
    with pytest.raises(InputError) as refused:
        make_detector("ssd300", *NARROW, f"input_size={size}")
    assert str(refused.value) == (
        f"SSD's last map must have one cell, which an input of {height}x{width} does not give: set "
        "detector.input_size to what its layers are made for, [300, 300] for ssd300, [512, 512] for ssd512"
    )


def test_images_of_another_size_are_refused(narrow: SSD) -> None:
    with pytest.raises(InputError, match=r"^SSD takes inputs of 300x300 alone, got 320x300: set detector.input_size$"):
        narrow(torch.zeros(1, 3, 320, 300))


def test_levels_without_default_boxes_are_refused(make_detector: Make) -> None:
    with pytest.raises(InputError, match=r"detector.anchors has 6 levels, the network 7"):
        make_detector(
            "ssd512",
            *NARROW,
            "anchors.steps=[8,16,32,64,128,256]",
            "anchors.scales=[0.04,0.1,0.26,0.42,0.58,0.74,0.9]",
            "anchors.aspect_ratios=[[2],[2,3],[2,3],[2,3],[2],[2]]",
        )


def test_starts_from_the_weights_of_the_config(make_detector: Make, narrow: SSD, tmp_path: Path) -> None:
    state: dict[str, Tensor] = {}
    for name, layer in narrow.torchvision_layers().items():
        entries = {name: layer} if isinstance(layer, nn.Parameter) else layer.state_dict(prefix=f"{name}.")
        state |= {key: torch.full_like(value, 0.5) for key, value in entries.items()}
    torch.save(state, tmp_path / "half.pth")
    detector = make_detector("ssd300", *NARROW, f"weights={tmp_path}/half.pth")
    assert all((value == 0.5).all() for value in detector.parameters())


@pytest.mark.parametrize(
    ("name", "std", "warned"),
    [
        ("vgg16", "1/255", True),
        ("vgg16", "[0.229,0.224,0.225]", False),
        ("vgg16_features", "1/255", False),
    ],
)
def test_a_backbone_made_for_other_inputs_is_warned_of(
    make_detector: Make,
    narrow: SSD,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
    std: str,
    warned: bool,
) -> None:
    layers = narrow.backbone.torchvision_layers()  # type: ignore[operator]
    state = {f"{key}.{k}": v for key, layer in layers.items() for k, v in layer.state_dict().items()}
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: state)
    scaled = [] if std == "1/255" else [f"backbone.image_std={std}"]
    with caplog.at_level(logging.WARNING, "onestage"):
        make_detector("ssd300", *NARROW, f"weights=torchvision://{name}", *scaled)
    expected = (
        "detector.weights: torchvision://vgg16 was trained with detector.backbone.image_std=[0.229,0.224,0.225]: "
        "torchvision://vgg16_features is for SSD's"
    )
    assert [record.getMessage() for record in caplog.records] == [expected] * warned
