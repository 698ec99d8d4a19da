import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onestage.data.charts import Bins, bars, even, heat, histogram, octaves, short, whole

SVG = "{*}"


@given(st.lists(st.floats(0, 1), min_size=1, max_size=50), st.integers(1, 30))
def test_even_bins_are_numpys(values: list[float], count: int) -> None:
    bins = even(np.array(values), low=0, high=1, count=count)
    counts, edges = np.histogram(values, bins=np.linspace(0, 1, count + 1))
    assert bins.counts == counts.tolist()
    assert bins.edges == edges.tolist()


@given(st.lists(st.floats(1e-3, 1e5), min_size=1, max_size=50), st.integers(1, 4))
def test_octaves_hold_every_value_between_powers_of_two(values: list[float], fine: int) -> None:
    bins = octaves(np.array(values), fine=fine)
    assert sum(bins.counts) == len(values)
    assert bins.edges[0] <= min(values) and max(values) < bins.edges[-1]
    assert np.log2(bins.edges[0]) % 1 == 0 and np.log2(bins.edges[-1]) % 1 == 0
    assert np.diff(np.log2(bins.edges)) == pytest.approx(1 / fine)
    assert bins.counts == np.histogram(values, bins=bins.edges)[0].tolist()


def test_whole_numbers_share_bins_where_there_are_many() -> None:
    assert whole(np.array([0, 3, 3])).counts == [1, 0, 0, 2]
    many = whole(np.arange(100), most=25)
    assert many.counts == [4] * 25
    assert many.edges[-1] == 100


def test_a_bar_is_as_high_as_its_share_of_the_highest() -> None:
    root = ET.fromstring(histogram(Bins([4, 0, 1], [0, 1, 2, 3])))
    found = [(float(bar.attrib["height"]), bar.findtext(f"{SVG}title")) for bar in root.findall(f"{SVG}rect")]
    assert [title for _, title in found] == ["0 to 1: 4", "2 to 3: 1"]
    assert found[0][0] == pytest.approx(4 * found[1][0], rel=0.01)


def test_marks_lie_at_their_value_and_those_beyond_are_left_out() -> None:
    bins = Bins([1, 1, 1], [4, 8, 16, 32], logarithmic=True)
    root = ET.fromstring(histogram(bins, marks=[8, 64]))
    (mark,) = [line for line in root.findall(f"{SVG}line") if line.get("class") == "mark"]
    first, second, _ = root.findall(f"{SVG}rect")
    assert float(first.attrib["x"]) < float(mark.attrib["x1"]) < float(second.attrib["x"])
    assert [text.text for text in root.findall(f"{SVG}text") if text.get("class") == "mark"] == ["8"]


def test_bars_have_their_names_and_lengths() -> None:
    svg = bars(["<cat> & dog", "a very long name indeed"], [10, 5], [(1, 2, 3), (4, 5, 6)])
    groups = ET.fromstring(svg).findall(f"{SVG}g")
    titles = [group.findtext(f"{SVG}title") for group in groups]
    assert titles == ["<cat> & dog: 10", "a very long name indeed: 5"]
    widths = [float(group.find(f"{SVG}rect").attrib["width"]) for group in groups]  # type: ignore[union-attr]
    assert widths[0] == pytest.approx(2 * widths[1])
    assert groups[1].findall(f"{SVG}text")[0].text == "a very long …"


def test_a_map_is_dark_where_most_is() -> None:
    counts = np.zeros((3, 4), np.int64)
    counts[0, 3], counts[2, 0] = 8, 2
    cells = ET.fromstring(heat(counts)).findall(f"{SVG}rect")[1:]
    assert [(cell.get("x"), cell.get("y"), cell.findtext(f"{SVG}title")) for cell in cells] == [
        ("30", "0", "8"),
        ("0", "20", "2"),
    ]
    assert [float(cell.attrib["fill-opacity"]) for cell in cells] == [1.0, 0.31]


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (0.05, "0.05"), (22.627, "22.6"), (1024.0, "1,024")])
def test_numbers_on_an_axis_are_short(value: float, text: str) -> None:
    assert short(value) == text
