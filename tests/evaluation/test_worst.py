"""An image with its errors, by the pixels of their colours."""

from types import ModuleType

import numpy as np

from onestage.evaluation import worst
from onestage.evaluation.charts import KIND_COLOURS
from onestage.metrics.tide import KINDS, judge

GREY = 128
CLASSES = ["a", "b"]


def colour(kind: str) -> tuple[int, int, int]:
    return tuple(bytes.fromhex(KIND_COLOURS[kind][1:]))  # type: ignore[return-value]


def test_truth_on_the_left_prediction_on_the_right_each_error_in_its_colour(scenes: ModuleType) -> None:
    image = np.full((480, 640, 3), GREY, np.uint8)
    found, lost = [50.0, 100, 150, 200], [300.0, 300, 400, 400]
    invented, renamed = [450.0, 50, 550, 150], [200.0, 100, 280, 200]
    judged = judge(
        scenes.one([(found, 0), (lost, 0), (renamed, 0)], [(found, 0, 0.9), (invented, 1, 0.8), (renamed, 1, 0.7)])
    )
    drawn = worst.picture(image, judged, name="image 000001", classes=CLASSES)
    top, right = worst.STRIP_PX, 644

    def at(box: list[float], *, left: int) -> tuple[int, ...]:
        return tuple(drawn[top + round((box[1] + box[3]) / 2), left + round(box[0])].tolist())

    assert at(found, left=0) == at(found, left=right) == worst.FOUND
    assert at(lost, left=0) == at(renamed, left=0) == colour("missed")
    assert at(invented, left=right) == colour("background")
    assert at(renamed, left=right) == colour("classification")
    assert at(lost, left=right) == at(invented, left=0) == (GREY,) * 3
    assert drawn.shape == (480 + 2 * worst.STRIP_PX, 2 * 640 + 4, 3)


def test_a_narrow_image_leaves_room_for_the_words(scenes: ModuleType) -> None:
    judged = judge(scenes.one([([0, 0, 9, 9], 0)], [([2, 2, 9, 9], 1, 0.9)]))
    drawn = worst.picture(np.full((40, 10, 3), GREY, np.uint8), judged, name="image 000001", classes=CLASSES)
    assert drawn.shape[1] == worst.LEAST_WIDTH_PX


def test_kinds_are_told_apart_by_colour_blind_people_too() -> None:
    """Of seven colours of Okabe and Ito's, no two look alike with the commonest blindness, of the green cones.

    Viénot, Brettel and Mollon 1999, in linear RGB; 0.1 of its diagonal is well seen.
    """
    deuteranope = np.array([[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]])
    colours = np.array([*(colour(kind) for kind in KINDS), worst.FOUND]) / 255
    seen = (deuteranope @ (colours**2.2).T).T.clip(0, 1) ** (1 / 2.2)
    distances = np.linalg.norm(seen[:, None] - seen[None], axis=2) + np.eye(len(seen))
    assert distances.min() > 0.1 * 3**0.5
