"""One picture of a set's labels: its classes, how many boxes an image has, how large they are, and where."""

from typing import TYPE_CHECKING, Final

import numpy as np

from onestage.data import charts
from onestage.data.statistics import Statistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS: Final = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")  # Okabe and Ito
MAX_CLASSES: Final = 20
MAX_LETTERS: Final = 18
GRID: Final = 24
"""Cells a side of the map of centres."""


def labels(statistics: Statistics, *, title: str, input_size: tuple[int, int], strides: tuple[int, ...]) -> "Figure":
    """Box sizes are those on an input of ``input_size`` [H, W] that keeps the images' aspect."""
    from matplotlib.figure import Figure  # without pyplot, which would look for a screen

    figure = Figure(figsize=(12, 8), layout="constrained")
    (classes, number), (sizes, places) = figure.subplots(2, 2)
    figure.suptitle(title)
    _classes(classes, statistics)
    if len(statistics.labels):
        _histogram(number, charts.whole(statistics.boxes_per_image()), "boxes in an image", "images")
        side = np.sqrt(statistics.letterboxed_sides(input_size).prod(axis=1))
        label = f"root of the box's area in pixels, on an input of {input_size[0]}x{input_size[1]}"
        _histogram(sizes, charts.octaves(side[side > 0]), label, "boxes")
        for stride in strides:
            sizes.axvline(stride, color="#444444", linestyle=":", linewidth=1)
        if strides:
            sizes.set_title(f"dotted: strides of {', '.join(map(str, strides))} pixels", fontsize=9, loc="right")
        _places(places, statistics)
    else:
        for axes in (number, sizes, places):
            axes.text(0.5, 0.5, "no box", ha="center", va="center", transform=axes.transAxes)
            axes.set_axis_off()
    return figure


def _classes(axes: "Axes", statistics: Statistics) -> None:
    """Bars of the most frequent classes, split by split behind each other."""
    total = statistics.total().by_class
    order = np.argsort(-total, kind="stable")[:MAX_CLASSES]
    names = [_short(statistics.classes[label]) for label in order]
    left = np.zeros(len(order))
    for number, (split, count) in enumerate(statistics.splits.items()):
        values = count.by_class[order]
        axes.barh(range(len(order)), values, left=left, color=COLOURS[number % len(COLOURS)], label=split)
        left += values
    for place, label in enumerate(order):
        axes.annotate(f"{total[label]:,}", (left[place], place), xytext=(4, 0), textcoords="offset points",
                      va="center", fontsize=8)  # fmt: skip
    axes.set_yticks(range(len(order)), names, fontsize=9 if len(order) <= 12 else 7)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    more = len(total) - len(order)
    axes.set(xlabel=f"boxes ({more} rarer classes are left out)" if more else "boxes")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)


def _histogram(axes: "Axes", bins: charts.Bins, xlabel: str, ylabel: str) -> None:
    edges = np.array(bins.edges)
    if not bins.logarithmic and edges[1] - edges[0] == 1:
        edges -= 0.5  # a bar for each whole number stands over it
    axes.bar(edges[:-1], bins.counts, width=np.diff(edges), align="edge", color=COLOURS[0], edgecolor="white",
             linewidth=0.5)  # fmt: skip
    if bins.logarithmic:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set(xlabel=xlabel, ylabel=ylabel, xlim=(edges[0], edges[-1]))
    axes.spines[["top", "right"]].set_visible(False)


def _places(axes: "Axes", statistics: Statistics) -> None:
    """Where the boxes' centres lie in their images."""
    centres = (statistics.boxes[:, :2] + statistics.boxes[:, 2:]) / 2 / statistics.sizes[statistics.images]
    counts, _, _ = np.histogram2d(centres[:, 1], centres[:, 0], bins=GRID, range=((0, 1), (0, 1)))
    shown = axes.imshow(counts, cmap="Blues", extent=(0, 1, 1, 0), vmin=0)
    axes.set(xlabel="x of the centres, in image widths", ylabel="y, in image heights")
    axes.figure.colorbar(shown, ax=axes, label="boxes")


def _short(name: str) -> str:
    return name if len(name) <= MAX_LETTERS else f"{name[: MAX_LETTERS - 1]}…"
