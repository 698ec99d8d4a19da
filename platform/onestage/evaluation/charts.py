"""The pictures of an evaluation: curves, confusion, calibration, and what each kind of error costs.

K classes, of which many are drawn in grey where only a few can be told apart.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from onestage.evaluation.report import Report
from onestage.metrics.curves import THRESHOLDS, Curve, best_threshold, mean_f1
from onestage.metrics.matching import RECALLS
from onestage.metrics.tide import KINDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito
GREY: Final = "#BBBBBB"
KIND_COLOURS: Final = dict(zip(KINDS, ("#CC79A7", "#E69F00", "#009E73", "#56B4E9", "#D55E00", "#F0E442"), strict=True))
DPI: Final = 110
MAX_NUMBERED: Final = 12
"""Classes up to which the cells of a confusion matrix hold their numbers."""
MAX_NAMED: Final = 100
"""Classes up to which its rows have names."""
MAX_LETTERS: Final = 18


def all_of(report: Report) -> "dict[str, Figure]":
    """Every chart of a report by its name; without a truth there are no curves."""
    charts = {"confusion": confusion(report), "calibration": calibration(report), "errors": errors(report)}
    if not report.curves[0]:
        return charts
    return {"precision_recall": precision_recall(report), "f1": f1(report), **charts}


def picture(figure: "Figure") -> np.ndarray:
    """The figure as RGB pixels (H, W, 3)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[:, :, :3])


def precision_recall(report: Report) -> "Figure":
    """Of each class at IoU 0.5, of their mean, and of the mean over IoUs of 0.5 to 0.95, whose area is the mAP."""
    figure, axes = new_figure()
    for one, colour in _in_front(report.curves[0]):
        name = f"{short(report.classes[one.label])}  {one.envelope().mean():.3f}"
        axes.plot(RECALLS, one.envelope(), color=colour, **_line(colour, name))
    means = [np.mean([one.envelope() for one in curves], axis=0) for curves in report.curves]
    axes.plot(RECALLS, means[0], color="black", linewidth=3, label=f"{_mean(report)}  {means[0].mean():.3f}")
    whole = np.mean(means, axis=0)
    axes.plot(
        RECALLS,
        whole,
        color="black",
        linewidth=2,
        linestyle="--",
        label=f"{_mean(report)}, IoU 0.5 to 0.95  {whole.mean():.3f}",
    )
    axes.set(xlabel="recall (share of truths found)", ylabel="precision (share of detections right)")
    axes.set(title=f"Precision and recall at IoU 0.5{_of(report)}")
    _from_0_to_1(figure, axes, title="average precision")
    return figure


def f1(report: Report) -> "Figure":
    """F1 of each class and their mean over the score threshold; dots and a line mark the best."""
    figure, axes = new_figure()
    curves = report.curves[0]
    for one, colour in _in_front(curves):
        best = one.best()
        name = f"{short(report.classes[one.label])}  {best.f1:.2f} at {best.threshold:.2f}"
        axes.plot(THRESHOLDS, one.f1(), color=colour, **_line(colour, name))
        if colour != GREY:
            axes.plot(best.threshold, best.f1, "o", color=colour, markeredgecolor="white", zorder=5)
    threshold, highest = best_threshold(curves)
    axes.plot(
        THRESHOLDS,
        mean_f1(curves),
        color="black",
        linewidth=3,
        label=f"{_mean(report)}  {highest:.2f} at {threshold:.2f}",
    )
    axes.axvline(threshold, color="black", linestyle=":", linewidth=1.5, label="best threshold for all")
    if abs(report.threshold - threshold) > 0.005:
        axes.axvline(report.threshold, color="#777777", linestyle="--", linewidth=1, label="the model's threshold")
    axes.set(xlabel="score threshold", ylabel="F1", title=f"F1 at IoU 0.5{_of(report)}")
    _from_0_to_1(figure, axes, title="best F1")
    return figure


def confusion(report: Report) -> "Figure":
    """Truths by row, what they were taken for by column; cells are shaded by their share of the row."""
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    matrix = report.confusion
    names = [*(short(name) for name in report.classes), "background"]
    numbered, named = len(names) <= MAX_NUMBERED + 1, len(names) <= MAX_NAMED + 1
    side = float(np.clip(2.6 + 0.62 * len(names), 5.5, 9.0)) if numbered else float(np.clip(0.15 * len(names), 8, 13))
    figure = Figure(figsize=(side + 1.2, side), layout="constrained")
    axes = figure.subplots()
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    scale = PowerNorm(1.0 if numbered else 0.5, vmin=0, vmax=1)  # among many classes the rare mistakes are looked for
    shown = axes.imshow(share, cmap="Blues", norm=scale)
    if numbered:
        for (row, column), count in np.ndenumerate(matrix):
            if count:
                colour = "white" if share[row, column] > 0.6 else "black"
                axes.text(column, row, f"{count:,}", ha="center", va="center", color=colour, fontsize=9)
    else:
        axes.set_xticks(np.arange(len(names)) - 0.5, minor=True)
        axes.set_yticks(np.arange(len(names)) - 0.5, minor=True)
        axes.grid(which="minor", color="#EEEEEE", linewidth=0.4)
        axes.tick_params(which="minor", length=0)
    size = 10 if numbered else max(5.0, min(9.0, 500 / len(names)))
    if named:
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=size)
        axes.set_yticks(range(len(names)), names, fontsize=size)
    last = len(names) - 1.5
    axes.axhline(last, color="#444444", linewidth=1)
    axes.axvline(last, color="#444444", linewidth=1)
    axes.set(xlabel="found as (background: not found)", ylabel="truth (background: nothing there)")
    axes.set_title(f"Confusion from score {report.threshold:g}, IoU 0.5", fontsize=11)
    figure.colorbar(shown, ax=axes, label="share of the row", shrink=0.8)
    return figure


def calibration(report: Report) -> "Figure":
    """How often detections of a score are right, over how many there are."""
    from matplotlib.figure import Figure

    one = report.calibration
    figure = Figure(figsize=(6.5, 6.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    width = float(one.edges[1] - one.edges[0])
    middles = (one.edges[:-1] + one.edges[1:]) / 2
    known = one.counts > 0
    above.bar(middles[known], one.precision[known], width=0.92 * width, color=COLOURS[0], label="measured")
    above.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1.5, label="score = precision")
    above.plot(one.score[known], one.precision[known], "o", color=COLOURS[1], label="at the bin's mean score")
    above.set(ylabel="precision at IoU 0.5", ylim=(0, 1.02), xlim=(0, 1))
    above.set_title(f"Calibration of {one.counts.sum():,} detections, expected error {one.error:.3f}", fontsize=11)
    above.legend(frameon=False, loc="upper left")
    below.bar(middles, one.counts, width=0.92 * width, color="#777777")
    below.set(xlabel="score", ylabel="detections")
    if one.counts.max(initial=0) > 0:
        below.set_yscale("log")
        below.set_ylim(bottom=0.8)
    below.set_xticks(one.edges)
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def errors(report: Report) -> "Figure":
    """What each kind of error takes from the AP at IoU 0.5, and how many there are."""
    figure, axes = new_figure(width=8, height=4)
    names = list(KINDS)[::-1]
    costs = [report.costs[name] for name in names]
    axes.barh(names, costs, color=[KIND_COLOURS[name] for name in names], edgecolor="#444444", linewidth=0.8)
    for place, (name, cost) in enumerate(zip(names, costs, strict=True)):
        number = f"{cost:.3f}  ({report.counts[name]:,})"
        axes.annotate(number, (cost, place), xytext=(5, 0), textcoords="offset points", va="center")
    axes.set_xlim(0, max(max(costs) * 1.25, 0.01))
    at_50 = np.mean([one.envelope().mean() for one in report.curves[0]]) if report.curves[0] else 0.0
    axes.set(xlabel="AP at IoU 0.5 that mending them would gain (number of errors)")
    axes.set_title(f"Kinds of errors; AP at IoU 0.5 is {at_50:.3f}", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _in_front(curves: Sequence[Curve]) -> list[tuple[Curve, str]]:
    """The curves with their colours: of more than there are, the three best and worst; the others come first, grey.

    A class that is the only one is the mean.
    """
    if len(curves) == 1:
        return []
    by_ap = sorted(curves, key=lambda one: -float(one.envelope().mean()))
    if len(by_ap) <= len(COLOURS):
        return list(zip(by_ap, COLOURS, strict=False))
    half = len(COLOURS) // 2
    chosen = [*by_ap[:half], *by_ap[-half:]]
    return [*((one, GREY) for one in by_ap[half:-half]), *zip(chosen, COLOURS, strict=True)]


def _line(colour: str, name: str) -> dict[str, Any]:
    return {"linewidth": 0.7, "alpha": 0.8} if colour == GREY else {"linewidth": 1.8, "label": name}


def _of(report: Report) -> str:
    """Which of many classes are named."""
    number = len(report.curves[0])
    return f", the 3 best and 3 worst of {number} classes" if number > len(COLOURS) else ""


def _mean(report: Report) -> str:
    """What the black line is called."""
    curves = report.curves[0]
    return short(report.classes[curves[0].label]) if len(curves) == 1 else "mean"


def short(name: str) -> str:
    return name if len(name) <= MAX_LETTERS else f"{name[: MAX_LETTERS - 1]}…"


def _from_0_to_1(figure: "Figure", axes: "Axes", *, title: str) -> None:
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    axes.grid(color="#EEEEEE")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside right upper", title=title, alignment="left")


def new_figure(width: float = 9, height: float = 5.5) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure  # without pyplot, which would look for a screen

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()
