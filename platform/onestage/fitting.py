"""Priors that fit a dataset: where its boxes, their clusters and a detector's config meet.

Sizes and anchors are widths and heights in pixels of the input, priors the same in the unit of a detector's config.
"""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch import Tensor

from onestage.anchors import clusters
from onestage.config import CONF, build, compose, merged, options
from onestage.data.box_sizes import BoxSizes, Fit, box_sizes
from onestage.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEFAULT_K: Final = 9
DEFAULT_SIZE: Final = (416, 416)
FALLBACK: Final = "yolov3"
"""The detector that the priors are written for where none has as many."""
WHOLE_FROM_PX: Final = 10
MAX_DOTS: Final = 20_000


class Anchors(NamedTuple):
    """Anchors (k, 2), and how well they meet the boxes: see ``onestage.anchors.clusters``."""

    pixels: Tensor
    average_iou: float
    best_possible_recall: float

    @classmethod
    def scored(cls, pixels: Tensor, sizes: Tensor) -> "Anchors":
        return cls(pixels, clusters.average_iou(sizes, pixels), clusters.best_possible_recall(sizes, pixels))

    def report(self) -> dict[str, Any]:
        """The same as plain data."""
        return {
            "anchors": [[round(side, 2) for side in one] for one in self.pixels.tolist()],
            "average_iou": self.average_iou,
            "best_possible_recall": self.best_possible_recall,
        }


def fit_report(
    root: str,
    *,
    k: int | None = None,
    size: Sequence[int] | None = None,
    detector: str | None = None,
    split: str = "train",
    fit: Fit = "letterbox",
    seed: int = 0,
    out: Path | None = None,
    plot: Path | None = None,
) -> dict[str, Any]:
    """Anchors fitted to a dataset folder's split, beside those that detectors have, and the overrides to train with.

    ``k`` and ``size`` [H, W] are the detector's where one is named, else ``DEFAULT_K`` and ``DEFAULT_SIZE``; without a
    name the overrides are for the first that has k priors, or ``FALLBACK``. ``out`` is a yaml to write, ``plot`` a PNG.
    """
    for file, suffix in ((out, ".yaml"), (plot, ".png")):
        if file is not None and (file.suffix != suffix or file.is_dir()):
            raise InputError(f"{file} is no name for what is to be written there: give a file that ends in {suffix}")
    name, k, alike = _chosen(detector, k)
    node = compose("train", [f"detector={name}"])["detector"]
    height, width = size or (DEFAULT_SIZE if detector is None else node["input_size"])
    sized = {} if [height, width] == node["input_size"] else {"input_size": [height, width]}
    node |= sized
    unit, masks = _unit_px(node), _new_masks(node, k)
    boxes = _read(root, split, size=(height, width), fit=fit)
    fitted_ones, priors = _fitted(boxes.sizes, k, unit=unit, seed=seed, where=f"{split} of {root}")
    changed = {**sized, "priors": priors, **masks}
    own = {other: _scored_defaults(other, boxes.sizes) for other in (name, *alike)}
    overrides = [f"detector={name}", *_overrides(changed), *(["data.fit=stretch"] if fit == "stretch" else [])]
    if out is not None:
        _write_yaml(out, name, changed, fit=fit, title=f"Priors fitted to {len(boxes.sizes):,} boxes of {split}.")
    if plot is not None:
        _plot(plot, boxes.sizes, fitted_ones, own[name], name=name, size=(height, width))
    return {
        "root": root,
        "split": split,
        "size": [height, width],
        "fit": fit,
        "seed": seed,
        "num_images": boxes.num_images,
        "num_boxes": len(boxes.sizes),
        "recall_iou": clusters.RECALL_IOU,
        "detector": name,
        "fitted": fitted_ones.report(),
        "defaults": _grouped(own),
        "overrides": overrides,
        "command": shlex.join(["onestage", "train", f"data.root={root}", *overrides]),
    }


def fitted(config: dict[str, Any]) -> dict[str, Any]:
    """A composed config with what ``detector.fit_anchors`` asks for: priors fitted to ``data.root``'s train split.

    As many as the config has, at the detector's input size, by the config's seed. The overrides say them too, so that
    a checkpoint, a resume and an evaluation build the same detector; a resume keeps the priors of its run.
    """
    node = config["detector"]
    if not node.get("fit_anchors"):
        return config
    changed: dict[str, Any] = {"fit_anchors": False}
    if config["resume"]:
        print("detector.fit_anchors: a resumed run keeps its priors", file=sys.stderr)
    else:
        root, fit, size = config["data"]["root"], config["data"].get("fit", "letterbox"), node["input_size"]
        unit = _unit_px(node)
        boxes = _read(root, "train", size=size, fit=fit)
        before = Anchors.scored(_pixels(node["priors"], unit), boxes.sizes)
        k = len(node["priors"])
        after, priors = _fitted(boxes.sizes, k, unit=unit, seed=config["seed"], where=f"train of {root}")
        changed |= {"priors": priors, **_new_masks(node, k)}
        over = f"over {len(boxes.sizes):,} boxes at {size[0]}x{size[1]}"
        print(f"detector.priors as configured: {_scores(before)}, {over}", file=sys.stderr)
        print(f"detector.priors as fitted: {_scores(after)}", file=sys.stderr)
    return {
        **config,
        "detector": {**node, **changed},
        "overrides": merged(config["overrides"], _overrides(changed)),
    }


def _chosen(detector: str | None, k: int | None) -> tuple[str, int, list[str]]:
    """The detector to fit priors for, how many, and which others have as many, where none was named."""
    known = own_priors()
    if detector is not None:
        if detector in options("detector") and detector not in known:
            raise InputError(f"{detector} has no priors to fit; there are: {', '.join(known)}")
        return detector, k or len(known.get(detector, ())), []  # an unknown one is refused where it is composed
    k = k or DEFAULT_K
    alike = [name for name, priors in known.items() if len(priors) == k]
    return alike[0] if alike else FALLBACK, k, alike[1:]


def _scored_defaults(name: str, sizes: Tensor) -> Anchors:
    node = compose("train", [f"detector={name}"])["detector"]
    return Anchors.scored(_pixels(node["priors"], _unit_px(node)), sizes)


def own_priors() -> dict[str, list[list[float]]]:
    """The priors of those detectors' configs that have some, from the files: to compose them all takes seconds."""
    import yaml

    nodes = {name: yaml.safe_load((CONF / "detector" / f"{name}.yaml").read_text()) for name in options("detector")}

    def priors(name: str) -> Any:
        parents = [one for one in nodes[name].get("defaults", []) if one in nodes]
        return nodes[name].get("priors") or next(filter(None, map(priors, reversed(parents))), None)

    return {name: found for name in nodes if (found := priors(name))}


def _unit_px(node: Mapping[str, Any]) -> int:
    """The pixels in one unit of a detector's ``priors``; InputError for what the detector itself refuses."""
    from rich.console import Console

    # Without memory for the weights, which are not looked at.
    with Console(stderr=True).status("building the detector"), torch.device("meta"):
        unit: int = build({**node, "weights": None, "fit_anchors": False}).prior_unit_px
    return unit


def _read(root: str, split: str, *, size: Sequence[int], fit: Fit) -> BoxSizes:
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"reading the boxes of {split}", total=None)
        boxes = box_sizes(
            root, split, size=size, fit=fit, progress=lambda done, total: bar.update(task, completed=done, total=total)
        )
    if boxes.skipped:
        first = boxes.skipped[0]
        print(f"onestage: {len(boxes.skipped)} images left out; the first: {first.key}: {first.why}", file=sys.stderr)
    if len(boxes.sizes) == 0:
        raise InputError(f"{split} of {root} has no box to fit anchors to: name another split or dataset")
    return boxes


def _fitted(sizes: Tensor, k: int, *, unit: int, seed: int, where: str) -> tuple[Anchors, list[list[float]]]:
    """The anchors as the config will have them, rounded, and as its ``priors``."""
    from rich.console import Console

    try:
        with Console(stderr=True).status(f"fitting {k} anchors to {len(sizes):,} boxes"):
            pixels = clusters.fit(sizes, k, seed=seed)
    except ValueError as error:
        raise InputError(f"{error}; {where} has {len(sizes):,} boxes: fit fewer, or keep the detector's own") from error
    priors = [[_rounded(side, unit) for side in one] for one in pixels.tolist()]
    return Anchors.scored(_pixels(priors, unit), sizes), priors


def _new_masks(node: Mapping[str, Any], k: int) -> dict[str, Any]:
    """``masks`` for k priors, where the detector has such a key and they differ from its own."""
    if "masks" not in node or (masks := _masks(node["masks"], k)) == node["masks"]:
        return {}
    return {"masks": masks}


def _masks(masks: Sequence[Sequence[int]], k: int) -> list[list[int]]:
    """Each of k priors on one level, finest first; a level keeps its number where they add up to k.

    yolov4-tiny.cfg leaves its smallest prior out: a box that fits a fitted one there best would never be learnt.
    """
    counts = [len(mask) for mask in masks]
    if k < len(counts):
        raise InputError(
            f"the detector has {len(counts)} levels, which need a prior each: fit that many at least, not {k}"
        )
    if sum(counts) != k:
        counts = [k // len(counts) + (level < k % len(counts)) for level in range(len(counts))]
    return [list(range(sum(counts[:level]), sum(counts[: level + 1]))) for level in range(len(counts))]


def _rounded(side_px: float, unit_px: int) -> float:
    """As the authors' files have them: whole pixels, tenths of small ones, thousandths of a cell."""
    if unit_px > 1:
        return max(round(side_px / unit_px, 3), 0.001)
    return round(side_px) if side_px >= WHOLE_FROM_PX else max(round(side_px, 1), 0.1)


def _pixels(priors: Sequence[Sequence[float]], unit_px: int) -> Tensor:
    return torch.tensor(priors, dtype=torch.float64) * unit_px


def _overrides(changed: Mapping[str, Any]) -> list[str]:
    return [f"detector.{key}={json.dumps(value, separators=(',', ':'))}" for key, value in changed.items()]


def _scores(anchors: Anchors) -> str:
    recall = f"possible recall at IoU {clusters.RECALL_IOU} {anchors.best_possible_recall:.1%}"
    return f"average IoU {anchors.average_iou:.3f}, {recall}"


def _grouped(own: Mapping[str, Anchors]) -> list[dict[str, Any]]:
    """One entry for all detectors of the same anchors."""
    found: list[dict[str, Any]] = []
    for name, anchors in own.items():
        report = anchors.report()
        same = [one for one in found if one["anchors"] == report["anchors"]]
        if same:
            same[0]["detectors"].append(name)
        else:
            found.append({"detectors": [name], **report})
    return found


def _write_yaml(out: Path, name: str, changed: Mapping[str, Any], *, fit: Fit, title: str) -> None:
    """A recipe as those of ``conf/experiment/``, for ``onestage train experiment=NAME``."""
    lines = ["# @package _global_", f"# {title}", "defaults:", f"  - override /detector: {name}", "  - _self_", ""]
    lines += ["detector:", *(f"  {key}: {json.dumps(value)}" for key, value in changed.items())]
    lines += ["data:", "  fit: stretch"] if fit == "stretch" else []
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    inside = out.absolute().parent == (CONF / "experiment").absolute()
    then = "" if inside else f", once it lies in {CONF / 'experiment'}"
    print(f"written: {out}, for experiment={out.stem}{then}", file=sys.stderr)


def _plot(file: Path, sizes: Tensor, chosen: Anchors, own: Anchors, *, name: str, size: Sequence[int]) -> None:
    figure = anchor_figure(sizes, {name: own, "fitted": chosen}, size=size)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)
    print(f"written: {file}", file=sys.stderr)


def anchor_figure(sizes: Tensor, kinds: Mapping[str, Anchors], *, size: Sequence[int]) -> "Figure":
    """Boxes (N, 2) with one or two ``kinds`` of anchors by name on the left, how well they meet on the right."""
    from matplotlib.figure import Figure  # without pyplot, which would look for a screen

    figure = Figure(figsize=(13, 6), layout="constrained")
    place, quality = figure.subplots(1, 2)
    dots = sizes[:: max(1, len(sizes) // MAX_DOTS)]
    place.scatter(dots[:, 0], dots[:, 1], s=4, alpha=0.25, color="#888888", label="boxes", rasterized=True)
    for (label, anchors), (colour, marker) in zip(kinds.items(), (("#D55E00", "s"), ("#0072B2", "o")), strict=False):
        place.scatter(
            anchors.pixels[:, 0], anchors.pixels[:, 1], s=70, marker=marker, facecolors="none", edgecolors=colour,
            linewidths=2, label=label,
        )  # fmt: skip
        best = clusters.best_ious(sizes, anchors.pixels)
        told = f"{label}: mean {anchors.average_iou:.3f}"
        quality.hist(best, bins=50, range=(0, 1), histtype="step", linewidth=2, color=colour, label=told)
    place.set_xscale("log", base=2)
    place.set_yscale("log", base=2)
    for axis in (place.xaxis, place.yaxis):
        axis.set_major_formatter("{x:g}")
    place.set(xlabel="width in pixels", ylabel="height in pixels")
    place.set(title=f"{len(sizes):,} boxes on an input of {size[0]}x{size[1]}", aspect="equal", adjustable="datalim")
    quality.axvline(clusters.RECALL_IOU, color="black", linestyle=":", linewidth=1)
    quality.set(xlabel="IoU of a box with the anchor that fits best", ylabel="boxes", xlim=(0, 1))
    quality.margins(y=0.2)  # room for the legend
    for axes in (place, quality):
        axes.legend(frameon=False, loc="upper left")
        axes.spines[["top", "right"]].set_visible(False)
    return figure
