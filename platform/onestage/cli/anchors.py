"""``onestage anchors``: the priors that fit a dataset."""

import argparse
import json
from pathlib import Path
from typing import Any

from onestage.cli.terminal import count, size, writing
from onestage.errors import DONE


def add(verbs: Any) -> None:
    """The verb's parser, for the command line."""
    anchors = verbs.add_parser("anchors", help="priors that fit a dataset, by k-means on 1 - IoU")
    anchors.add_argument("root", metavar="DIR", help="dataset folder")
    anchors.add_argument("-k", type=count, help="how many (default: the detector's, or 9)")
    anchors.add_argument(
        "--size", type=size, metavar="SIDE|HxW", help="of the input, in pixels (default: the detector's, or 416)"
    )
    anchors.add_argument("--detector", metavar="NAME", help="config of conf/detector (default: one that has k priors)")
    anchors.add_argument("--split", default="train", help="whose boxes (default: train)")
    anchors.add_argument(
        "--fit", choices=["letterbox", "stretch"], default="letterbox", help="how images come to the size, as data.fit"
    )
    anchors.add_argument("--seed", type=int, default=0, help="of the restarts (default: 0)")
    anchors.add_argument("--out", type=Path, metavar="FILE.yaml", help="recipe to write, for conf/experiment")
    anchors.add_argument("--plot", type=Path, metavar="FILE.png", help="picture to write, of boxes and anchors")
    anchors.add_argument("--json", action="store_true", help="one JSON object on stdout")
    anchors.set_defaults(run=_anchors)


def _anchors(options: argparse.Namespace) -> int:
    from rich.console import Console

    with Console(stderr=True).status("starting"):
        from onestage.fitting import fit_report

    with writing(options.out or options.plot):
        report = fit_report(
            options.root,
            k=options.k,
            size=options.size,
            detector=options.detector,
            split=options.split,
            fit=options.fit,
            seed=options.seed,
            out=options.out,
            plot=options.plot,
        )
    if options.json:
        print(json.dumps(report))
    else:
        _show(report)
    return DONE


def _show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    how = {"letterbox": "letterboxed", "stretch": "stretched"}[report["fit"]]
    height, width = report["size"]
    print(
        f"{report['num_boxes']:,} boxes of {report['num_images']:,} images in {report['split']}, "
        f"{how} to {height}x{width}"
    )
    table = Table("anchors of", "average IoU", "possible recall", "width x height in pixels")
    for name, one in (
        ("fitted", report["fitted"]),
        *((", ".join(one["detectors"]), one) for one in report["defaults"]),
    ):
        sides = " ".join(f"{round(wide, 1):g}x{round(high, 1):g}" for wide, high in one["anchors"])
        table.add_row(name, f"{one['average_iou']:.3f}", f"{one['best_possible_recall']:.1%}", sides)
    Console().print(table)
    print(f"possible recall: boxes that meet an anchor, by shape, with an IoU of {report['recall_iou']} or more")
    print(f"train with them:\n{report['command']}")
