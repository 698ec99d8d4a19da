"""Darknet's networks as data: every layer of a cfg, in its order.

Derived from the cfg files and not from the package, so that the two can be held against each other. A layer is a dict
whose ``t`` is its type; ``from`` counts layers from 0; ``p`` pads a convolution on each side and a pool in total.
Anchors are in pixels of the input for [yolo], in cells for [region].
"""

from functools import cache
from typing import Any

Layer = dict[str, Any]
Net = dict[str, Any]

YOLOV2_COCO = (0.57273, 0.677385, 1.87446, 2.06253, 3.33843, 5.47434, 7.88282, 3.52778, 9.77052, 9.16828)
YOLOV2_VOC = (1.3221, 1.73145, 3.19275, 4.00944, 5.05587, 8.09892, 9.47112, 4.84053, 11.2364, 10.0071)
YOLOV2_TINY_VOC = (1.08, 1.19, 3.42, 4.41, 6.63, 11.38, 9.42, 5.11, 16.62, 10.52)
YOLOV3 = (10, 13, 16, 30, 33, 23, 30, 61, 62, 45, 59, 119, 116, 90, 156, 198, 373, 326)
YOLO_TINY = (10, 14, 23, 27, 37, 58, 81, 82, 135, 169, 344, 319)
YOLOV4 = (12, 16, 19, 36, 40, 28, 36, 75, 76, 55, 72, 146, 142, 110, 192, 243, 459, 401)


# Layers, with ``from`` as a cfg writes it: negative counts back from the layer itself.


def conv(n: int, k: int, s: int = 1, act: str = "leaky") -> Layer:
    return {"t": "conv", "n": n, "k": k, "s": s, "p": k // 2, "act": act, "bn": 1}


def head(n: int) -> Layer:
    return {"t": "conv", "n": n, "k": 1, "s": 1, "p": 0, "act": "linear"}


def pool(k: int = 2, s: int = 2) -> Layer:
    return {"t": "max", "k": k, "s": s, "p": k - 1}


def route(*layers: int, **groups: int) -> Layer:
    return {"t": "route", "from": [*layers], **groups}


def shortcut() -> Layer:
    return {"t": "shortcut", "from": -3, "act": "linear"}


def up() -> Layer:
    return {"t": "up", "s": 2}


def yolo(mask: tuple[int, ...], anchors: tuple[int, ...], **more: Any) -> Layer:
    common = {"classes": 80, "num": len(anchors) // 2, "ignore_thresh": 0.7, "truth_thresh": 1, "random": 1}
    return {"t": "yolo", "mask": [*mask], "anchors": [*anchors], **common, "jitter": 0.3, **more}


def yolo_v4(mask: tuple[int, ...], anchors: tuple[int, ...], scale_x_y: float, **more: Any) -> Layer:
    loss = {"iou_loss": "ciou", "iou_normalizer": 0.07, "cls_normalizer": 1.0}
    return yolo(mask, anchors, scale_x_y=scale_x_y, **loss, nms_kind="greedynms", beta_nms=0.6, **more)


def region(anchors: tuple[float, ...], *, classes: int, jitter: float) -> Layer:
    scales = {"object_scale": 5, "noobject_scale": 1, "class_scale": 1, "coord_scale": 1}
    flags = {"bias_match": 1, "softmax": 1, "rescore": 1, "absolute": 1, "random": 1, "thresh": 0.6}
    return {"t": "region", "anchors": [*anchors], "classes": classes, "coords": 4, "num": 5, "jitter": jitter} | (
        scales | flags
    )


def detection(*, num: int) -> Layer:
    scales = {"object_scale": 1, "noobject_scale": 0.5, "class_scale": 1, "coord_scale": 5}
    flags = {"softmax": 0, "sqrt": 1, "rescore": 1, "jitter": 0.2}
    return {"t": "detection", "classes": 20, "coords": 4, "side": 7, "num": num, **scales, **flags}


def alternating(n: int, count: int) -> list[Layer]:
    """1x1 and 3x3 by turns: n channels, twice as many, n, …: ``count`` convolutions."""
    return [conv(2 * n, 3) if number % 2 else conv(n, 1) for number in range(count)]


# Networks


def yolov1() -> list[Layer]:
    return [
        *(conv(64, 7, 2), pool(), conv(192, 3), pool()),
        *(conv(128, 1), conv(256, 3), conv(256, 1), conv(512, 3), pool()),
        *(*alternating(256, 8), *alternating(512, 2), pool()),
        *alternating(512, 4),
        *(conv(1024, 3), conv(1024, 3, 2), conv(1024, 3), conv(1024, 3)),
        {"t": "local", "n": 256, "k": 3, "s": 1, "p": 1, "act": "leaky"},
        {"t": "dropout", "probability": 0.5},
        {"t": "fc", "n": 1715, "act": "linear"},
        detection(num=3),
    ]


def yolov1_tiny() -> list[Layer]:
    pooled = [layer for n in (16, 32, 64, 128, 256, 512) for layer in (conv(n, 3), pool())]
    return [*pooled, conv(1024, 3), conv(256, 3), {"t": "fc", "n": 1470, "act": "linear"}, detection(num=2)]


def yolov2(anchors: tuple[float, ...], *, classes: int) -> list[Layer]:
    return [
        *(conv(32, 3), pool(), conv(64, 3), pool()),
        *(conv(128, 3), conv(64, 1), conv(128, 3), pool()),
        *(conv(256, 3), conv(128, 1), conv(256, 3), pool()),
        *(conv(512, 3), *alternating(256, 4), pool()),
        *(conv(1024, 3), *alternating(512, 4)),
        *(conv(1024, 3), conv(1024, 3)),
        *(route(-9), conv(64, 1), {"t": "reorg", "s": 2}, route(-1, -4)),
        *(conv(1024, 3), head(5 * (5 + classes)), region(anchors, classes=classes, jitter=0.3)),
    ]


def tiny_backbone() -> list[Layer]:
    """To 1024 channels with stride 32; the last pool keeps the size."""
    pooled = [layer for n in (16, 32, 64, 128, 256) for layer in (conv(n, 3), pool())]
    return [*pooled, conv(512, 3), pool(2, 1), conv(1024, 3)]


def yolov2_tiny_voc() -> list[Layer]:
    return [*tiny_backbone(), conv(1024, 3), head(125), region(YOLOV2_TINY_VOC, classes=20, jitter=0.2)]


def darknet53() -> list[Layer]:
    layers = [conv(32, 3)]
    for n, blocks in ((64, 1), (128, 2), (256, 8), (512, 8), (1024, 4)):
        layers += [conv(n, 3, 2), *[conv(n // 2, 1), conv(n, 3), shortcut()] * blocks]
    return layers


def spp() -> list[Layer]:
    return [pool(5, 1), route(-2), pool(9, 1), route(-4), pool(13, 1), route(-1, -3, -5, -6)]


def yolov3(*, with_spp: bool = False) -> list[Layer]:
    coarse = [*alternating(512, 3), *spp(), *alternating(512, 4)] if with_spp else alternating(512, 6)
    return [
        *(*darknet53(), *coarse, head(255), yolo((6, 7, 8), YOLOV3)),
        *(route(-4), conv(256, 1), up(), route(-1, 61), *alternating(256, 6), head(255), yolo((3, 4, 5), YOLOV3)),
        *(route(-4), conv(128, 1), up(), route(-1, 36), *alternating(128, 6), head(255), yolo((0, 1, 2), YOLOV3)),
    ]


def yolov3_tiny() -> list[Layer]:
    return [
        *(*tiny_backbone(), conv(256, 1), conv(512, 3), head(255), yolo((3, 4, 5), YOLO_TINY)),
        *(route(-4), conv(128, 1), up(), route(-1, 8), conv(256, 3), head(255), yolo((0, 1, 2), YOLO_TINY)),
    ]


def csp_stage(n: int, blocks: int) -> list[Layer]:
    """CSPDarknet53: half the channels pass the residual blocks by."""
    residual = [conv(n // 2, 1, act="mish"), conv(n // 2, 3, act="mish"), shortcut()] * blocks
    return [
        *(conv(n, 3, 2, "mish"), conv(n // 2, 1, act="mish"), route(-2), conv(n // 2, 1, act="mish")),
        *(*residual, conv(n // 2, 1, act="mish"), route(-1, -(3 * blocks + 4)), conv(n, 1, act="mish")),
    ]


def first_csp_stage() -> list[Layer]:
    """Here both halves have all 64 channels."""
    return [
        *(conv(64, 3, 2, "mish"), conv(64, 1, act="mish"), route(-2), conv(64, 1, act="mish")),
        *(conv(32, 1, act="mish"), conv(64, 3, act="mish"), shortcut()),
        *(conv(64, 1, act="mish"), route(-1, -7), conv(64, 1, act="mish")),
    ]


def yolov4() -> list[Layer]:
    more = {"iou_thresh": 0.213, "max_delta": 5}
    return [
        *(conv(32, 3, act="mish"), *first_csp_stage(), *csp_stage(128, 2)),
        *(*csp_stage(256, 8), *csp_stage(512, 8), *csp_stage(1024, 4)),
        *(*alternating(512, 3), *spp(), *alternating(512, 3)),
        *(conv(256, 1), up(), route(85), conv(256, 1), route(-1, -3), *alternating(256, 5)),
        *(conv(128, 1), up(), route(54), conv(128, 1), route(-1, -3), *alternating(128, 5)),
        *(conv(256, 3), head(255), yolo_v4((0, 1, 2), YOLOV4, 1.2, **more)),
        *(route(-4), conv(256, 3, 2), route(-1, -16), *alternating(256, 5)),
        *(conv(512, 3), head(255), yolo_v4((3, 4, 5), YOLOV4, 1.1, **more)),
        *(route(-4), conv(512, 3, 2), route(-1, -37), *alternating(512, 5)),
        *(conv(1024, 3), head(255), yolo_v4((6, 7, 8), YOLOV4, 1.05, **more)),
    ]


def tiny_csp_stage(n: int) -> list[Layer]:
    """Only the second half of the channels goes on; the pool comes after the first half is back."""
    return [
        *(conv(n, 3), route(-1, groups=2, group_id=1), conv(n // 2, 3), conv(n // 2, 3), route(-1, -2)),
        *(conv(n, 1), route(-6, -1), pool()),
    ]


def yolov4_tiny() -> list[Layer]:
    more = {"random": 0, "resize": 1.5}
    return [
        *(conv(32, 3, 2), conv(64, 3, 2), *tiny_csp_stage(64), *tiny_csp_stage(128), *tiny_csp_stage(256)),
        *(conv(512, 3), conv(256, 1), conv(512, 3), head(255), yolo_v4((3, 4, 5), YOLO_TINY, 1.05, **more)),
        *(route(-4), conv(128, 1), up(), route(-1, 23), conv(256, 3), head(255)),
        yolo_v4((1, 2, 3), YOLO_TINY, 1.05, **more),
    ]


NETS = {
    "yolov1": (yolov1, 448),
    "yolov1-tiny": (yolov1_tiny, 448),
    "yolov2": (lambda: yolov2(YOLOV2_COCO, classes=80), 416),
    "yolov2-voc": (lambda: yolov2(YOLOV2_VOC, classes=20), 416),
    "yolov2-tiny-voc": (yolov2_tiny_voc, 416),
    "yolov3": (yolov3, 416),
    "yolov3-spp": (lambda: yolov3(with_spp=True), 608),
    "yolov3-tiny": (yolov3_tiny, 416),
    "yolov4": (yolov4, 608),
    "yolov4-tiny": (yolov4_tiny, 416),
}


def absolute(layers: list[Layer]) -> list[Layer]:
    """The same layers, ``from`` counted from the first one.

    >>> [layer["from"] for layer in absolute([conv(8, 3), conv(8, 3), route(-1, 0)]) if "from" in layer]
    [[1, 0]]
    """

    def place(number: int, source: int) -> int:
        return number + source if source < 0 else source

    numbered = [dict(layer) for layer in layers]
    for number, layer in enumerate(numbered):
        if layer["t"] == "route":
            layer["from"] = [place(number, source) for source in layer["from"]]
        elif layer["t"] == "shortcut":
            layer["from"] = place(number, layer["from"])
    return numbered


@cache
def net(name: str) -> Net:
    """The network of ``name``: its default input, the header of its ``.weights`` file, its layers."""
    layers, side = NETS[name]
    header = {"major": 0, "minor": 1 if name.startswith("yolov1") else 2, "revision": 0, "seen": 32_013_312}
    return {
        "name": name,
        "net": {"w": side, "h": side, "c": 3},
        "header": header,
        "layers": absolute(layers()),
    }
