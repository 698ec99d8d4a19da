"""What the picture of a set's labels draws, by its data."""

import numpy as np
import pytest

from onestage.data.contents import Contents, Entry
from onestage.data.label_charts import MAX_CLASSES, labels
from onestage.data.statistics import Statistics, measure


def statistics_of(num_classes: int, *, num_images: int = 30) -> Statistics:
    rng = np.random.default_rng(0)

    def entry(split: str, number: int) -> Entry:
        count = number % 5
        low = rng.uniform(0, 150, (count, 2))
        boxes = [(float(x), float(y), float(x + 20), float(y + 40)) for x, y in low]
        own = [int(label) for label in rng.integers(0, num_classes, count)]
        return Entry(split, str(number), 200, 200, boxes, own, 1, lambda: b"")

    splits = {split: [entry(split, n) for n in range(num_images)] for split in ("train", "val")}
    names = tuple(f"class {n} with quite a long name" for n in range(num_classes))
    return measure(Contents("set", names, splits, [], packed=True))


@pytest.mark.parametrize("num_classes", [1, 3, 30])
def test_bars_are_the_boxes_of_each_class_by_split(num_classes: int) -> None:
    statistics = statistics_of(num_classes)
    figure = labels(statistics, title="a set", input_size=(100, 100), strides=(8, 16))
    classes = figure.axes[0]
    shown = min(num_classes, MAX_CLASSES)
    widths = np.array([bar.get_width() for bar in classes.patches]).reshape(2, shown)
    most = np.sort(statistics.total().by_class)[::-1][:shown]
    assert widths.sum(axis=0).tolist() == most.tolist()
    assert widths.sum(axis=1).tolist() == [
        pytest.approx(count.by_class[np.argsort(-statistics.total().by_class, kind="stable")[:shown]].sum())
        for count in statistics.splits.values()
    ]
    assert ("left out" in classes.get_xlabel()) == (num_classes > MAX_CLASSES)
    assert all(axes.get_xlabel() or axes.get_ylabel() for axes in figure.axes)


def test_histograms_count_images_and_boxes() -> None:
    """Boxes of 20x40 pixels in images of 200x200 are 10x20 on an input of 100x100: the root of the area is 14.1."""
    statistics = statistics_of(3)
    _, number, sizes, places, *_ = labels(statistics, title="", input_size=(100, 100), strides=(8,)).axes
    assert [bar.get_height() for bar in number.patches] == [12, 12, 12, 12, 12]
    assert [bar.get_x() + bar.get_width() / 2 for bar in number.patches] == [0, 1, 2, 3, 4]
    assert sum(bar.get_height() for bar in sizes.patches) == len(statistics.labels)
    (full,) = [bar for bar in sizes.patches if bar.get_height() > 0]
    assert full.get_x() <= 200**0.5 <= full.get_x() + full.get_width()
    assert places.images[0].get_array().sum() == len(statistics.labels)


def test_a_set_without_boxes_is_drawn_too() -> None:
    empty = measure(Contents("set", ("a",), {"train": [Entry("train", "0", 9, 9, [], [], 1, lambda: b"")]}, [], True))
    figure = labels(empty, title="", input_size=(32, 32), strides=())
    assert [text.get_text() for axes in figure.axes[1:] for text in axes.texts] == ["no box"] * 3
