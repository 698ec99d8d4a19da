"""Charts as SVG, to lie within a page: without script, font or file. Their colours are those of the page's style."""

import math
from collections.abc import Sequence
from html import escape
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

WIDTH: Final = 300
HEIGHT: Final = 150
LEFT: Final = 36
RIGHT: Final = 14
BOTTOM: Final = 20
TOP: Final = 12
ROW: Final = 19
NAME_WIDTH: Final = 104
VALUE_WIDTH: Final = 50
MAX_LABELS: Final = 8
MAX_LETTERS: Final = 13


Colour = tuple[int, int, int]
"""RGB."""


class Bins(NamedTuple):
    """A histogram: ``counts`` (N,) between ``edges`` (N + 1,), drawn at even distances or ``logarithmic`` ones."""

    counts: list[int]
    edges: list[float]
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """Where ``value`` lies: 0 at the first edge, 1 at the last.

        >>> Bins([3, 1], [1, 2, 4], logarithmic=True).place(2)
        0.5
        """
        low, high = self.edges[0], self.edges[-1]
        if self.logarithmic:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return (value - low) / (high - low)


def even(values: NDArray[np.float64], *, low: float, high: float, count: int) -> Bins:
    """``count`` bins of one width from ``low`` to ``high``; what lies beyond is counted in the first or the last."""
    edges = np.linspace(low, high, count + 1)
    return Bins(_counts(values, edges), edges.tolist())


def octaves(values: NDArray[np.float64], *, fine: int = 2) -> Bins:
    """Bins that double in ``fine`` steps, over the octaves that ``values`` > 0 lie in.

    >>> octaves(np.array([3.0, 3.5, 9.0]), fine=1)
    Bins(counts=[2, 0, 1], edges=[2.0, 4.0, 8.0, 16.0], logarithmic=True)
    """
    first = math.floor(math.log2(values.min()))
    last = max(math.floor(math.log2(values.max())) + 1, first + 1)
    edges = 2.0 ** np.linspace(first, last, (last - first) * fine + 1)
    return Bins(_counts(values, edges), edges.tolist(), logarithmic=True)


def whole(values: NDArray[np.int64], *, most: int = 40) -> Bins:
    """A bin for each whole number from 0 on; for several where there would be more than ``most`` bins.

    >>> whole(np.array([0, 2, 2]))
    Bins(counts=[1, 0, 2], edges=[0.0, 1.0, 2.0, 3.0], logarithmic=False)
    """
    step = math.ceil((int(values.max()) + 1) / most)
    edges = np.arange(0, int(values.max()) + step + 1, step, dtype=np.float64)
    return Bins(_counts(values.astype(np.float64), edges), edges.tolist())


def _counts(values: NDArray[np.float64], edges: NDArray[np.float64]) -> list[int]:
    index = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
    counts: list[int] = np.bincount(index, minlength=len(edges) - 1).tolist()
    return counts


def histogram(bins: Bins, *, marks: Sequence[float] = ()) -> str:
    """Bars over an axis with the edges' values; a dashed line at each of ``marks`` within them."""
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    most = max(*bins.counts, 1)
    base = TOP + height
    parts = [
        f'<line class="rule" x1="{LEFT}" y1="{base}" x2="{WIDTH - RIGHT}" y2="{base}"/>',
        f'<line class="rule" x1="{LEFT}" y1="{TOP}" x2="{WIDTH - RIGHT}" y2="{TOP}"/>',
        _text(LEFT - 6, TOP + 9, f"{most:,}", anchor="end"),
        _text(LEFT - 6, base + 4, "0", anchor="end"),
    ]
    places = [LEFT + bins.place(edge) * width for edge in bins.edges]
    for count, start, end, low, high in zip(
        bins.counts, places[:-1], places[1:], bins.edges[:-1], bins.edges[1:], strict=True
    ):
        tall = count / most * height
        if count:
            title = f"<title>{short(low)} to {short(high)}: {count:,}</title>"
            size = f'width="{max(end - start - 1, 0.5):.1f}" height="{tall:.1f}"'
            parts.append(f'<rect class="bar" x="{start + 0.5:.1f}" y="{base - tall:.1f}" {size}>{title}</rect>')
    for edge in _labelled(bins):
        parts.append(_text(LEFT + bins.place(edge) * width, base + 14, short(edge), anchor="middle"))
    for mark in marks:
        if bins.edges[0] <= mark <= bins.edges[-1]:
            x = LEFT + bins.place(mark) * width
            parts.append(f'<line class="mark" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{base}"/>')
            parts.append(_text(x, TOP - 3, short(mark), anchor="middle", kind="mark"))
    return _svg(WIDTH, HEIGHT, parts)


def _labelled(bins: Bins) -> list[float]:
    """The edges that get a label: powers of two, or few enough of even ones."""
    if bins.logarithmic:
        exponents = [math.log2(edge) for edge in bins.edges]
        edges = [
            edge
            for edge, exponent in zip(bins.edges, exponents, strict=True)
            if math.isclose(exponent, round(exponent), abs_tol=1e-9)
        ]
    else:
        edges = list(bins.edges)
    return edges[:: math.ceil(len(edges) / MAX_LABELS)]


def bars(names: Sequence[str], values: Sequence[int], colours: Sequence[Colour] | None = None) -> str:
    """A row for each name with its bar, in its colour if given, and its value."""
    most = max(*values, 1)
    room = WIDTH - NAME_WIDTH - VALUE_WIDTH
    parts = []
    for row, (name, value) in enumerate(zip(names, values, strict=True)):
        fill = 'class="bar"' if colours is None else f'fill="rgb{colours[row]}"'
        middle = row * ROW + ROW / 2
        shown = name if len(name) <= MAX_LETTERS else f"{name[: MAX_LETTERS - 1]}…"
        parts += [
            f"<g><title>{escape(name)}: {value:,}</title>",
            _text(NAME_WIDTH - 8, middle + 4, shown, anchor="end", kind="name"),
            f'<rect x="{NAME_WIDTH}" y="{middle - 6}" width="{max(value / most * room, 0.5):.1f}" height="12" rx="2" '
            f"{fill}/>",
            _text(NAME_WIDTH + value / most * room + 6, middle + 4, f"{value:,}"),
            "</g>",
        ]
    return _svg(WIDTH, max(len(names), 1) * ROW, parts)


def heat(counts: NDArray[np.int64]) -> str:
    """A map (H, W) of counts, the darker the more."""
    cell = 10
    height, width = counts.shape
    most = max(int(counts.max()), 1)
    parts = [f'<rect class="frame" x="0.5" y="0.5" width="{width * cell - 1}" height="{height * cell - 1}"/>']
    for row, column in zip(*np.nonzero(counts), strict=True):
        count = int(counts[row, column])
        parts.append(
            f'<rect class="bar" x="{column * cell}" y="{row * cell}" width="{cell}" height="{cell}" '
            f'fill-opacity="{0.08 + 0.92 * count / most:.2f}"><title>{count:,}</title></rect>'
        )
    return _svg(width * cell, height * cell, parts, kind="heat")


def short(value: float) -> str:
    """A number for an axis.

    >>> short(0.25), short(16.0), short(11.3137085), short(2048.0)
    ('0.25', '16', '11.3', '2,048')
    """
    return f"{value:,.0f}" if value >= 100 or value == round(value) else f"{value:.3g}"


def _text(x: float, y: float, text: str, *, anchor: str = "start", kind: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text{named} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(width: int, height: int, parts: Sequence[str], *, kind: str = "chart") -> str:
    return f'<svg class="{kind}" viewBox="0 0 {width} {height}" role="img">\n' + "\n".join(parts) + "\n</svg>\n"
