"""What changed, as pictures: which classes are drawn, and whose find a truth is."""

from types import ModuleType

import numpy as np
import pytest

from onestage.evaluation import changes, worst
from onestage.metrics.paired import Difference
from onestage.metrics.tide import judge


@pytest.mark.parametrize("number", [1, 3, 30, 80])
def test_the_mean_and_the_classes_that_changed_most_have_a_row(number: int) -> None:
    gains = np.linspace(0.3, -0.3, number)
    rows = [("mean", Difference(0.5, 0.6, 9, 0.05, 0.15))]
    rows += [(f"class {at}", Difference(0.5, 0.5 + x, 9, x - 0.1, x + 0.1)) for at, x in enumerate(gains.tolist())]
    figure = changes.chart(rows, split="test")
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(names) == 1 + min(number, changes.MOST)
    assert (names[0], names[1], names[-1]) == ("mean", "class 0", f"class {number - 1}")
    assert ("largest 15 gains and losses of 80" in figure.axes[0].get_title()) == (number == 80)


def test_a_truth_says_who_finds_it(scenes: ModuleType) -> None:
    """Each truth lies in a quarter of the image; its colour is at its left edge in the middle panel."""
    boxes = [[20.0, 40, 100, 120], [220.0, 40, 300, 120], [20.0, 240, 100, 320], [220.0, 240, 300, 320]]
    truths = [(box, 0) for box in boxes]
    a = judge(scenes.one(truths, [(boxes[0], 0, 0.9), (boxes[1], 0, 0.8)]))
    b = judge(scenes.one(truths, [(boxes[0], 0, 0.9), (boxes[2], 0, 0.8)]))
    image = np.full((640, 640, 3), 128, np.uint8)
    drawn = changes.picture(image, a, b, name="image 000001", classes=["cat"])
    assert drawn.shape == (640 + 2 * worst.STRIP_PX, 3 * 640 + 2 * 4, 3)

    def at(box: list[float], panel: int) -> tuple[int, ...]:
        return tuple(drawn[worst.STRIP_PX + round((box[1] + box[3]) / 2), panel * 644 + round(box[0])].tolist())

    lost, none = worst.rgb(worst.NOT_FOUND), (128,) * 3
    assert [at(box, 0) for box in boxes] == [worst.FOUND, worst.FOUND, none, none]
    assert [at(box, 1) for box in boxes] == [worst.FOUND, lost, lost, lost]
    assert [at(box, 2) for box in boxes] == [worst.FOUND, none, worst.FOUND, none]
