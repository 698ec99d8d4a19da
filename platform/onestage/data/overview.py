"""A set on one page: its numbers, how they are spread, and pictures with their boxes.

The page is one HTML file without scripts that fetches nothing: pictures and charts lie in it.
"""

import base64
import os
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Final, cast

import cv2
import numpy as np

from onestage.data import charts, images
from onestage.data.contents import Contents, Entry, Progress
from onestage.data.formats.record import Box
from onestage.data.statistics import Count, Ints, Statistics, measure, smallest_side
from onestage.drawing import COLOURS
from onestage.errors import InputError

NUM_IMAGES: Final = 24
PICTURE_SIDE_PX: Final = 480
JPEG_QUALITY: Final = 82
MAX_CLASSES: Final = 20
"""Bars in the chart of classes: the most frequent; the table has them all."""
MAX_SIZES: Final = 8
"""Sizes of images that are told apart."""
GRID: Final = 24
"""Cells a side of the map of centres."""

_STYLE: Final = """
:root { color-scheme: light dark; --ground: #fbfbfa; --card: #fff; --ink: #1d2126; --soft: #68707a; --line: #e3e5e8;
  --bar: #3a7ca5; --mark: #d1603d; }
@media (prefers-color-scheme: dark) { :root { --ground: #15181c; --card: #1d2126; --ink: #e6e8ea; --soft: #9aa2ab;
  --line: #31363d; --bar: #6aa9cf; --mark: #e58a6b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { margin: 0; font-size: 28px; font-weight: 650; overflow-wrap: anywhere; }
h2 { margin: 40px 0 12px; font-size: 19px; font-weight: 650; }
h3 { margin: 0 0 2px; font-size: 15px; font-weight: 600; }
p { margin: 4px 0 0; color: var(--soft); }
.card p { font-size: 13px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 16px; }
.card { overflow: auto; max-height: 560px; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(270px, 1fr)); gap: 14px; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); gap: 14px; align-items: start; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 12px 5px 0; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { color: var(--soft); font-weight: 500; }
th:first-child, td:first-child { text-align: left; white-space: normal; overflow-wrap: anywhere; }
tr:last-child td { border-bottom: 0; }
tr.part td { border-top: 2px solid var(--line); }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font: 11px system-ui, "Segoe UI", sans-serif; font-variant-numeric: tabular-nums; }
svg .bar { fill: var(--bar); }
svg .rule { stroke: var(--line); }
svg .mark { stroke: var(--mark); stroke-dasharray: 3 3; }
svg text.mark { fill: var(--mark); stroke: none; }
svg text.name { fill: var(--ink); font-size: 12px; }
figure { margin: 0; }
figure svg { max-height: 300px; border-radius: 6px; background: var(--line); }
figure rect { fill: transparent; vector-effect: non-scaling-stroke; stroke-width: 2px; }
svg text.label { fill: #000; paint-order: stroke; stroke-linejoin: round; }
svg .frame { fill: none; stroke: var(--line); }
svg.chart { margin-top: 10px; }
svg.heat { max-width: 210px; margin: 10px auto 0; }
figcaption { margin-top: 4px; color: var(--soft); font-size: 12px; overflow-wrap: anywhere; }
"""


def write(
    contents: Contents,
    out: Path | str,
    *,
    num_images: int = NUM_IMAGES,
    input_size: Sequence[int] = (416, 416),
    strides: Sequence[int] = (8, 16, 32),
    progress: Progress | None = None,
) -> Statistics:
    """Write the page about ``contents`` to the file ``out``, and return the numbers that it shows.

    ``num_images`` pictures of each split; box sizes are those at ``input_size`` [H, W], beside the ``strides``.
    """
    out = check_name(out)
    statistics = measure(contents)
    text = _page(contents, statistics, num_images, input_size, strides, progress or (lambda done, total: None))
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8", errors="replace")  # a file's name may be no UTF-8
    os.replace(partial, out)
    return statistics


def check_name(out: Path | str) -> Path:
    """``out`` where it names a page: one typed wrongly must not overwrite a set's own files."""
    out = Path(out)
    if out.suffix.lower() not in (".html", ".htm") or out.is_dir():
        raise InputError(f"{out} is no name for a page: give a file that ends in .html")
    return out


def chosen(entries: Sequence[Entry], *, num_images: int) -> list[Entry]:
    """So many of ``entries``, in their order: of every class where there is room, rare ones first, else evenly spread.

    The same for the same entries.
    """
    members: dict[int, list[int]] = {}
    for index, entry in enumerate(entries):
        for label in set(entry.labels):
            members.setdefault(label, []).append(index)
    picked: set[int] = set()
    covered: set[int] = set()
    for label in sorted(members, key=lambda label: (len(members[label]), label)):
        if label not in covered and len(picked) < num_images:
            # Of the images that show it, the one that shows most that is still missing.
            best = max(members[label], key=lambda index: len(set(entries[index].labels) - covered))
            picked.add(best)
            covered |= set(entries[best].labels)
    rest = [index for index in range(len(entries)) if index not in picked]
    room = min(num_images - len(picked), len(rest))
    picked |= {rest[number * len(rest) // room] for number in range(room)}
    return [entries[index] for index in sorted(picked)]


def _page(
    contents: Contents,
    statistics: Statistics,
    num_images: int,
    input_size: Sequence[int],
    strides: Sequence[int],
    progress: Progress,
) -> str:
    total = statistics.total()
    shown = {split: chosen(entries, num_images=num_images) for split, entries in contents.splits.items()}
    count = sum(map(len, shown.values()))
    done = 0
    sheets = []
    for split, entries in shown.items():
        figures = []
        for entry in entries:
            figures.append(_figure(entry, contents.classes))
            done += 1
            progress(done, count)
        number = f"{len(entries):,} of {_plural(len(contents.splits[split]), 'image')}"
        sheets.append(f"<h2>{escape(split)}: {number}</h2>\n<div class=sheet>\n{''.join(figures)}</div>\n")
    name = escape(contents.name)
    head = ", ".join(
        (
            _plural(total.images, "image"),
            _plural(total.boxes, "box", "boxes"),
            _plural(len(contents.classes), "class", "classes"),
        )
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{name}</h1>\n<p>{head}</p>\n"
        f"{_findings(contents)}"
        f"<h2>Splits and classes</h2>\n{_table(statistics)}"
        f"<h2>How they are spread</h2>\n{_charts(statistics, input_size, strides)}"
        f"{''.join(sheets)}</main>\n</body>\n</html>\n"
    )


def _findings(contents: Contents) -> str:
    if not contents.findings:
        return ""
    counts: dict[str, int] = {}
    for finding in contents.findings:
        counts[finding.kind] = counts.get(finding.kind, 0) + 1
    rows = "".join(f"<tr><td>{escape(kind)}<td>{count:,}" for kind, count in counts.items())
    note = "<p>What was mended or left out of the numbers below; <code>onestage data check</code> says where.</p>"
    return f"<h2>Findings</h2>\n<div class=card><table>{rows}</table>{note}</div>\n"


def _table(statistics: Statistics) -> str:
    """Images and boxes, then every class, by split."""
    counts = [*statistics.splits.values(), statistics.total()]

    def row(name: str, values: Iterable[int | float], kind: str = "") -> str:
        cells = "".join(f"<td>{value:,.2f}" if isinstance(value, float) else f"<td>{value:,}" for value in values)
        return f"<tr{kind}><td>{escape(name)}{cells}\n"

    heads = "".join(f"<th>{escape(split)}" for split in [*statistics.splits, "all"])
    rows = [
        row("images", [count.images for count in counts]),
        row("images without boxes", [count.without_boxes for count in counts]),
        row("boxes", [count.boxes for count in counts]),
        row("boxes per image", [_per_image(count) for count in counts]),
    ]
    for label, name in enumerate(statistics.classes):
        numbers = [int(count.by_class[label]) for count in counts]
        rows.append(row(name, numbers, " class=part" if label == 0 else ""))
    return f"<div class=card><table><tr><th>{heads}\n{''.join(rows)}</table></div>\n"


def _per_image(count: Count) -> float:
    return count.boxes / max(count.images, 1)


def _charts(statistics: Statistics, input_size: Sequence[int], strides: Sequence[int]) -> str:
    if not len(statistics.boxes):
        return "<p>There are no boxes.</p>\n"
    height, width = input_size
    sides = statistics.letterboxed_sides(input_size)
    relative = np.sqrt(statistics.sides.prod(axis=1) / statistics.sizes.prod(axis=1)[statistics.images])
    small, limit = int(statistics.too_small(input_size, strides).sum()), smallest_side(strides)
    at_input = f"√(width × height) in pixels, letterboxed; strides dashed; {small:,} with a side under {limit:g}"
    cards = [
        _card("Classes", "boxes of each class in all splits", _class_bars(statistics)),
        _card(
            f"Box size at {width}×{height}",
            at_input,
            charts.histogram(charts.octaves(np.sqrt(sides.prod(axis=1))), marks=strides),
        ),
        _card(
            "Relative box size",
            "√(area of the box / area of its image)",
            charts.histogram(charts.even(relative, low=0, high=1, count=20)),
        ),
        _card(
            "Aspect ratio", "width / height of the boxes", charts.histogram(charts.octaves(sides[:, 0] / sides[:, 1]))
        ),
        _card("Boxes per image", "images with so many", charts.histogram(charts.whole(statistics.boxes_per_image()))),
        _image_sizes(statistics),
        _card("Where boxes lie", "their centres, every image stretched to a square", charts.heat(_centres(statistics))),
    ]
    return f"<div class=charts>\n{''.join(cards)}</div>\n"


def _card(title: str, note: str, chart: str) -> str:
    return f"<div class=card><h3>{escape(title)}</h3><p>{escape(note)}</p>\n{chart}</div>\n"


def _class_bars(statistics: Statistics) -> str:
    by_class = statistics.total().by_class.tolist()
    order = sorted(range(len(by_class)), key=lambda label: (-by_class[label], label))
    shown = order[:MAX_CLASSES]
    chart = charts.bars(
        [statistics.classes[label] for label in shown],
        [by_class[label] for label in shown],
        [_colour(label) for label in shown],
    )
    rest = f"<p>and {_plural(len(order) - len(shown), 'more class', 'more classes')}, in the table</p>\n"
    return chart + (rest if len(order) > len(shown) else "")


def _image_sizes(statistics: Statistics) -> str:
    """Each size with its images where there are a few, else how they are spread."""
    found, counts = np.unique(statistics.sizes.astype(np.int64), axis=0, return_counts=True)
    if len(found) > MAX_SIZES:
        sides = np.sqrt(statistics.sizes.prod(axis=1))
        note = f"√(width × height) in pixels, of {len(found):,} sizes"
        return _card("Image size", note, charts.histogram(charts.octaves(sides)))
    order = np.argsort(-counts, kind="stable")
    names = [f"{width}×{height}" for width, height in found[order].tolist()]
    return _card("Image size", "images of each", charts.bars(names, counts[order].tolist()))


def _centres(statistics: Statistics) -> Ints:
    """Boxes whose centre lies in each of ``GRID`` by ``GRID`` cells of its image, (row, column)."""
    centres = (statistics.boxes[:, :2] + statistics.boxes[:, 2:]) / 2 / statistics.sizes[statistics.images]
    columns, rows = np.clip((centres * GRID).astype(np.int64), 0, GRID - 1).T
    return np.bincount(rows * GRID + columns, minlength=GRID * GRID).reshape(GRID, GRID)


def _figure(entry: Entry, classes: Sequence[str]) -> str:
    """The picture with its boxes over it, which a browser draws sharp at every size, with their names in any script."""
    caption = f"{escape(entry.where)} · {entry.width}×{entry.height} · {_plural(len(entry.boxes), 'box', 'boxes')}"
    try:
        pixels = images.decode(entry.content(), orientation=entry.orientation)
    except (InputError, OSError):
        pixels = None
    if pixels is None:
        return f"<figure><p class=card>can't be decoded</p><figcaption>{caption}</figcaption></figure>\n"
    # Boxes are in the pixels that the annotation knows; text and lines keep their size whatever that is.
    unit = max(entry.width, entry.height) / PICTURE_SIDE_PX
    shapes = []
    largest_first = sorted(zip(entry.boxes, entry.labels, strict=True), key=lambda one: -_area(one[0]))
    for box, label in largest_first:
        shapes.append(_shape(box, classes[label], _colour(label), unit=unit))
    size = f'width="{entry.width}" height="{entry.height}"'
    return (
        f'<figure><svg viewBox="0 0 {entry.width} {entry.height}">'
        f'<image {size} preserveAspectRatio="none" href="{_data_uri(pixels)}"/>\n'
        f"{''.join(shapes)}</svg><figcaption>{caption}</figcaption></figure>\n"
    )


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _shape(box: Box, name: str, colour: charts.Colour, *, unit: float) -> str:
    """A box and its class's name, on hover; also written where there is room. ``unit`` is a pixel of the page."""
    left, top, right, bottom = box
    size = 17 * unit
    written = ""
    if len(name) * size * 0.62 <= right - left and size * 1.3 <= bottom - top:
        style = f"font-size: {size:.2f}px; stroke: rgb{colour}; stroke-width: {4 * unit:.2f}px"
        written = (
            f'<text class="label" x="{left + 4 * unit:.1f}" y="{top + size:.1f}" style="{style}">{escape(name)}</text>'
        )
    return (
        f'<g><title>{escape(name)}</title><rect x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" '
        f'height="{bottom - top:.1f}" stroke="rgb{colour}"/>{written}</g>\n'
    )


def _data_uri(pixels: images.Pixels) -> str:
    """The picture as a small JPEG within the page."""
    height, width = pixels.shape[:2]
    fit = PICTURE_SIDE_PX / max(height, width)
    if fit < 1:
        less = max(1, round(width * fit)), max(1, round(height * fit))
        pixels = cast(images.Pixels, cv2.resize(pixels, less, interpolation=cv2.INTER_AREA))
    _, content = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    return f"data:image/jpeg;base64,{base64.b64encode(content.tobytes()).decode()}"


def _colour(label: int) -> charts.Colour:
    return COLOURS[label % len(COLOURS)]


def _plural(count: int, one: str, many: str = "") -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"
