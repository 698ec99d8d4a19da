"""By hand. COCO averages precision over 101 recalls, 0.00 to 1.00: half of the truths found gives 51/101."""

from typing import NamedTuple

import pytest
import torch

from onestage.metrics.mean_ap import MeanAP
from onestage.types import XYXY, Detections, Target

CLASSES = ["cat", "dog", "owl"]
A, B = (0.0, 0.0, 50.0, 50.0), (60.0, 60.0, 110.0, 110.0)
Box = tuple[float, float, float, float]


class Image(NamedTuple):
    detections: Detections
    target: Target


def image(found: list[tuple[Box, float, int]], truths: list[tuple[Box, int]], crowd: list[bool] | None = None) -> Image:
    """Of detections (box, score, label) and truths (box, label)."""
    return Image(
        Detections(
            XYXY(torch.tensor([box for box, _, _ in found]).view(-1, 4)),
            torch.tensor([score for _, score, _ in found]),
            torch.tensor([label for _, _, label in found], dtype=torch.int64),
        ),
        Target(
            XYXY(torch.tensor([box for box, _ in truths]).view(-1, 4)),
            torch.tensor([label for _, label in truths], dtype=torch.int64),
            image_id=0,
            crowd=None if crowd is None else torch.tensor(crowd, dtype=torch.bool),
        ),
    )


def score(*images: Image) -> dict[str, float]:
    return MeanAP(classes=CLASSES)(images)


def test_all_found_and_nothing_else_is_one() -> None:
    values = score(image([(A, 0.9, 0), (B, 0.8, 1)], [(A, 0), (B, 1)]), image([(B, 0.7, 0)], [(B, 0)]))
    assert {values[name] for name in ("map", "map_50", "map_75", "mar_100", "ap/cat", "ap/dog")} == {1.0}


def test_half_of_the_truths_found() -> None:
    values = score(image([(A, 0.9, 0)], [(A, 0), (B, 0)]))
    assert values["map_50"] == pytest.approx(51 / 101)
    assert values["mar_100"] == pytest.approx(0.5)


def test_a_surer_mistake_halves_the_precision() -> None:
    assert score(image([(B, 0.9, 0), (A, 0.8, 0)], [(A, 0)]))["map_50"] == pytest.approx(0.5)


def test_a_less_sure_mistake_costs_nothing() -> None:
    assert score(image([(A, 0.9, 0), (B, 0.8, 0)], [(A, 0)]))["map_50"] == pytest.approx(1.0)


def test_a_loose_box_counts_up_to_its_iou() -> None:
    loose = (0.0, 0.0, 50.0, 31.0)  # IoU 31/50 = 0.62: found at 0.50, 0.55 and 0.60 of the ten thresholds
    values = score(image([(loose, 0.9, 0)], [(A, 0)]))
    assert values["map_50"] == pytest.approx(1.0)
    assert values["map_75"] == pytest.approx(0.0)
    assert values["map"] == pytest.approx(0.3)


def test_the_right_box_of_the_wrong_class_is_not_found() -> None:
    values = score(image([(A, 0.9, 1)], [(A, 0)]))
    assert values["ap/cat"] == values["map"] == 0.0


def test_the_map_is_the_mean_over_the_classes_with_truths() -> None:
    values = score(image([(A, 0.9, 0), (A, 0.9, 2)], [(A, 0), (B, 1)]))  # the owl is a mistake where no owl is
    assert values["ap/cat"] == pytest.approx(1.0)
    assert values["ap/dog"] == pytest.approx(0.0)
    assert values["map"] == pytest.approx(0.5)


def test_a_class_without_truths_is_left_out() -> None:
    values = score(image([(A, 0.9, 0), (A, 0.9, 2)], [(A, 0)]))
    assert {name for name in values if name.startswith("ap/")} == {"ap/cat"}


def test_a_size_without_truths_is_left_out() -> None:
    values = score(image([(A, 0.9, 0)], [(A, 0)]))  # 50², between 32² and 96²
    assert values["map_medium"] == 1.0
    assert "map_small" not in values and "map_large" not in values


def test_a_crowd_need_not_be_found_and_what_lies_on_it_is_no_mistake() -> None:
    assert score(image([(A, 0.8, 0)], [(A, 0), (B, 0)], crowd=[False, True]))["map_50"] == pytest.approx(1.0)
    on_the_crowd = image([(B, 0.9, 0), (A, 0.8, 0)], [(A, 0), (B, 0)], crowd=[False, True])
    assert score(on_the_crowd)["map_50"] == pytest.approx(1.0)


def test_one_crowd_among_images_that_say_nothing_of_crowds() -> None:
    values = score(image([(A, 0.9, 0)], [(A, 0)]), image([], [(B, 0)], crowd=[True]))
    assert values["map_50"] == pytest.approx(1.0)


def test_nothing_found_is_zero() -> None:
    values = score(image([], [(A, 0)]), image([], [(B, 1)]))
    assert {values[name] for name in ("map", "map_50", "ap/cat", "ap/dog")} == {0.0}


def test_an_image_without_truths_takes_part_by_its_mistakes() -> None:
    found = image([(A, 0.8, 0)], [(A, 0)])
    assert score(found, image([], []))["map_50"] == pytest.approx(1.0)
    assert score(found, image([(B, 0.9, 0)], []))["map_50"] == pytest.approx(0.5)


@pytest.mark.parametrize("found", [[], [(A, 0.9, 0)]])
def test_a_split_without_any_truth_has_no_scores(found: list[tuple[Box, float, int]]) -> None:
    assert score(image(found, []), image([], [])) == {}


def test_no_images_have_no_scores() -> None:
    assert score() == {}
