"""Every detector of Darknet's family against a Darknet derived apart from it, in ``tests/references``.

The same ``.weights`` file and image give the same heads; the same heads the same detections, and with
``detector.loss=darknet`` the same deltas.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from onestage.types import XYXY, Target

Make = Callable[..., Any]
Reference = Any
SIZES = [(192, 192), (96, 64)]  # height, width; from 192 on the pools of SPP, 5, 9 and 13 wide, all differ
QUICK = ["yolov1_tiny", "yolov2_tiny_voc", "yolov3_tiny", "yolov4", "yolov4_tiny"]
SLOW = ["yolov1_darknet", "yolov2", "yolov2_voc", "yolov3", "yolov3_spp"]  # 50 to 197 million floats


def net_of(reference: Reference, name: str) -> Any:
    return reference.nets.net({"yolov1_darknet": "yolov1"}.get(name, name.replace("_", "-")))


def size_of(net: Any) -> tuple[int, int]:
    """The input (H, W) that drawn head maps are of: connected layers leave no choice."""
    return (448, 448) if net["name"].startswith("yolov1") else (160, 224)


def some_maps(net: Any, reference: Reference, seed: int) -> dict[int, np.ndarray]:
    """Head maps drawn from a normal distribution with a deviation of a half; YOLO's have columns of no class."""
    rng, outputs = np.random.default_rng(seed), reference.darknet.shapes(net, *size_of(net))
    maps = {n: rng.normal(0, 0.5, outputs[n]).astype(np.float32) for n in reference.darknet.detection_layers(net)}
    for raw in maps.values() if net["layers"][-1]["t"] == "yolo" else ():
        raw.reshape(3, 85, *raw.shape[1:])[:, 5:, :, ::2] -= 3  # where AlexeyAB excuses no overlap
    return coarsest_first(maps)


def coarsest_first(maps: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
    """By layer of the cfg, as ``raw_maps`` lists them; YOLOv4's cfg has the finest first."""
    return dict(sorted(maps.items(), key=lambda one: one[1].shape[1]))


def as_batch(maps: dict[int, np.ndarray]) -> list[Tensor]:
    """What ``from_raw_maps`` takes, for one image; YOLOv1's are flat."""
    tensors = [torch.from_numpy(raw)[None] for raw in maps.values()]
    return [raw.flatten(1) if raw.shape[2:] == (1, 1) and len(tensors) == 1 else raw for raw in tensors]


# Forward and detections


class Network(NamedTuple):
    """A detector that read a file, and what the file holds."""

    detector: Any
    net: Any
    parameters: Any
    sizes: list[tuple[int, int]]


@pytest.fixture(scope="module", params=[*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def network(
    request: pytest.FixtureRequest, reference: Reference, make_detector: Make, tmp_path_factory: pytest.TempPathFactory
) -> Network:
    net = net_of(reference, request.param)
    parameters = reference.darknet.draw(net)
    path: Path = tmp_path_factory.mktemp("weights") / "drawn.weights"
    reference.darknet.write(path, net, parameters)
    detector = make_detector(request.param, f"weights={path}", "max_detections=2000", "nms_iou=0.45").eval()
    path.unlink()  # up to 800 MB
    return Network(detector, net, parameters, [(448, 448)] if request.param.startswith("yolov1") else SIZES)


def test_heads_equal_darknets(network: Network, reference: Reference) -> None:
    for size in network.sizes:
        image = reference.darknet.noise(*size, seed=1)
        expected = as_batch(coarsest_first(reference.darknet.forward(network.net, network.parameters, image)))
        with torch.no_grad():
            found = network.detector.raw_maps(torch.from_numpy(image)[None])
        assert [raw.shape for raw in found] == [raw.shape for raw in expected]
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4 * float(theirs.abs().max()))


def test_the_file_says_how_many_images_were_seen(network: Network) -> None:
    assert int(network.detector.seen) == 32_013_312


@pytest.mark.parametrize("with_nms", [False, True])
def test_detections_equal_darknets(network: Network, reference: Reference, with_nms: bool) -> None:
    height, width = size_of(network.net)
    maps = some_maps(network.net, reference, seed=0)
    threshold, num_above = between_the_best(reference, network.net, maps)
    nms_iou = 0.45 if with_nms else None
    theirs = reference.darknet.detect(network.net, maps, (height, width), threshold=threshold, nms_iou=nms_iou)
    x, y, w, h = np.array([one.box for one in theirs]).T
    corners = np.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], axis=1).clip(0, 1)
    # Nothing holds YOLOv1's product of linear outputs below 1, other than our detections' promise.
    scores = [min(one.score, 1.0) for one in theirs]
    expected = np.column_stack((corners, scores, [1e3 * one.label for one in theirs]))
    detector = network.detector
    detector.score_threshold, detector.nms_iou = threshold, nms_iou or 1.0
    (found,) = detector.detect(detector.from_raw_maps(as_batch(maps), (height, width)))
    boxes = found.boxes.numpy() / [width, height, width, height]
    mine = np.column_stack((boxes, found.scores.numpy(), 1e3 * found.labels.numpy()))
    assert (len(theirs) < num_above) == with_nms
    assert len(mine) == len(theirs)
    same = abs(mine[:, None] - expected).max(axis=2) <= 1e-4
    assert same.any(axis=0).all() and same.any(axis=1).all()


def between_the_best(reference: Reference, net: Any, maps: dict[int, np.ndarray]) -> tuple[float, int]:
    """A threshold far from any score, and how many pairs of box and class exceed it: about 1,000."""
    decoded = [reference.darknet.decode(net["layers"][n], raw, size_of(net)).scores for n, raw in maps.items()]
    scores = np.sort(np.concatenate(decoded), axis=None)[::-1]
    last = 900 + int(np.argmax(scores[900:1100] - scores[901:1101]))
    return float(scores[last : last + 2].mean()), last + 1


# Deltas


def some_truths(
    reference: Reference, net: Any, maps: dict[int, np.ndarray], seed: int, *, classes: int
) -> Sequence[Any]:
    """Boxes of all sizes, some in a cell with another, and eight of each map that all but equal a prediction."""
    rng = np.random.default_rng(seed)
    sides = np.exp(rng.uniform(np.log(0.03), np.log(0.9), (20, 2)))
    boxes = np.column_stack((rng.uniform(0.02, 0.98, (20, 2)), sides))
    beside = boxes[:5] * rng.uniform(0.99, 1.01, (5, 4))
    decoded = [reference.darknet.decode(net["layers"][n], raw, size_of(net)).boxes for n, raw in maps.items()]
    predicted = np.concatenate([rng.permutation(some[inside(some)])[:8] for some in decoded])
    predicted *= rng.uniform(0.99, 1.01, predicted.shape)
    every = np.concatenate((boxes, beside, predicted)).astype(np.float32)
    labels = rng.integers(0, classes, len(every))
    return [reference.losses.Truth(*box, int(label)) for box, label in zip(every.tolist(), labels, strict=True)]


def inside(boxes: np.ndarray) -> np.ndarray:
    centres, sides = boxes[:, :2], boxes[:, 2:]
    return ((centres > 0) & (centres < 1) & (sides > 0.02) & (sides < 1)).all(axis=1)


def deltas(detector: Any, net: Any, maps: dict[int, np.ndarray], truths: Sequence[Any]) -> list[np.ndarray]:
    """Minus the gradient of the summed loss with respect to each map."""
    height, width = size_of(net)
    leaves = [raw.requires_grad_() for raw in as_batch(maps)]
    values = torch.tensor([truth.box for truth in truths], dtype=torch.float64)
    centres, half = values[:, :2], values[:, 2:] / 2
    boxes = torch.cat((centres - half, centres + half), dim=1) * torch.tensor([width, height, width, height])
    labels = torch.tensor([truth.label for truth in truths])
    parts = detector.losses(detector.from_raw_maps(leaves, (height, width)), [Target(XYXY(boxes.float()), labels, 0)])
    torch.stack(list(parts.values())).sum().backward()
    return [-raw.grad[0].numpy() for raw in leaves]


def pairs_of(values: Sequence[float]) -> list[tuple[float, float]]:
    return [*zip(values[::2], values[1::2], strict=True)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["yolov1_darknet", "yolov1_tiny"])
def test_deltas_equal_yolov1s(make_detector: Make, reference: Reference, name: str, seed: int) -> None:
    net = net_of(reference, name)
    layer, maps = net["layers"][-1], some_maps(net, reference, seed)
    (raw,) = maps.values()
    truths = some_truths(reference, net, maps, seed, classes=20)
    expected = reference.losses.detection_delta(raw, truths, num=layer["num"])
    (found,) = deltas(make_detector(name, "loss=darknet", "width=0.125"), net, maps, truths)
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("seen", [0, 12_799, 12_800])
@pytest.mark.parametrize(
    ("name", "loss", "fork"),
    [
        ("yolov2", "darknet", "alexeyab"),
        ("yolov2_voc", "darknet", "alexeyab"),
        ("yolov2_voc", "paper", "pjreddie"),
        ("yolov2_tiny_voc", "darknet", "alexeyab"),
    ],
)
def test_deltas_equal_yolov2s(
    make_detector: Make, reference: Reference, name: str, loss: str, fork: str, seen: int
) -> None:
    net = net_of(reference, name)
    layer, maps = net["layers"][-1], some_maps(net, reference, seen)
    (raw,) = maps.values()
    truths = some_truths(reference, net, maps, seen, classes=layer["classes"])
    expected = reference.losses.region_delta(raw, truths, anchors=pairs_of(layer["anchors"]), seen=seen, fork=fork)
    assert (expected[:, 4] == 0).any()  # some are excused
    detector = make_detector(name, f"loss={loss}", "width=0.125")
    detector.seen.fill_(seen)
    (found,) = deltas(detector, net, maps, truths)
    np.testing.assert_allclose(found.reshape(expected.shape), expected, rtol=0, atol=5e-5)


def yolo_deltas(
    reference: Reference, net: Any, maps: dict[int, np.ndarray], truths: Sequence[Any], **more: float
) -> list[Any]:
    found = []
    for number, raw in maps.items():
        layer = net["layers"][number]
        delta = reference.losses.yolo_delta(
            raw,
            truths,
            anchors=pairs_of(layer["anchors"]),
            mask=layer["mask"],
            size=size_of(net),
            ignore_iou=layer["ignore_thresh"],
            positive_iou=layer.get("iou_thresh", 1.0),
            box_normalizer=0.0 if "iou_loss" in layer else 0.75,
            scale_x_y=layer.get("scale_x_y", 1.0),
            **more,
        )
        found.append(delta)
    assert any((delta[:, 4] == 0).any() for delta, _ in found)  # some are excused
    return found


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", ["yolov3", "yolov3_spp", "yolov3_tiny"])
def test_deltas_equal_yolov3s(make_detector: Make, reference: Reference, name: str, seed: int) -> None:
    net = net_of(reference, name)
    maps = some_maps(net, reference, seed)
    truths = some_truths(reference, net, maps, seed, classes=80)
    every = deltas(make_detector(name, "loss=darknet", "width=0.125"), net, maps, truths)
    for found, (expected, _) in zip(every, yolo_deltas(reference, net, maps, truths), strict=True):
        np.testing.assert_allclose(found.reshape(expected.shape), expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize(("seed", "label_smoothing"), [(0, 0.0), (1, 0.0), (2, 0.1)])
@pytest.mark.parametrize("name", ["yolov4", "yolov4_tiny"])
def test_objectness_and_class_deltas_equal_yolov4s(
    make_detector: Make, reference: Reference, name: str, seed: int, label_smoothing: float
) -> None:
    """Darknet's box delta is no gradient of a loss."""
    net = net_of(reference, name)
    maps = some_maps(net, reference, seed)
    truths = some_truths(reference, net, maps, seed, classes=80)
    detector = make_detector(name, "loss=darknet", "width=0.125", f"label_smoothing={label_smoothing}")
    expected_of = yolo_deltas(reference, net, maps, truths, label_smoothing=label_smoothing)
    for flat, (expected, positive) in zip(deltas(detector, net, maps, truths), expected_of, strict=True):
        found = flat.reshape(expected.shape)
        np.testing.assert_allclose(found[:, 4:], expected[:, 4:], rtol=0, atol=5e-5)
        assert ((found[:, :4] != 0).any(axis=1) == positive).all()
