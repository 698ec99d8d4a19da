"""What changed from one detector to another, as pictures: APs by class, and single images."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from onestage.drawing import annotate, side_by_side
from onestage.evaluation import worst
from onestage.evaluation.charts import new_figure, short
from onestage.evaluation.report import f1
from onestage.metrics.paired import Difference
from onestage.metrics.tide import Judged

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS: Final = {"better": "#0072B2", "worse": "#D55E00", "within chance": "#777777", "too few images": "#BBBBBB"}
SURE: Final = ("better", "worse")
MOST: Final = 30
"""Classes that are drawn; of more, those with the largest gains and losses."""


def chart(rows: Sequence[tuple[str, Difference]], *, split: str) -> "Figure":
    """The AP of B less that of A, the mean on top, with the intervals that chance allows."""
    classes, shown = rows[1:], list(rows)
    if len(classes) > MOST:
        shown = [rows[0], *classes[: MOST // 2], *classes[-MOST // 2 :]]
    figure, axes = new_figure(9, 1.9 + 0.34 * len(shown))
    axes.axvline(0, color="black", linewidth=1)
    for place, (_, one) in enumerate(shown):
        colour = COLOURS[one.verdict]
        if one.low is not None and one.high is not None:
            axes.plot([one.low, one.high], [place, place], color=colour, linewidth=2.2, solid_capstyle="butt")
        filled = colour if one.verdict in SURE else "white"
        axes.plot(one.value, place, "o", color=colour, markerfacecolor=filled, markersize=7)
    present = {one.verdict for _, one in shown}
    for verdict, colour in COLOURS.items():
        if verdict in present:
            sure = verdict in SURE
            label = f"{verdict} in B" if sure else verdict
            axes.plot([], [], "o", color=colour, markerfacecolor=colour if sure else "white", markersize=7, label=label)
    axes.axhline(0.5, color="#BBBBBB", linewidth=0.8)
    axes.set_yticks(range(len(shown)), [short(name) for name, _ in shown])
    axes.set_ylim(len(shown) - 0.5, -0.5)
    values = axes.secondary_yaxis("right")
    values.set_yticks(range(len(shown)), [f"{one.a:.3f} → {one.b:.3f}" for _, one in shown])
    values.tick_params(length=0)
    values.spines["right"].set_visible(False)
    reach = max(max(abs(x) for x in (one.value, one.low or 0.0, one.high or 0.0)) for _, one in shown)
    axes.set_xlim(-1.08 * max(reach, 0.01), 1.08 * max(reach, 0.01))
    which = f", the largest {MOST // 2} gains and losses of {len(classes)}" if len(classes) > MOST else ""
    axes.set_title(f"From A to B on {split}, AP by class{which}", fontsize=11)
    axes.set_xlabel("AP of B less AP of A (IoU 0.5 to 0.95), with 95 % intervals")
    axes.grid(axis="x", color="#EEEEEE")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside lower center", ncols=len(COLOURS))
    return figure


def picture(image: np.ndarray, a: Judged, b: Judged, *, name: str, classes: Sequence[str]) -> np.ndarray:
    """One image (H, W, 3) three times: what A finds, the truth, what B finds.

    A truth that only one of them finds says so.
    """
    left, right = (worst.detections(image, one, classes) for one in (a, b))
    panels = side_by_side(side_by_side(left, _truths(image, a, b, classes)), right)
    title = f"{name}: F1 {f1(a):.2f} in A (left), {f1(b):.2f} in B (right); the truth in the middle"
    return worst.framed(panels, title, worst.kinds_in(a, b))


def _truths(image: np.ndarray, a: Judged, b: Judged, classes: Sequence[str]) -> np.ndarray:
    shown = np.flatnonzero(~a.truths.crowd)
    lost = a.unfound.astype(int) + b.unfound
    shown = shown[np.argsort(lost[shown], kind="stable")]  # what was not found on top
    who = np.where(lost == 2, ": neither", np.where(a.unfound, ": only B", np.where(b.unfound, ": only A", "")))
    return annotate(
        image,
        a.truths.boxes[shown].tolist(),
        texts=[f"{classes[a.truths.labels[at]]}{who[at]}" for at in shown],
        colours=[worst.rgb(worst.NOT_FOUND) if lost[at] else worst.FOUND for at in shown],
    )
