"""Images in which a detector errs, truth on the left and prediction on the right, with errors marked by kind."""

from collections.abc import Sequence
from typing import Final

import cv2
import numpy as np

from onestage.drawing import Colour, annotate, side_by_side
from onestage.evaluation.charts import KIND_COLOURS
from onestage.evaluation.report import f1
from onestage.metrics.tide import HIT, KINDS, Judged

FOUND: Final = (60, 130, 255)
NOT_FOUND: Final = "missed"
STRIP_PX: Final = 22
LEAST_WIDTH_PX: Final = 760
"""What the lines of text need."""
FONT: Final = cv2.FONT_HERSHEY_SIMPLEX


def picture(image: np.ndarray, judged: Judged, *, name: str, classes: Sequence[str]) -> np.ndarray:
    """One image (H, W, 3) with its truths and detections; a line above says what there is, one below names colours.

    Crowds are not drawn, nor what lies in one.
    """
    left, right = _truths(image, judged, classes), detections(image, judged, classes)
    both = side_by_side(left, right)
    hits, wrong = int((judged.kind == HIT).sum()), int((judged.kind >= 0).sum())
    title = f"{name}: F1 {f1(judged):.2f}, {hits} found, {int(judged.unfound.sum())} not found, {wrong} wrong"
    return framed(both, title, kinds_in(judged))


def kinds_in(*judged: Judged) -> list[str]:
    """The kinds of errors that are there."""
    present = [kind for number, kind in enumerate(KINDS) if any((one.kind == number).any() for one in judged)]
    return [*present, *([NOT_FOUND] if any(one.unfound.any() for one in judged) else [])]


def framed(panels: np.ndarray, title: str, kinds: Sequence[str]) -> np.ndarray:
    """Pictures with a line of text above and the colours' names below."""
    legend = [("found", FOUND), *(("not found" if kind == NOT_FOUND else kind, rgb(kind)) for kind in kinds)]
    width = max(panels.shape[1], LEAST_WIDTH_PX)
    panels = np.pad(panels, ((0, 0), (0, width - panels.shape[1]), (0, 0)), constant_values=255)
    return np.concatenate((_title(title, width), panels, _legend(legend, width)))


def _truths(image: np.ndarray, judged: Judged, classes: Sequence[str]) -> np.ndarray:
    shown = np.flatnonzero(~judged.truths.crowd)
    shown = shown[np.argsort(judged.unfound[shown], kind="stable")]  # what was not found on top
    return annotate(
        image,
        judged.truths.boxes[shown].tolist(),
        texts=[classes[label] for label in judged.truths.labels[shown]],
        colours=[rgb(NOT_FOUND) if judged.unfound[at] else FOUND for at in shown],
    )


def detections(image: np.ndarray, judged: Judged, classes: Sequence[str]) -> np.ndarray:
    """Hits without a word, errors on top of them with class and score, in the colour of their kind."""
    shown = np.flatnonzero(judged.kind >= HIT)
    shown = shown[np.argsort(judged.kind[shown] != HIT, kind="stable")]
    texts, colours = [], []
    for at in shown:
        kind = int(judged.kind[at])
        said = f"{classes[judged.drawn.labels[at]]} {judged.drawn.scores[at]:.2f}"
        texts.append("" if kind == HIT else said)
        colours.append(FOUND if kind == HIT else rgb(KINDS[kind]))
    return annotate(image, judged.drawn.boxes[shown].tolist(), texts=texts, colours=colours)


def _title(text: str, width: int) -> np.ndarray:
    strip = np.full((STRIP_PX, width, 3), 255, np.uint8)
    return cv2.putText(strip, text, (6, STRIP_PX - 7), FONT, 0.45, (0, 0, 0), 1, cv2.LINE_AA)


def _legend(entries: Sequence[tuple[str, Colour]], width: int) -> np.ndarray:
    strip = np.full((STRIP_PX, width, 3), 255, np.uint8)
    x = 6
    for name, colour in entries:
        cv2.rectangle(strip, (x, 6), (x + 12, 16), colour, -1)
        cv2.putText(strip, name, (x + 17, STRIP_PX - 7), FONT, 0.45, (0, 0, 0), 1, cv2.LINE_AA)
        x += 17 + cv2.getTextSize(name, FONT, 0.45, 1)[0][0] + 16
    return strip


def rgb(kind: str) -> Colour:
    code = KIND_COLOURS[kind]
    return int(code[1:3], 16), int(code[3:5], 16), int(code[5:7], 16)
