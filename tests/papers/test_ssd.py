"""SSD: Single Shot MultiBox Detector, arXiv:1512.02325, and the sizes of the authors' SSD300 and SSD512."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

Make = Callable[..., Any]
PER_CELL_300 = (4, 6, 6, 6, 4, 4)
PER_CELL_512 = (4, 6, 6, 6, 6, 4, 4)
SIDES_300 = (38, 19, 10, 5, 3, 1)
SIDES_512 = (64, 32, 16, 8, 4, 2, 1)


@pytest.fixture
def narrow(make_detector: Make) -> Callable[..., Any]:
    """At an eighth of its width, which none of the numbers here depends on."""
    return lambda name, *overrides: make_detector(name, "width=0.125", *overrides).eval()


def boxes_of_levels(detector: Any, per_cell: tuple[int, ...], sides: tuple[int, ...]) -> list[Tensor]:
    """The default boxes (cells, boxes a cell, 4) of each level."""
    split = detector.default_boxes.split([n * side**2 for n, side in zip(per_cell, sides, strict=True)])
    return [boxes.view(-1, n, 4) for boxes, n in zip(split, per_cell, strict=True)]


@pytest.mark.parametrize(("name", "size", "num_boxes"), [("ssd300", 300, 8_732), ("ssd512", 512, 24_564)])
def test_default_boxes_and_predictions(narrow: Callable[..., Any], name: str, size: int, num_boxes: int) -> None:
    """Table 7, "# Boxes"; Sec. 2.1: c scores, the background among them, and 4 offsets for each."""
    detector = narrow(name, "num_classes=20")
    assert detector.default_boxes.shape == (num_boxes, 4)
    with torch.no_grad():
        output = detector(torch.zeros(1, 3, size, size))
    assert output.logits.shape == (1, num_boxes, 21)
    assert output.deltas.shape == (1, num_boxes, 4)


@pytest.mark.parametrize(
    ("name", "size", "per_cell", "sides"),
    [("ssd300", 300, PER_CELL_300, SIDES_300), ("ssd512", 512, PER_CELL_512, SIDES_512)],
)
def test_boxes_per_cell_and_cells_of_each_level(
    narrow: Callable[..., Any], name: str, size: int, per_cell: tuple[int, ...], sides: tuple[int, ...]
) -> None:
    """Fig. 2, and Sec. 3.1: 4 boxes at conv4_3 and the last two maps, without the ratios 3 and 1/3; else 6."""
    detector = narrow(name, "num_classes=20")
    with torch.no_grad():
        maps = detector.raw_maps(torch.zeros(1, 3, size, size))
    levels = list(zip(per_cell, sides, strict=True))
    assert [tuple(raw.shape) for raw in maps] == [
        *[(1, 21 * n, side, side) for n, side in levels],
        *[(1, 4 * n, side, side) for n, side in levels],
    ]


def test_scales_for_pascal_voc(narrow: Callable[..., Any]) -> None:
    """Sec. 2.2, eq. 4: from 0.2 to 0.9, evenly; Sec. 3.1: conv4_3 before them with 0.1."""
    detector = narrow("ssd300", "anchors.scales=[0.1,0.2,0.375,0.55,0.725,0.9,1.075]")
    scales = [0.1, *(0.2 + (0.9 - 0.2) / (5 - 1) * k for k in range(5)), 1.075]
    for level, boxes in enumerate(boxes_of_levels(detector, PER_CELL_300, SIDES_300)):
        sizes = (boxes[:, :, 2:] - boxes[:, :, :2])[0]
        square, larger = sizes[0], sizes[1]
        assert square.tolist() == pytest.approx([300 * scales[level]] * 2)
        between = min(300 * (scales[level] * scales[level + 1]) ** 0.5, 300)
        assert larger.tolist() == pytest.approx([between] * 2)


def test_the_authors_scales_for_pascal_voc(narrow: Callable[..., Any]) -> None:
    """Their ssd_pascal.py: 20 to 90 % in steps of floor(70 / 4) %, 10 % before: 30 to 264 px, and 315 px behind."""
    detector = narrow("ssd300", "anchors.scales=[0.1,0.2,0.37,0.54,0.71,0.88,1.05]")
    levels = boxes_of_levels(detector, PER_CELL_300, SIDES_300)
    found = [float(boxes[0, 0, 2] - boxes[0, 0, 0]) for boxes in levels]
    assert found == pytest.approx([30, 60, 111, 162, 213, 264])


def test_scales_for_coco(narrow: Callable[..., Any]) -> None:
    """Sec. 3.4: conv4_3 has 0.07, 21 px of 300, and the rest begins at 0.15; SSD512: 0.04, 20 px of 512, and 0.1."""
    for name, first, second in (("ssd300", 21, 45), ("ssd512", 20.48, 51.2)):
        detector = narrow(name)
        per_cell, sides = (PER_CELL_300, SIDES_300) if name == "ssd300" else (PER_CELL_512, SIDES_512)
        levels = boxes_of_levels(detector, per_cell, sides)
        assert [float(boxes[0, 0, 2] - boxes[0, 0, 0]) for boxes in levels[:2]] == pytest.approx([first, second])


def test_aspect_ratios(narrow: Callable[..., Any]) -> None:
    """Sec. 2.2: width s * sqrt(a), height s / sqrt(a), of 1, 2, 3, 1/2 and 1/3; a second square."""
    boxes = boxes_of_levels(narrow("ssd300"), PER_CELL_300, SIDES_300)[2]
    width, height = (boxes[:, :, 2:] - boxes[:, :, :2]).unbind(dim=2)
    assert (width / height)[0].tolist() == pytest.approx([1, 1, 2, 1 / 2, 3, 1 / 3])
    assert (width * height)[0, [0, 2, 3, 4, 5]].tolist() == pytest.approx([99**2] * 5)


def test_centres_lie_amid_the_cells(narrow: Callable[..., Any]) -> None:
    """Sec. 2.2: ((i + 0.5) / |f_k|, (j + 0.5) / |f_k|)."""
    for boxes in boxes_of_levels(narrow("ssd512"), PER_CELL_512, SIDES_512):
        side = round(len(boxes) ** 0.5)
        centres = ((boxes[..., :2] + boxes[..., 2:]) / 2).view(side, side, -1, 2)
        expected = (torch.arange(side) + 0.5) / side * 512
        torch.testing.assert_close(centres[..., 0], expected[None, :, None].expand(side, -1, centres.shape[2]))
        torch.testing.assert_close(centres[..., 1], expected[:, None, None].expand(-1, side, centres.shape[2]))


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("ssd300", [(256, 1), (512, 3), (128, 1), (256, 3), (128, 1), (256, 3), (128, 1), (256, 3)]),
        ("ssd512", [(256, 1), (512, 3), *[(128, 1), (256, 3)] * 3, (128, 1), (256, 4)]),
    ],
)
def test_layers_at_full_width(make_detector: Make, name: str, layers: list[tuple[int, int]]) -> None:
    """Fig. 2 and Sec. 3: dilated fc6, 1x1 fc7, pool5 3x3 of stride 1; one more layer for SSD512 (footnote 5)."""
    detector = make_detector(name)
    convolutions = [x for x in detector.backbone.modules() if isinstance(x, nn.Conv2d)]
    assert len(convolutions) == 15
    fc6, fc7 = convolutions[-2:]
    assert (fc6.out_channels, fc6.kernel_size, fc6.dilation) == (1024, (3, 3), (6, 6))
    assert (fc7.out_channels, fc7.kernel_size) == (1024, (1, 1))
    pool5 = [x for x in detector.backbone.modules() if isinstance(x, nn.MaxPool2d)][4]
    assert (pool5.kernel_size, pool5.stride) == (3, 1)
    extra = [x for x in detector.extra.modules() if isinstance(x, nn.Conv2d)]
    assert [(x.out_channels, x.kernel_size[0]) for x in extra] == layers
    assert all(x.kernel_size == (3, 3) for x in detector.head.modules() if isinstance(x, nn.Conv2d))


def test_conv4_3_is_scaled_to_20(narrow: Callable[..., Any]) -> None:
    """Sec. 3.1: "we use the L2 normalization technique [...] to scale the feature norm [...] to 20"."""
    detector = narrow("ssd300")
    with torch.no_grad():
        conv4_3 = detector.norm(detector.backbone(torch.rand(1, 3, 300, 300))[0])
    torch.testing.assert_close(conv4_3.norm(dim=1), torch.full((1, 38, 38), 20.0))


def test_constants_of_training_and_inference(narrow: Callable[..., Any]) -> None:
    """Sec. 2.2: overlap above 0.5, negatives at most 3:1; Sec. 3.7: 0.01, NMS at 0.45, the top 200 of an image."""
    detector = narrow("ssd300")
    assert (detector.positive_iou, detector.negatives_per_positive) == (0.5, 3)
    assert (detector.score_threshold, detector.nms_iou, detector.max_detections) == (0.01, 0.45, 200)
