"""Against torchvision's RetinaNet, by live comparison; against arithmetic and properties elsewhere."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import detection

from onestage.detectors.retinanet import Output, RetinaNet
from onestage.errors import InputError
from onestage.types import XYXY, Target
from onestage.weights import torchvision

Make = Callable[..., RetinaNet]
HEIGHT, WIDTH = 128, 160
LEVELS = [(16, 20), (8, 10), (4, 5), (2, 3), (1, 2)]  # of an input of 128x160
NUM_CLASSES = 5


def target(*boxes: tuple[float, float, float, float], labels: list[int] | None = None, image_id: int = 0) -> Target:
    values = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    return Target(XYXY(values), torch.tensor(labels or [0] * len(boxes), dtype=torch.int64), image_id)


def random_target(num: int, seed: int, num_classes: int = NUM_CLASSES) -> Target:
    """Boxes of sides from 4 px to the image's, some of which no anchor overlaps by half."""
    generator = torch.Generator().manual_seed(seed)
    limit = torch.tensor([WIDTH, HEIGHT])
    sides = 4 * (limit / 4) ** torch.rand(num, 2, generator=generator)
    low = torch.rand(num, 2, generator=generator) * (limit - sides)
    labels = torch.randint(num_classes, (num,), generator=generator)
    return Target(XYXY(torch.cat((low, low + sides), dim=1)), labels, seed)


def in_torchvisions_words(targets: list[Target]) -> list[dict[str, Tensor]]:
    return [{"boxes": one.boxes, "labels": one.labels} for one in targets]


@pytest.fixture
def small(make_detector: Make) -> RetinaNet:
    return make_detector("retinanet_r50", "width=0.125", f"num_classes={NUM_CLASSES}", f"input_size=[{HEIGHT},{WIDTH}]")


# torchvision's numbers, from given maps of the head: no network, so quick


class WithoutNetwork(nn.Module):
    out_channels = 8


def reference(box_loss: str = "l1") -> detection.RetinaNet:
    model = detection.RetinaNet(WithoutNetwork(), NUM_CLASSES)
    model.head.regression_head._loss_type = box_loss
    return model.eval()


def random_maps(mean: float = -2.0) -> list[Tensor]:
    """Of a head that finds something everywhere, in two images."""
    generator = torch.Generator().manual_seed(7)
    logits = [2 * torch.randn(2, 9 * NUM_CLASSES, *cells, generator=generator) + mean for cells in LEVELS]
    deltas = [0.5 * torch.randn(2, 9 * 4, *cells, generator=generator) for cells in LEVELS]
    return [one.requires_grad_() for one in (*logits, *deltas)]


TARGETS = {
    "some boxes": [random_target(6, 1), random_target(12, 2)],
    "one image without": [random_target(6, 1), target()],
    "no boxes at all": [target(), target()],
    "many boxes": [random_target(150, 3), random_target(2, 4)],
}


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("box_loss", ["l1", "smooth_l1", "giou"])
def test_losses_and_gradients_are_torchvisions(small: RetinaNet, box_loss: str, name: str) -> None:
    small.box_loss = box_loss  # type: ignore[assignment]
    maps = random_maps()
    output = small.from_raw_maps(maps, (HEIGHT, WIDTH))
    parts = small.losses(output, TARGETS[name])
    found = torch.autograd.grad(parts["class"] + parts["box"], maps, retain_graph=True)

    outputs = {"cls_logits": output.logits, "bbox_regression": output.deltas}
    expected = reference(box_loss).compute_loss(in_torchvisions_words(TARGETS[name]), outputs, [output.anchors] * 2)
    torch.testing.assert_close(parts["class"], expected["classification"], rtol=1e-5, atol=0)
    torch.testing.assert_close(parts["box"], expected["bbox_regression"], rtol=1e-5, atol=1e-7)
    gradients = torch.autograd.grad(expected["classification"] + expected["bbox_regression"], maps)
    for one, other in zip(found, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("mean", "threshold"), [(-2.0, 0.05), (-2.0, 0.9), (-12.0, 0.05)])
def test_detections_are_torchvisions(small: RetinaNet, mean: float, threshold: float) -> None:
    small.score_threshold = threshold
    output = small.from_raw_maps(random_maps(mean), (HEIGHT, WIDTH))
    model = reference()
    model.score_thresh = threshold
    outputs = {"cls_logits": output.logits, "bbox_regression": output.deltas}
    with torch.no_grad():
        expected = model.postprocess_detections(
            {name: list(value.split(output.num_anchors, dim=1)) for name, value in outputs.items()},
            [list(output.anchors.split(output.num_anchors))] * 2,
            [(HEIGHT, WIDTH)] * 2,
        )
    for found, one in zip(small.detect(output), expected, strict=True):
        assert torch.equal(found.scores, one["scores"])
        assert torch.equal(found.labels, one["labels"])
        torch.testing.assert_close(found.boxes, one["boxes"], rtol=0, atol=1e-4)
        assert {-2.0: len(found) > 50, -12.0: len(found) == 0}[mean]


# torchvision's numbers, with the network


def with_something_to_see(model: detection.RetinaNet, images: Tensor) -> None:
    """Random weights, statistics of these images, scores on both sides of the threshold: at birth all are 0.01."""
    normalised = model.transform(list(images))[0].tensors
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
                nn.init.uniform_(module.weight, 0.8, 1.2)
                nn.init.uniform_(module.bias, -0.2, 0.2)
        model.backbone.train()(normalised)
        model.eval()
        born = model.head(list(model.backbone(normalised).values()))
        model.head.classification_head.cls_logits.weight.mul_(2 / born["cls_logits"].std())
        model.head.regression_head.bbox_reg.weight.mul_(0.3 / born["bbox_regression"].std())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ours", "theirs", "num_images"),
    [
        ("retinanet_r50", "retinanet_resnet50_fpn", 1),
        ("retinanet_r50", "retinanet_resnet50_fpn", 3),
        ("retinanet_r50_v2", "retinanet_resnet50_fpn_v2", 2),
    ],
)
def test_from_images_to_losses_and_detections_as_torchvision(
    make_detector: Make, ours: str, theirs: str, num_images: int
) -> None:
    build = getattr(detection, theirs)
    torch.manual_seed(0)
    images = torch.rand(num_images, 3, HEIGHT, WIDTH)
    model = build(weights=None, weights_backbone=None, num_classes=7, min_size=HEIGHT, max_size=WIDTH)
    with_something_to_see(model, images)
    detector = make_detector(ours, "num_classes=7", f"input_size=[{HEIGHT},{WIDTH}]").eval()
    torchvision.load(detector, model.state_dict())
    targets = [random_target(5 + number, number, 7) for number in range(num_images)]
    with torch.no_grad():
        output = detector(images)
        parts = detector.losses(output, targets)
        found = detector.detect(output)
        expected_found = model(list(images))
        model.training = True  # the losses, with batch norm as it is in evaluation
        expected = model(list(images), in_torchvisions_words(targets))
    torch.testing.assert_close(parts["class"], expected["classification"], rtol=1e-5, atol=0)
    torch.testing.assert_close(parts["box"], expected["bbox_regression"], rtol=1e-5, atol=0)
    for mine, other in zip(found, expected_found, strict=True):
        assert len(mine) > 20
        assert torch.equal(mine.labels, other["labels"])
        torch.testing.assert_close(mine.scores, other["scores"], rtol=1e-5, atol=0)
        torch.testing.assert_close(mine.boxes, other["boxes"], rtol=1e-5, atol=1e-3)


# The loss, by its properties


def losses_of(detector: RetinaNet, images: Tensor, targets: list[Target]) -> dict[str, Tensor]:
    return detector.losses(detector(images), targets)


MANY = [(n % 25 * 4.0, n // 25 * 4.0, n % 25 * 4.0 + 20, n // 25 * 4.0 + 16) for n in range(500)]
BATCHES = {
    "no boxes at all": [target(), target()],
    "one image without": [target((5, 5, 40, 40), (50, 10, 60, 60)), target()],
    "500 boxes": [target(*MANY), target(*MANY[::-1])],
    "points and lines": [target((5, 5, 5, 5)), target((0, 9, 96, 9), (0, 0, 160, 128))],
}


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("box_loss", ["l1", "giou"])
def test_any_number_of_boxes_gives_finite_losses_and_gradients(small: RetinaNet, name: str, box_loss: str) -> None:
    small.box_loss = box_loss  # type: ignore[assignment]
    parts = losses_of(small, torch.rand(2, 3, HEIGHT, WIDTH), BATCHES[name])
    assert set(parts) == {"class", "box"}
    assert all(part.shape == () and part.isfinite() for part in parts.values())
    torch.stack(list(parts.values())).sum().backward()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in small.parameters())
    assert parts["class"] > 0
    assert bool(parts["box"] > 0) == (name != "no boxes at all")


def test_boxes_without_area_count_as_none(small: RetinaNet) -> None:
    output = small.from_raw_maps(random_maps(), (HEIGHT, WIDTH))
    real = (30.0, 40.0, 90.0, 80.0)
    alone = small.losses(output, [target(real, labels=[2]), target()])
    among = small.losses(output, [target((5, 5, 5, 5), real, (0, 9, 9, 9), labels=[1, 2, 3]), target((9, 9, 9, 20))])
    assert {k: float(v.detach()) for k, v in among.items()} == {k: float(v.detach()) for k, v in alone.items()}


def test_the_loss_of_an_image_without_boxes_by_hand(small: RetinaNet) -> None:
    maps = [torch.zeros_like(one) for one in random_maps()]
    parts = small.losses(small.from_raw_maps(maps, (HEIGHT, WIDTH)), [target(), target()])
    num_anchors = 9 * (16 * 20 + 8 * 10 + 4 * 5 + 2 * 3 + 1 * 2)
    # Every probability is a half, so every element 0.75 * 0.5^2 * log 2.
    expected = num_anchors * NUM_CLASSES * 0.75 * 0.25 * 0.6931472
    assert float(parts["class"]) == pytest.approx(expected, rel=1e-5)
    assert float(parts["box"]) == 0


@pytest.mark.parametrize(
    ("box_loss", "shift", "expected"),
    [
        ("l1", 1.25, 1.25),
        ("smooth_l1", 1.25, 0.75),  # 1.25 - 1/2
        ("smooth_l1", 0.5, 0.125),  # 0.5^2 / 2
        ("giou", 0.25, 0.4),  # an IoU of (1 - 1/4) / (1 + 1/4), and nothing of the enclosing box is empty
        ("giou", 2.0, 4 / 3),  # no overlap, and a third of the enclosing box is empty
    ],
)
def test_the_box_loss_of_a_truth_by_hand(small: RetinaNet, box_loss: str, shift: float, expected: float) -> None:
    """The truth is an anchor, whose prediction is off by ``shift`` of its width."""
    small.box_loss = box_loss  # type: ignore[assignment]
    small.assigner.positive_iou = small.assigner.negative_iou = 0.99
    maps = [torch.zeros_like(one) for one in random_maps()]
    maps[-1].view(2, 9, 4, 1, 2)[0, 3, 0, 0, 0] = shift  # P7's fourth anchor: ratio 1, 512 px, at the corner
    output = small.from_raw_maps([one[:1] for one in maps], (HEIGHT, WIDTH))
    parts = small.losses(output, [target((-256, -256, 256, 256))])
    assert float(parts["box"]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("shift", "expected"), [(0.05, 0.05**2 / 2 / 0.1), (0.5, 0.5 - 0.05), (-0.5, 0.5 - 0.05)])
def test_smooth_l1_is_a_square_up_to_its_beta(make_detector: Make, shift: float, expected: float) -> None:
    """Fast R-CNN, arXiv:1504.08083 eq. 3, at another beta than 1: half the square over it, then a line of slope 1."""
    options = ("width=0.125", f"num_classes={NUM_CLASSES}", f"input_size=[{HEIGHT},{WIDTH}]")
    detector = make_detector("retinanet_r50", *options, "box_loss=smooth_l1", "smooth_l1_beta=0.1")
    detector.assigner.positive_iou = detector.assigner.negative_iou = 0.99
    maps = [torch.zeros_like(one) for one in random_maps()]
    maps[-1].view(2, 9, 4, 1, 2)[0, 3, 0, 0, 0] = shift
    output = detector.from_raw_maps([one[:1] for one in maps], (HEIGHT, WIDTH))
    parts = detector.losses(output, [target((-256, -256, 256, 256))])
    assert float(parts["box"]) == pytest.approx(expected, rel=1e-5)


def test_loss_parts_do_not_depend_on_the_batch_size(small: RetinaNet) -> None:
    maps, targets = random_maps(), BATCHES["one image without"]
    once = small.losses(small.from_raw_maps(maps, (HEIGHT, WIDTH)), targets)
    doubled = [one.repeat(2, 1, 1, 1) for one in maps]
    twice = small.losses(small.from_raw_maps(doubled, (HEIGHT, WIDTH)), targets * 2)
    for name, part in once.items():
        assert float(twice[name].detach()) == pytest.approx(float(part.detach()), rel=1e-5)


def test_losses_do_not_mind_the_order_of_the_boxes(small: RetinaNet) -> None:
    output = small.from_raw_maps([one[:1] for one in random_maps()], (HEIGHT, WIDTH))
    truth = random_target(40, 5)
    back = Target(XYXY(truth.boxes.flip(0)), truth.labels.flip(0), 0)
    for name, part in small.losses(output, [truth]).items():
        assert float(small.losses(output, [back])[name].detach()) == pytest.approx(float(part.detach()), rel=1e-5)


# Inputs and config


@pytest.mark.parametrize(("height", "width"), [(128, 160), (32, 32), (96, 224), (64, 416)])
def test_takes_any_multiples_of_32(small: RetinaNet, height: int, width: int) -> None:
    with torch.no_grad():
        output: Output = small.eval()(torch.rand(1, 3, height, width))
    num_cells = sum(-(-height // stride) * -(-width // stride) for stride in (8, 16, 32, 64, 128))
    assert output.logits.shape == (1, 9 * num_cells, NUM_CLASSES)
    assert output.deltas.shape == (1, *output.anchors.shape) == (1, 9 * num_cells, 4)


@pytest.mark.parametrize(("height", "width"), [(128, 100), (0, 96), (31, 31)])
def test_a_size_that_is_no_multiple_is_refused_with_the_multiple(small: RetinaNet, height: int, width: int) -> None:
    with pytest.raises(InputError) as error:
        small(torch.rand(1, 3, height, width))
    assert str(error.value) == (
        f"RetinaNet takes inputs whose height and width are multiples of 32, got {height}x{width}: "
        "set detector.input_size"
    )


def test_another_box_loss_is_refused(make_detector: Make) -> None:
    with pytest.raises(InputError, match=r"detector.box_loss must be l1, smooth_l1 or giou, got ciou"):
        make_detector("retinanet_r50", "width=0.125", "box_loss=ciou")


@pytest.mark.parametrize("beta", ["0.0", "-1.0"])
def test_a_beta_that_is_not_above_0_is_refused(make_detector: Make, beta: str) -> None:
    with pytest.raises(InputError, match=rf"^detector.smooth_l1_beta must be above 0, got {beta}$"):
        make_detector("retinanet_r50", "width=0.125", f"smooth_l1_beta={beta}")


def test_a_label_out_of_range_is_refused_with_image_and_range(small: RetinaNet) -> None:
    with pytest.raises(InputError, match=r"image 17 has label 5, outside 0 to 4: detector.num_classes is 5"):
        losses_of(small, torch.rand(1, 3, 128, 160), [target((1, 1, 9, 9), labels=[5], image_id=17)])


@pytest.mark.parametrize("frozen", [True, False])
def test_freeze_norm_keeps_the_statistics_from_birth(make_detector: Make, frozen: bool) -> None:
    detector = make_detector("retinanet_r50", "width=0.125", f"freeze_norm={frozen}")
    before = {name: value.clone() for name, value in detector.named_buffers() if "running" in name}
    detector(torch.rand(2, 3, 64, 64))
    after = dict(detector.named_buffers())
    assert len(before) == 2 * 53
    assert all(torch.equal(after[name], value) == frozen for name, value in before.items())


@pytest.mark.parametrize("name", ["retinanet_r50", "retinanet_r50_v2"])
def test_one_small_image_can_be_trained_on_at_any_width(make_detector: Make, name: str) -> None:
    """P7 is of one cell, so a group of one channel would have nothing to normalise."""
    detector = make_detector(name, "width=0.05", "num_classes=2", "freeze_norm=true")
    parts = losses_of(detector, torch.rand(1, 3, 32, 32), [target((2, 2, 30, 30))])
    assert all(part.isfinite() for part in parts.values())
