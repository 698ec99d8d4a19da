"""Two trained detectors on the same images: which is better at what, by more than chance, and where one sees it."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
from rich.console import Console

from onestage.data.images import Pixels
from onestage.data.manifest import key_of
from onestage.errors import InputError
from onestage.evaluation import changes, charts
from onestage.evaluation.output import JPEG_QUALITY
from onestage.evaluation.report import f1, num_errors, write_csv
from onestage.evaluation.runs import Opened, detected, open_run
from onestage.metrics.paired import Difference, Differences, differences
from onestage.metrics.tide import Judged, judge
from onestage.training.module import Found

SHORT = 12
"""Letters of a content hash that tell datasets apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What became of one image: ``a`` and ``b`` are its errors in both, among detections that the models believe."""

    image_id: int
    a: Judged
    b: Judged

    @property
    def value(self) -> tuple[float, int]:
        """How much better b is: in F1, and in errors that it has less."""
        return f1(self.b) - f1(self.a), num_errors(self.a) - num_errors(self.b)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Of ``split``: APs and their differences, and what became of every image."""

    a: str
    b: str
    split: str
    dataset_hash: str
    classes: Sequence[str]
    differences: Differences
    images: Sequence[Change]

    def rows(self) -> list[tuple[str, Difference]]:
        """The mean first, then each class with truths, the largest gain of b first."""
        if self.differences.mean is None:
            return []
        by_gain = sorted(self.differences.classes.items(), key=lambda one: (-one[1].value, one[0]))
        return [("mean", self.differences.mean), *((self.classes[label], one) for label, one in by_gain)]

    def most(self, number: int, *, better: bool) -> list[Change]:
        """The images that changed most for the better or the worse; none that did not."""
        sign = 1 if better else -1
        changed = [one for one in self.images if sign * one.value[0] > 0]
        return sorted(changed, key=lambda one: (-sign * one.value[0], -sign * one.value[1], one.image_id))[:number]


def compare(
    run_a: str, run_b: str, *, split: str | None, overrides: Sequence[str], out: Path | None = None
) -> dict[str, Any]:
    """Evaluates both on a split (None: what was held out) of their dataset, or of that which ``overrides`` name.

    Into ``out`` come ``comparison.json``, ``per_class.csv``, a chart, and of each direction the
    ``trainer.num_pictures`` images that changed most. Raises InputError where they can't be compared.
    """
    console = Console(stderr=True, highlight=False, markup=False)
    a, b = (open_run(run, overrides) for run in (run_a, run_b))
    _check(a, b)
    split = a.held_out() if split is None else split
    found = [detected(one, split, console)[0] for one in (a, b)]
    with console.status(f"comparing {len(found[0]):,} images"):
        made = _compared(a, b, split, *found)
    told = {
        "run_a": run_a,
        "run_b": run_b,
        "split": split,
        "dataset_hash": made.dataset_hash,
        "num_images": len(made.images),
        "classes": [{"class": name, **_numbers(one)} for name, one in made.rows()[1:]],
        "map": None if made.differences.mean is None else _numbers(made.differences.mean),
        "better_images": [_image(one) for one in made.most(len(made.images), better=True)],
        "worse_images": [_image(one) for one in made.most(len(made.images), better=False)],
    }
    if out is None:
        return {**told, "out": None, "files": []}
    try:
        number = a.config["trainer"]["num_pictures"]
        files = write(made, told, out, images=lambda ids: a.data.images(split, ids), num_images=number)
    except OSError as error:
        raise InputError(f"{out} can't be written to ({error.strerror}): choose another with --out") from error
    return {**told, "out": str(out), "files": [str(file) for file in files]}


def _check(a: Opened, b: Opened) -> None:
    """Raises InputError where scores of the two do not mean the same."""
    mine, its = (one.data.manifest for one in (a, b))
    if mine.classes != its.classes:
        raise InputError(f"{a.run} knows {', '.join(mine.classes)}, but {b.run} knows {', '.join(its.classes)}")
    if mine.content_hash != its.content_hash:
        raise InputError(
            f"{a.run} has dataset {mine.content_hash[:SHORT]} ({a.data.root}), but {b.run} has "
            f"{its.content_hash[:SHORT]} ({b.data.root}): name the one to compare them on with data.root=…"
        )


def _compared(a: Opened, b: Opened, split: str, found_a: Sequence[Found], found_b: Sequence[Found]) -> Comparison:
    judged = (
        [judge(one, threshold=opened.predictor.threshold) for one in found]
        for opened, found in ((a, found_a), (b, found_b))
    )
    images = [Change(image_id=one.image_id, a=in_a, b=in_b) for one, in_a, in_b in zip(found_a, *judged, strict=True)]
    return Comparison(
        a=a.run,
        b=b.run,
        split=split,
        dataset_hash=a.data.manifest.content_hash,
        classes=list(a.predictor.classes),
        differences=differences(found_a, found_b),
        images=images,
    )


def write(
    made: Comparison,
    told: Mapping[str, Any],
    folder: Path,
    *,
    images: Callable[[Sequence[int]], Mapping[int, Pixels]],
    num_images: int,
) -> list[Path]:
    """Fills ``folder``; ``images`` gives those of some ids. With ``num_images`` of 0 nothing is drawn."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "comparison.json", folder / "per_class.csv"]
    files[0].write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    write_csv(files[1], [{"class": name, **_numbers(one)} for name, one in made.rows()])
    for old in (*folder.glob("better_??_*.jpg"), *folder.glob("worse_??_*.jpg")):  # of a comparison before
        old.unlink()
    if num_images == 0:
        return files
    if made.rows():
        files.append(folder / "differences.png")
        changes.chart(made.rows(), split=made.split).savefig(files[-1], dpi=charts.DPI)
    for kind in ("better", "worse"):
        chosen = made.most(num_images, better=kind == "better")
        pixels = images([one.image_id for one in chosen])
        for rank, one in enumerate((one for one in chosen if one.image_id in pixels), start=1):
            key = key_of(one.image_id)
            drawn = changes.picture(pixels[one.image_id], one.a, one.b, name=f"image {key}", classes=made.classes)
            files.append(folder / f"{kind}_{rank:02d}_{key}.jpg")
            quality = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
            cv2.imwrite(str(files[-1]), cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR), quality)
    return files


def _numbers(one: Difference) -> dict[str, Any]:
    values = {"ap_a": one.a, "ap_b": one.b, "difference": one.value, "low": one.low, "high": one.high}
    rounded = {name: None if value is None else round(value, 6) for name, value in values.items()}
    return {"truths": one.truths, **rounded, "verdict": one.verdict}


def _image(one: Change) -> dict[str, Any]:
    numbers = {"f1_a": f1(one.a), "f1_b": f1(one.b)}
    counts = {"errors_a": num_errors(one.a), "errors_b": num_errors(one.b)}
    return {"image": key_of(one.image_id), **{name: round(x, 5) for name, x in numbers.items()}, **counts}
