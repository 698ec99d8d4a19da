"""What Darknet's detection layers send back, in loops over cells, boxes and truths as it has them.

A delta is added to the update, so it is minus the gradient of a loss with respect to what goes into the layer. Each is
of one image, in AlexeyAB's form unless said otherwise. C channels, h rows, w columns, A anchors, K classes; boxes are
centre and size relative to the input.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Box = tuple[float, float, float, float]
PULLED_TO_ANCHORS = 12_800  # images; below that [region] pulls every box to its anchor
PULL = 0.01


class Truth(NamedTuple):
    """A box (centre x, centre y, width, height) in [0, 1], and its class."""

    x: float
    y: float
    w: float
    h: float
    label: int

    @property
    def box(self) -> Box:
        return self.x, self.y, self.w, self.h

    def cell(self, rows: int, columns: int) -> tuple[int, int]:
        return int(self.y * rows), int(self.x * columns)


class YoloDelta(NamedTuple):
    """``delta`` (A, 5 + K, h, w) of the anchors of the mask, and which of them (A, h, w) answer for a truth."""

    delta: Floats
    positive: NDArray[np.bool_]


def sigmoid(x: Floats) -> Floats:
    return 1 / (1 + np.exp(-x))


def iou(a: Box, b: Box) -> float:
    width = min(a[0] + a[2] / 2, b[0] + b[2] / 2) - max(a[0] - a[2] / 2, b[0] - b[2] / 2)
    height = min(a[1] + a[3] / 2, b[1] + b[3] / 2) - max(a[1] - a[3] / 2, b[1] - b[3] / 2)
    if width < 0 or height < 0:
        return 0.0
    shared = width * height
    return shared / (a[2] * a[3] + b[2] * b[3] - shared)


def shape_iou(truth: Truth, width: float, height: float) -> float:
    """IoU of two boxes laid on one centre."""
    return iou((0, 0, truth.w, truth.h), (0, 0, width, height))


def places(num: int, rows: int, columns: int) -> Iterator[tuple[int, int, int]]:
    for row in range(rows):
        for column in range(columns):
            for n in range(num):
                yield n, row, column


def yolo_delta(
    raw: Floats,
    truths: Sequence[Truth],
    *,
    anchors: Sequence[tuple[float, float]],
    mask: Sequence[int],
    size: tuple[int, int],
    ignore_iou: float = 0.7,
    ignore_score: float = 0.25,
    positive_iou: float = 1.0,
    box_normalizer: float = 0.75,
    adds_up: bool = True,
    label_smoothing: float = 0.0,
    scale_x_y: float = 1.0,
) -> YoloDelta:
    """Of [yolo] with squared box errors, for ``raw`` (C, h, w), all ``anchors`` in pixels, and ``size`` (H, W).

    ``ignore_score`` is the class probability that a prediction must exceed for its overlap with a truth to excuse it;
    ``positive_iou`` is cfg's iou_thresh: anchors above it are positive beside the best one, at 1 none.
    pjreddie: ``ignore_score=0``, ``box_normalizer=1``, ``adds_up=False``, a later truth on the same anchor overwrites.
    For iou_loss=ciou give ``box_normalizer=0``: objectness, classes and ``positive`` are right, box deltas left out.
    """
    h, w = raw.shape[1:]
    x = raw.reshape(len(mask), -1, h, w).astype(np.float64)
    num_classes = x.shape[1] - 5
    out = sigmoid(x)
    out[:, :2] = scale_x_y * out[:, :2] - (scale_x_y - 1) / 2
    out[:, 2:4] = x[:, 2:4]
    shapes = [(width / size[1], height / size[0]) for width, height in anchors]
    delta, positive = np.zeros_like(x), np.zeros((len(mask), h, w), dtype=bool)

    for n, row, column in places(len(mask), h, w):
        tx, ty, tw, th, objectness, *classes = out[n, :, row, column].tolist()
        width, height = shapes[mask[n]]
        predicted = ((column + tx) / w, (row + ty) / h, math.exp(tw) * width, math.exp(th) * height)
        best = max((iou(predicted, truth.box) for truth in truths), default=0.0)
        excused = best > ignore_iou and max(classes) > ignore_score
        delta[n, 4, row, column] = 0 if excused else -objectness

    def assign(truth: Truth, n: int) -> None:
        row, column = truth.cell(h, w)
        at, got = delta[n, :, row, column], out[n, :, row, column]
        width, height = shapes[mask[n]]
        wanted = (truth.x * w - column, truth.y * h - row, math.log(truth.w / width), math.log(truth.h / height))
        box = box_normalizer * (2 - truth.w * truth.h) * (np.array(wanted) - got[:4])
        at[:4] = at[:4] + box if adds_up else box
        at[4] = 1 - got[4]
        # An anchor that has a class already only gets one more.
        labels = [truth.label] if at[5 + truth.label] != 0 else range(num_classes)
        for label in labels:
            is_it = float(label == truth.label)
            at[5 + label] = is_it * (1 - label_smoothing) + 0.5 * label_smoothing - got[5 + label]
        positive[n, row, column] = True

    for truth in truths:
        overlaps = [shape_iou(truth, *shape) for shape in shapes]
        best_n = int(np.argmax(overlaps))
        if best_n in mask:
            assign(truth, mask.index(best_n))
        for n, anchor in enumerate(mask):
            if anchor != best_n and overlaps[anchor] > positive_iou:
                assign(truth, n)
    return YoloDelta(delta, positive)


def region_delta(
    raw: Floats,
    truths: Sequence[Truth],
    *,
    anchors: Sequence[tuple[float, float]],
    seen: int,
    ignore_iou: float = 0.6,
    object_scale: float = 5.0,
    noobject_scale: float = 1.0,
    class_scale: float = 1.0,
    coord_scale: float = 1.0,
    fork: str = "alexeyab",
) -> Floats:
    """Of [region] with bias_match, absolute, rescore and softmax: (A, 5 + K, h, w) for ``raw`` (C, h, w).

    ``anchors`` are in cells; ``seen`` images came before. A later truth on the same anchor overwrites an earlier one.
    The ``fork`` "pjreddie" leaves out the logistic's slope, and multiplies a truth's coordinates by 2 - w h.
    """
    h, w = raw.shape[1:]
    x = raw.reshape(len(anchors), -1, h, w).astype(np.float64)
    powers = np.exp(x[:, 5:] - x[:, 5:].max(axis=1, keepdims=True))
    probabilities = powers / powers.sum(axis=1, keepdims=True)
    centres, objectness = sigmoid(x[:, :2]), sigmoid(x[:, 4])
    delta = np.zeros_like(x)

    def slope(p: Any) -> Any:
        return p * (1 - p) if fork == "alexeyab" else 1.0

    def predicted(n: int, row: int, column: int) -> Box:
        (px, py), (width, height) = centres[n, :, row, column], anchors[n]
        tw, th = x[n, 2:4, row, column]
        return (column + px) / w, (row + py) / h, math.exp(tw) * width / w, math.exp(th) * height / h

    def pull(box: Box, n: int, row: int, column: int, scale: float) -> None:
        p, at = centres[n, :, row, column], delta[n, :, row, column]
        inside = np.array([box[0] * w - column, box[1] * h - row])
        sides = np.log([box[2] * w / anchors[n][0], box[3] * h / anchors[n][1]])
        at[:2] = scale * (inside - p) * slope(p)
        at[2:4] = scale * (sides - x[n, 2:4, row, column])

    for n, row, column in places(len(anchors), h, w):
        best = max((iou(predicted(n, row, column), truth.box) for truth in truths), default=0.0)
        p = objectness[n, row, column]
        delta[n, 4, row, column] = 0 if best > ignore_iou else -noobject_scale * p * slope(p)
        if seen < PULLED_TO_ANCHORS:
            anchor = ((column + 0.5) / w, (row + 0.5) / h, anchors[n][0] / w, anchors[n][1] / h)
            pull(anchor, n, row, column, PULL)

    for truth in truths:
        row, column = truth.cell(h, w)
        n = int(np.argmax([shape_iou(truth, width / w, height / h) for width, height in anchors]))
        size_scale = 1.0 if fork == "alexeyab" else 2 - truth.box[2] * truth.box[3]
        pull(truth.box, n, row, column, coord_scale * size_scale)
        p, at = objectness[n, row, column], delta[n, :, row, column]
        at[4] = object_scale * (iou(predicted(n, row, column), truth.box) - p) * slope(p)
        at[5:] = -class_scale * probabilities[n, :, row, column]
        at[5 + truth.label] += class_scale
    return delta


def detection_delta(
    raw: Floats,
    truths: Sequence[Truth],
    *,
    side: int = 7,
    num: int = 3,
    num_classes: int = 20,
    object_scale: float = 1.0,
    noobject_scale: float = 0.5,
    class_scale: float = 1.0,
    coord_scale: float = 5.0,
) -> Floats:
    """Of [detection] with sqrt and rescore, for ``raw`` flat: classes, objectness, boxes, each by cell.

    Of several truths in a cell the first stays.
    """
    cells = side * side
    x = raw.astype(np.float64).reshape(-1)
    splits = [cells * num_classes, cells * (num_classes + num)]
    classes, objectness, boxes = np.split(x, splits)
    delta = np.zeros_like(x)
    delta_classes, delta_objectness, delta_boxes = np.split(delta, splits)  # views
    classes, delta_classes = classes.reshape(cells, num_classes), delta_classes.reshape(cells, num_classes)
    objectness, delta_objectness = objectness.reshape(cells, num), delta_objectness.reshape(cells, num)
    boxes, delta_boxes = boxes.reshape(cells, num, 4), delta_boxes.reshape(cells, num, 4)
    delta_objectness[:] = -noobject_scale * objectness

    taken: set[int] = set()
    for truth in truths:
        row, column = truth.cell(side, side)
        cell = row * side + column
        if cell in taken:
            continue
        taken.add(cell)
        delta_classes[cell] = -class_scale * classes[cell]
        delta_classes[cell, truth.label] += class_scale

        inside = (truth.x * side - column, truth.y * side - row)
        wanted: Box = (inside[0] / side, inside[1] / side, truth.w, truth.h)
        found: list[Box] = [(bx / side, by / side, bw**2, bh**2) for bx, by, bw, bh in boxes[cell].tolist()]
        overlaps = [iou(box, wanted) for box in found]
        if max(overlaps) > 0:
            best = int(np.argmax(overlaps))
        else:
            best = int(np.argmin([sum((a - b) ** 2 for a, b in zip(box, wanted, strict=True)) for box in found]))
        delta_objectness[cell, best] = object_scale * (overlaps[best] - objectness[cell, best])
        target = np.array([*inside, math.sqrt(truth.w), math.sqrt(truth.h)])
        delta_boxes[cell, best] = coord_scale * (target - boxes[cell, best])
    return delta
