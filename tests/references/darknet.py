"""Darknet in plain terms: draws parameters, writes them as a ``.weights`` file, runs a network, decodes boxes.

The conventions are AlexeyAB's on the CPU. Networks are those of ``nets.py``; parameters are arrays by layer number,
``b`` biases, ``s`` scales, ``m`` rolling means, ``v`` rolling variances and ``w`` weights, in the shapes in which a
file holds them. C channels, H rows, W columns, A anchors, K classes, N candidates.
"""

import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Layer = dict[str, Any]
Net = dict[str, Any]
Floats = NDArray[np.floating[Any]]
Parameters = Mapping[str, Floats]
BN_EPSILON = 1e-5
DETECTION_LAYERS = ("detection", "region", "yolo")


# Sizes


def shapes(net: Net, height: int, width: int) -> list[tuple[int, int, int]]:
    """What each layer gives for an input (3, height, width), as (C, H, W)."""
    found: list[tuple[int, int, int]] = []
    c, h, w = 3, height, width
    for layer in net["layers"]:
        match layer["t"]:
            case "conv" | "local":
                c, (h, w) = layer["n"], ((side + 2 * layer["p"] - layer["k"]) // layer["s"] + 1 for side in (h, w))
            case "max":
                h, w = ((side + layer["p"] - layer["k"]) // layer["s"] + 1 for side in (h, w))
            case "fc":
                c, h, w = layer["n"], 1, 1
            case "reorg":
                c, h, w = c * layer["s"] ** 2, h // layer["s"], w // layer["s"]
            case "up":
                h, w = h * layer["s"], w * layer["s"]
            case "route":
                c = sum(found[source][0] for source in layer["from"]) // layer.get("groups", 1)
                h, w = found[layer["from"][0]][1:]
        found.append((c, h, w))
    return found


def parameter_shapes(net: Net) -> dict[int, dict[str, tuple[int, ...]]]:
    """The shapes of the values that a file holds for each layer, in their order there, at the net's own input size."""
    outputs = shapes(net, net["net"]["h"], net["net"]["w"])
    found: dict[int, dict[str, tuple[int, ...]]] = {}
    for number, layer in enumerate(net["layers"]):
        c, h, w = outputs[number - 1] if number else (3, net["net"]["h"], net["net"]["w"])
        match layer["t"]:
            case "conv":
                norm = dict.fromkeys("smv", (layer["n"],)) if layer.get("bn") else {}
                found[number] = {"b": (layer["n"],), **norm, "w": (layer["n"], c, layer["k"], layer["k"])}
            case "local":
                _, rows, columns = outputs[number]
                weights = (rows * columns, layer["n"], c, layer["k"], layer["k"])
                found[number] = {"b": (layer["n"] * rows * columns,), "w": weights}
            case "fc":
                found[number] = {"b": (layer["n"],), "w": (layer["n"], c * h * w)}
    return found


def num_floats(net: Net) -> int:
    """The floats in the network's ``.weights`` file."""
    return sum(math.prod(shape) for values in parameter_shapes(net).values() for shape in values.values())


# Forward


def activated(x: Tensor, kind: str) -> Tensor:
    match kind:
        case "leaky":
            return torch.where(x > 0, x, 0.1 * x)
        case "mish":
            return x * torch.tanh(F.softplus(x, threshold=20))
        case "linear":
            return x
    raise ValueError(f"no activation {kind}")


def convolved(x: Tensor, layer: Layer, values: Parameters) -> Tensor:
    tensors = {key: torch.from_numpy(value) for key, value in values.items()}
    y = F.conv2d(x, tensors["w"], stride=layer["s"], padding=layer["p"])
    if layer.get("bn"):
        s, m, v = (tensors[key].view(-1, 1, 1) for key in "smv")
        y = s * (y - m) / torch.sqrt(v + BN_EPSILON)
    return activated(y + tensors["b"].view(-1, 1, 1), layer["act"])


def locally_connected(x: Tensor, layer: Layer, values: Parameters) -> Tensor:
    """A convolution whose every place has weights of its own."""
    places = F.unfold(x, layer["k"], padding=layer["p"], stride=layer["s"])[0]  # (C k k, H W)
    weights = torch.from_numpy(values["w"]).flatten(2)  # (H W, n, C k k)
    y = torch.bmm(weights, places.T[:, :, None])[..., 0].T  # (n, H W)
    side = math.isqrt(y.shape[1])
    y = y.reshape(1, layer["n"], side, side) + torch.from_numpy(values["b"]).view(layer["n"], side, side)
    return activated(y, layer["act"])


def connected(x: Tensor, layer: Layer, values: Parameters) -> Tensor:
    y = torch.from_numpy(values["w"]) @ x.flatten() + torch.from_numpy(values["b"])
    return activated(y.view(1, -1, 1, 1), layer["act"])


def pooled(x: Tensor, layer: Layer) -> Tensor:
    """Outside the map is -inf; of an odd padding the larger part is on the right and at the bottom."""
    before, after = layer["p"] // 2, layer["p"] - layer["p"] // 2
    return F.max_pool2d(F.pad(x, (before, after, before, after), value=-math.inf), layer["k"], layer["s"])


def reorganised(x: Tensor, stride: int) -> Tensor:
    """[reorg] as Darknet has it: of the right numbers in an order that is no space-to-depth."""
    _, c, h, w = x.shape
    wide = x.reshape(c // stride**2, h * stride, w * stride)
    parts = [wide[:, a::stride, b::stride] for a in range(stride) for b in range(stride)]
    return torch.stack(parts).reshape(1, c * stride**2, h // stride, w // stride)


def routed(outputs: list[Tensor], layer: Layer) -> Tensor:
    joined = torch.cat([outputs[source] for source in layer["from"]], dim=1)
    return joined.chunk(layer.get("groups", 1), dim=1)[layer.get("group_id", 0)]


ParametersOf = Callable[[int, Tensor], Parameters]
"""The parameters of a layer by its number, and by what goes into it."""


def walk(net: Net, image: Floats, parameters_of: ParametersOf) -> list[Tensor]:
    """The output (1, C, H, W) of every layer; detection layers and dropout pass on what they get."""
    outputs: list[Tensor] = []
    x = torch.from_numpy(image)[None]
    for number, layer in enumerate(net["layers"]):
        match layer["t"]:
            case "conv":
                x = convolved(x, layer, parameters_of(number, x))
            case "local":
                x = locally_connected(x, layer, parameters_of(number, x))
            case "fc":
                x = connected(x, layer, parameters_of(number, x))
            case "max":
                x = pooled(x, layer)
            case "reorg":
                x = reorganised(x, layer["s"])
            case "up":
                x = x.repeat_interleave(layer["s"], dim=2).repeat_interleave(layer["s"], dim=3)
            case "route":
                x = routed(outputs, layer)
            case "shortcut":
                x = x + outputs[layer["from"]]
        outputs.append(x)
    return outputs


def forward(net: Net, parameters: Mapping[int, Parameters], image: Floats) -> dict[int, Floats]:
    """For an image (3, H, W), what goes into each detection layer, (C, H, W), by its number and in order of the cfg."""
    with torch.no_grad():
        outputs = walk(net, image, lambda number, _: parameters[number])
    return {number: outputs[number][0].numpy() for number in detection_layers(net)}


def detection_layers(net: Net) -> list[int]:
    return [number for number, layer in enumerate(net["layers"]) if layer["t"] in DETECTION_LAYERS]


# Parameters


def draw(net: Net, seed: int = 0) -> dict[int, Parameters]:
    """Random parameters that keep the activations near one, whatever the depth: a noise image is sent along.

    Weights of one output sum to zero, or the mean of the activations would drown what differs between places.
    """
    rng = np.random.default_rng(seed)
    found: dict[int, Parameters] = {}
    shapes_of = parameter_shapes(net)
    ranges = {"s": (0.7, 1.3), "m": (-0.3, 0.3), "v": (0.7, 1.3), "b": (-0.3, 0.3)}

    def drawn(number: int, x: Tensor) -> Parameters:
        *vectors, _ = shapes_of[number]
        shape = shapes_of[number]["w"]
        fan_in = math.prod(shape[-3:] if len(shape) > 2 else shape[-1:])
        weights = rng.random((math.prod(shape) // fan_in, fan_in), dtype=np.float32)
        weights -= weights.mean(axis=1, keepdims=True)
        weights *= np.float32(math.sqrt(12 / fan_in) / float(x.std()))
        values = {key: rng.uniform(*ranges[key], shapes_of[number][key]).astype(np.float32) for key in vectors}
        found[number] = {**values, "w": weights.reshape(shape)}
        return found[number]

    # A fully connected layer fixes the size; else the smallest that gives the deepest map a few cells will do.
    fixed = any(layer["t"] == "fc" for layer in net["layers"])
    height, width = (net["net"]["h"], net["net"]["w"]) if fixed else (128, 128)
    with torch.no_grad():
        walk(net, noise(height, width, seed), drawn)
    return found


def noise(height: int, width: int, seed: int = 0) -> Floats:
    """An image (3, height, width) float32 in [0, 1): coarse blocks of colour under fine noise."""
    rng = np.random.default_rng((seed, height, width))
    blocks = rng.random((3, -(-height // 16), -(-width // 16)), dtype=np.float32)
    coarse = blocks.repeat(16, axis=1).repeat(16, axis=2)[:, :height, :width]
    return np.float32(0.7) * coarse + np.float32(0.3) * rng.random((3, height, width), dtype=np.float32)


def write(path: Path, net: Net, parameters: Mapping[int, Parameters]) -> None:
    """A ``.weights`` file with the header of ``net``: ``seen`` has eight bytes from version 0.2 on."""
    header = net["header"]
    version = (header["major"], header["minor"])
    with path.open("wb") as file:
        file.write(struct.pack("<iii", *version, header["revision"]))
        file.write(struct.pack("<Q" if version >= (0, 2) else "<I", header["seen"]))
        for number, values in parameter_shapes(net).items():
            for key in values:
                parameters[number][key].astype("<f4", copy=False).tofile(file)


# Detections


class Candidates(NamedTuple):
    """Boxes (N, 4) as centre and size relative to the input, and scores (N, K): objectness times class."""

    boxes: Floats
    scores: Floats


class Found(NamedTuple):
    """One box of one class; ``box`` as in Candidates."""

    box: tuple[float, float, float, float]
    label: int
    score: float


def sigmoid(x: Floats) -> Floats:
    return 1 / (1 + np.exp(-x))


def softmax(x: Floats, axis: int) -> Floats:
    powers = np.exp(x - x.max(axis=axis, keepdims=True))
    return powers / powers.sum(axis=axis, keepdims=True)


def decode(layer: Layer, raw: Floats, size: tuple[int, int]) -> Candidates:
    """All boxes of a detection layer for what goes into it (C, H, W), given the ``size`` (H, W) of the network's input.

    In the order anchor, row, column; of [detection] row, column, box.
    """
    x = raw.astype(np.float64)
    return decode_flat(layer, x) if layer["t"] == "detection" else decode_map(layer, x, size)


def decode_map(layer: Layer, raw: Floats, size: tuple[int, int]) -> Candidates:
    h, w = raw.shape[1:]
    x = raw.reshape(-1, 5 + layer["classes"], h, w)
    rows, columns = np.mgrid[:h, :w]
    anchors = np.array(layer["anchors"], dtype=np.float64).reshape(-1, 2)
    if layer["t"] == "yolo":
        anchors = anchors[layer["mask"]] / (size[1], size[0])
        classes = sigmoid(x[:, 5:])
    else:
        anchors = anchors / (w, h)
        classes = softmax(x[:, 5:], axis=1)
    scale = layer.get("scale_x_y", 1.0)
    within = scale * sigmoid(x[:, :2]) - (scale - 1) / 2
    sides = np.exp(x[:, 2:4]) * anchors[:, :, None, None]
    boxes = np.stack([(columns + within[:, 0]) / w, (rows + within[:, 1]) / h, sides[:, 0], sides[:, 1]], axis=-1)
    scores = np.moveaxis(sigmoid(x[:, 4:5]) * classes, 1, -1)
    return Candidates(boxes.reshape(-1, 4), scores.reshape(-1, layer["classes"]))


def decode_flat(layer: Layer, raw: Floats) -> Candidates:
    cells, num, k = layer["side"] ** 2, layer["num"], layer["classes"]
    classes, objectness, boxes = np.split(raw.reshape(-1), [cells * k, cells * (k + num)])
    scores = objectness.reshape(cells, num, 1) * classes.reshape(cells, 1, k)
    found = boxes.reshape(cells, num, 4).copy()
    found[..., 2:] **= 2
    found[..., 0] = (found[..., 0] + (np.arange(cells) % layer["side"])[:, None]) / layer["side"]
    found[..., 1] = (found[..., 1] + (np.arange(cells) // layer["side"])[:, None]) / layer["side"]
    return Candidates(found.reshape(-1, 4), scores.reshape(-1, k))


def overlaps(box: Floats, boxes: Floats, beta: float | None) -> Floats:
    """IoU of a box (4,) with boxes (N, 4), as (N,); with ``beta`` less (d2 / c2) ** beta, as ``greedynms`` has it.

    d is the distance of the centres, c the diagonal of the box around both.
    """
    left, right = box[:2] - box[2:] / 2, box[:2] + box[2:] / 2
    lefts, rights = boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2
    shared = (np.minimum(right, rights) - np.maximum(left, lefts)).clip(0).prod(axis=1)
    iou = shared / (box[2:].prod() + boxes[:, 2:].prod(axis=1) - shared)
    if beta is None:
        return iou
    diagonal = ((np.maximum(right, rights) - np.minimum(left, lefts)) ** 2).sum(axis=1)
    return iou - (((box[:2] - boxes[:, :2]) ** 2).sum(axis=1) / diagonal) ** beta


def detect(
    net: Net, maps: Mapping[int, Floats], size: tuple[int, int], *, threshold: float, nms_iou: float | None = 0.45
) -> list[Found]:
    """Boxes and classes that score above ``threshold``, after NMS by class unless ``nms_iou`` is None."""
    layers = [net["layers"][number] for number in maps]
    decoded = [decode(layer, raw, size) for layer, raw in zip(layers, maps.values(), strict=True)]
    boxes, scores = (np.concatenate(parts) for parts in zip(*decoded, strict=True))
    beta = layers[-1]["beta_nms"] if layers[-1].get("nms_kind") == "greedynms" else None
    found = []
    for label in range(scores.shape[1]):
        left = [int(n) for n in np.argsort(-scores[:, label], kind="stable") if scores[n, label] > threshold]
        while left:
            best, *left = left
            x, y, w, h = boxes[best].tolist()
            found.append(Found((x, y, w, h), label, float(scores[best, label])))
            if nms_iou is not None and left:
                kept = overlaps(boxes[best], boxes[left], beta) <= nms_iou
                left = [n for n, keep in zip(left, kept, strict=True) if keep]
    return found
