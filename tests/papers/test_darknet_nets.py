"""The Darknet of ``tests/references`` against what Darknet gave, and what its cfg files and arithmetic say."""

import json
import math
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

Reference = Any
WITH_NUMBERS = ["yolov3-tiny", "yolov2-tiny-voc"]
SIZES = [(416, 416), (320, 416)]  # width, height


# Structure


@pytest.mark.parametrize(
    ("name", "num_floats", "num_layers"),
    [
        ("yolov1", 197_328_243, 32),
        ("yolov1-tiny", 27_099_950, 16),
        ("yolov2", 50_983_561, 32),
        ("yolov2-voc", 50_676_061, 32),
        ("yolov2-tiny-voc", 15_867_885, 16),
        ("yolov3", 62_001_757, 107),
        ("yolov3-spp", 63_052_381, 114),
        ("yolov3-tiny", 8_858_734, 24),
        ("yolov4", 64_429_405, 162),
        ("yolov4-tiny", 6_062_814, 38),
    ],
)
def test_floats_and_layers(reference: Reference, name: str, num_floats: int, num_layers: int) -> None:
    net = reference.nets.net(name)
    assert reference.darknet.num_floats(net) == num_floats
    assert len(net["layers"]) == num_layers


def billion_operations(reference: Reference, name: str, side: int) -> tuple[float, float]:
    """Darknet's BFLOPs, and those of convolutions alone; local and connected layers count for nothing there."""
    net = reference.nets.net(name)
    outputs = reference.darknet.shapes(net, side, side)
    convolutions, rest = 0, 0
    for layer, before, (c, h, w) in zip(net["layers"], [(3, side, side), *outputs], outputs, strict=False):
        match layer["t"]:
            case "conv":
                convolutions += 2 * c * h * w * layer["k"] ** 2 * before[0]
            case "max":
                rest += c * h * w * layer["k"] ** 2
            case "shortcut":
                rest += c * h * w
    return (convolutions + rest) / 1e9, convolutions / 1e9


@pytest.mark.parametrize(
    ("name", "side", "published"),
    [
        ("yolov4", 608, 128.5),
        ("yolov4", 416, 60.1),
        ("yolov4-tiny", 416, 6.9),
        ("yolov3-spp", 608, 141.5),
        ("yolov3", 416, 65.9),
        ("yolov3-tiny", 416, 5.6),
    ],
)
def test_bflops_are_those_of_alexeyabs_readme(reference: Reference, name: str, side: int, published: float) -> None:
    assert round(billion_operations(reference, name, side)[0], 1) == published


def test_bflops_are_those_that_darknet_prints(reference: Reference, shared: Path) -> None:
    printed = json.loads((shared / "refs" / "facts" / "bflops.json").read_text())
    assert printed.keys() == reference.nets.NETS.keys()
    for name, values in printed.items():
        for side in (int(key) for key in values if key.isdigit()):
            expected = (values[f"{side}"], values[f"{side}_conv_only"])
            assert billion_operations(reference, name, side) == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize("name", ["yolov3", *WITH_NUMBERS])
def test_layers_are_those_that_darknet_ran(reference: Reference, shared: Path, name: str) -> None:
    ran = json.loads((shared / "refs" / "layers" / f"{name}.json").read_text())
    net = reference.nets.net(name)
    assert (net["net"], net["header"]) == (ran["net"], ran["header"])
    # gain is for the generator of weights alone
    assert net["layers"] == [{key: value for key, value in layer.items() if key != "gain"} for layer in ran["layers"]]


# Layers, by hand


def test_reorg_reads_its_input_as_a_quarter_of_the_channels(reference: Reference) -> None:
    # The (4, 2, 2) numbers 0 to 15, read as one channel of 4x4, have rows 0 1 2 3, 4 5 6 7, 8 9 10 11, 12 13 14 15.
    x = torch.arange(16.0).view(1, 4, 2, 2)
    found = reference.darknet.reorganised(x, 2)
    assert found.flatten().tolist() == [0, 2, 8, 10, 1, 3, 9, 11, 4, 6, 12, 14, 5, 7, 13, 15]
    assert found.shape == (1, 16, 1, 1)


def test_a_pool_of_stride_1_keeps_the_size_and_pads_at_the_right_and_bottom(reference: Reference) -> None:
    x = -torch.arange(1.0, 7).view(1, 1, 2, 3)
    found = reference.darknet.pooled(x, {"k": 2, "s": 1, "p": 1})
    assert found.tolist() == [[[[-1, -2, -3], [-4, -5, -6]]]]


def test_a_local_layer_with_the_same_weights_everywhere_is_a_convolution(reference: Reference) -> None:
    rng = np.random.default_rng(0)
    kernel, x = rng.random((2, 3, 3, 3), dtype=np.float32), torch.rand(1, 3, 4, 4)
    layer = {"k": 3, "s": 1, "p": 1, "act": "leaky", "n": 2}
    local = {"w": np.broadcast_to(kernel, (16, 2, 3, 3, 3)).copy(), "b": np.repeat(np.float32([-9, 1]), 16)}
    convolution = {"w": kernel, "b": np.float32([-9, 1])}
    torch.testing.assert_close(
        reference.darknet.locally_connected(x, layer, local), reference.darknet.convolved(x, layer, convolution)
    )


def test_mish(reference: Reference) -> None:
    """arXiv:1908.08681: x tanh(ln(1 + e^x))."""
    found = reference.darknet.activated(torch.tensor([-1.0, 0.0, 2.0, 30.0]), "mish").tolist()
    assert found == pytest.approx([x * math.tanh(math.log1p(math.exp(x))) for x in (-1, 0, 2, 30)])


# Against Darknet


@pytest.fixture(scope="module", params=WITH_NUMBERS)
def run(request: pytest.FixtureRequest, reference: Reference, darknet_refs: ModuleType) -> Any:
    """A network's name, itself and its heads for the images of both sizes."""
    name = request.param
    net, parameters = reference.nets.net(name), dict(darknet_refs.params(name))
    maps = {size: reference.darknet.forward(net, parameters, darknet_refs.image(name, *size)) for size in SIZES}
    return name, net, maps


@pytest.mark.parametrize("size", SIZES)
def test_forward_equals_darknet(run: Any, darknet_refs: ModuleType, shared: Path, size: tuple[int, int]) -> None:
    name, _, maps = run
    numbers = np.load(shared / "refs" / "fwd" / f"{name}.npz")
    for layer, raw in maps[size].items():
        expected = numbers[f"{size[0]}x{size[1]}/L{layer}/raw"]
        found = raw.reshape(-1)[darknet_refs.sample_idx((77, layer), raw.size)]
        assert abs(found - expected).max() <= 2e-5 * abs(expected).max()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("when", ["before_nms", "after_nms"])
def test_detections_equal_darknets(
    run: Any, reference: Reference, shared: Path, size: tuple[int, int], when: str
) -> None:
    name, net, maps = run
    numbers = json.loads((shared / "refs" / "dets" / f"{name}.json").read_text())[f"{size[0]}x{size[1]}"]
    expected = np.array([[*box["box"], p, 1e3 * label] for box in numbers[when] for label, p in box["cls"]])
    nms_iou = numbers["nms"] if when == "after_nms" else None
    found = reference.darknet.detect(net, maps[size], size[::-1], threshold=numbers["thresh"], nms_iou=nms_iou)
    pairs = np.array([[*one.box, one.score, 1e3 * one.label] for one in found])
    same = (abs(pairs[:, None] - expected) / np.maximum(1, abs(expected))).max(axis=2) <= 1e-4
    assert len(pairs) == len(expected)
    assert (same.sum(axis=0) == 1).all() and (same.sum(axis=1) == 1).all()


FORKS = {"alexeyab": {}, "pjreddie": {"ignore_score": 0.0, "box_normalizer": 1.0, "adds_up": False}}


@pytest.mark.parametrize("fork", FORKS)
@pytest.mark.parametrize("layer", [82, 94, 106])
def test_yolo_delta_equals_darknets(
    reference: Reference, darknet_refs: ModuleType, shared: Path, fork: str, layer: int
) -> None:
    facts = json.loads((shared / "refs" / "loss" / "yolov3.json").read_text())
    numbers, key = np.load(shared / "refs" / "loss" / "yolov3.npz"), f"{fork}/L{layer}/seen100000"
    case = facts["runs"][key]
    raw = darknet_refs.head((zlib.crc32(b"yolov3"), 2000 + layer), *case["head_shape"], *case["head_lo_hi"])
    truths = [reference.losses.Truth(*box, int(label)) for *box, label in facts["truth_xywhc"]]
    cfg = reference.nets.net("yolov3")["layers"][layer]
    anchors = [*zip(cfg["anchors"][::2], cfg["anchors"][1::2], strict=True)]
    delta, positive = reference.losses.yolo_delta(
        raw, truths, anchors=anchors, mask=cfg["mask"], size=(416, 416), **FORKS[fork]
    )
    flat = delta.reshape(-1)
    assert abs(flat[darknet_refs.sample_idx((78, layer), flat.size)] - numbers[f"{key}/sample"]).max() <= 1e-6
    others = np.delete(delta, 4, axis=1)
    assert np.count_nonzero(others) == len(numbers[f"{key}/nz_idx"])
    np.testing.assert_allclose(flat[numbers[f"{key}/nz_idx"]], numbers[f"{key}/nz_val"], rtol=0, atol=5e-6)
    assert {*np.flatnonzero(flat >= 0)} >= {*numbers[f"{key}/obj_nonneg_idx"]}
    assert np.count_nonzero(delta[:, 4] >= 0) == len(numbers[f"{key}/obj_nonneg_idx"])
    assert (flat**2).sum() == pytest.approx(case["delta_sumsq"], rel=1e-6)
    assert positive.sum() == np.any(others, axis=1).sum() == 2


# Losses, by hand


def test_region_delta_of_one_truth(reference: Reference) -> None:
    """One anchor of two cells' side on a map of 2x2, everything a half; the truth fills the right half."""
    truth = reference.losses.Truth(0.75, 0.5, 0.5, 1.0, 1)
    raw = np.zeros((7, 2, 2))
    delta = reference.losses.region_delta(raw, [truth], anchors=[(2.0, 2.0)], seen=12_800)[0]
    # In cell (1, 1): centre (0.5, 0) against 0.5, and its box reaches from 0.25 to 1.25: IoU 0.375 / 1.125.
    overlap = 0.375 / 1.125
    expected = [0, -0.5 / 4, math.log(0.5), 0, 5 * (overlap - 0.5) / 4, -0.5, 0.5]
    assert delta[:, 1, 1].tolist() == pytest.approx(expected)
    assert delta[:, 0, 0].tolist() == pytest.approx([0, 0, 0, 0, -0.125, 0, 0])


def test_region_delta_pulls_to_the_anchors_at_first(reference: Reference) -> None:
    raw = np.full((6, 2, 2), 0.4)
    delta = reference.losses.region_delta(raw, [], anchors=[(2.0, 2.0)], seen=12_799)[0]
    p = 1 / (1 + math.exp(-0.4))
    pull = 0.01 * (0.5 - p) * p * (1 - p)
    assert delta[:4, 0, 1].tolist() == pytest.approx([pull, pull, -0.004, -0.004])


def test_detection_delta_of_two_truths_in_a_cell(reference: Reference) -> None:
    """One cell, one class, two boxes: the second is the truth itself."""
    truths = [reference.losses.Truth(0.5, 0.5, 0.25, 0.25, 0), reference.losses.Truth(0.1, 0.1, 0.5, 0.5, 0)]
    raw = np.array([0.3, 0.2, 0.6, 0.5, 0.5, 0.1, 0.1, 0.5, 0.5, 0.5, 0.5])
    delta = reference.losses.detection_delta(raw, truths, side=1, num=2, num_classes=1)
    assert delta.tolist() == pytest.approx([0.7, -0.1, 0.4, *[0] * 8])


def test_detection_delta_asks_the_nearest_box_if_none_overlaps(reference: Reference) -> None:
    truth = reference.losses.Truth(0.9, 0.9, 0.04, 0.04, 0)
    raw = np.array([1.0, 0.0, 0.0, 0.1, 0.1, 0.2, 0.2, 0.7, 0.9, 0.1, 0.2])
    delta = reference.losses.detection_delta(raw, [truth], side=1, num=2, num_classes=1)
    assert delta.tolist() == pytest.approx([0, 0, 0, 0, 0, 0, 0, 5 * 0.2, 0, 5 * 0.1, 0])


# The generator of parameters


@pytest.mark.parametrize("name", ["yolov1-tiny", "yolov3-tiny", "yolov4-tiny"])
def test_drawn_parameters_keep_the_heads_near_one(reference: Reference, name: str) -> None:
    net = reference.nets.net(name)
    size = (448, 448) if name == "yolov1-tiny" else (96, 64)
    maps = reference.darknet.forward(net, reference.darknet.draw(net), reference.darknet.noise(*size))
    for raw in maps.values():
        assert 0.5 < raw.std() < 2


@pytest.mark.parametrize(("name", "header"), [("yolov4-tiny", 20), ("yolov1-tiny", 16)])
def test_a_written_file_has_header_and_floats(reference: Reference, tmp_path: Path, name: str, header: int) -> None:
    net = reference.nets.net(name)
    reference.darknet.write(tmp_path / "file", net, reference.darknet.draw(net))
    assert (tmp_path / "file").stat().st_size == header + 4 * reference.darknet.num_floats(net)


def test_a_written_file_is_the_one_that_darknet_read(
    reference: Reference, darknet_refs: ModuleType, tiny_weights: Path, tmp_path: Path
) -> None:
    net = reference.nets.net("yolov3-tiny")
    reference.darknet.write(tmp_path / "file", net, dict(darknet_refs.params("yolov3-tiny")))
    assert (tmp_path / "file").read_bytes() == tiny_weights.read_bytes()
