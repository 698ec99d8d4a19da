"""``onestage compare RUN_A RUN_B``: which of two detectors is better at what, by more than chance."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from onestage.cli.terminal import plain, take
from onestage.errors import DONE

MOST: Final = 20
"""Classes that fit on a screen; of more, those that differ by more than chance and the largest changes."""
STYLES: Final = {"better": "green", "worse": "red", "too few images": "dim"}


def add(verbs: Any) -> None:
    """The verb's parser, for the command line."""
    compare = verbs.add_parser("compare", help="two runs on the same images: which is better at what, beyond chance")
    compare.add_argument("a", metavar="RUN_A", help="MLflow run id, models:/name@alias, or a checkpoint file")
    compare.add_argument("b", metavar="RUN_B", help="the other")
    compare.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="split=test (the default), out=FOLDER, data.root=…, trainer.num_pictures=…",
    )
    compare.add_argument("--out", type=Path, help="folder for the table, a chart, and the images that changed most")
    compare.add_argument("--json", action="store_true", help="one JSON object on stdout")
    compare.set_defaults(run=_compare)


def _compare(options: argparse.Namespace) -> int:
    from onestage.evaluation import compare

    split, overrides = take("split", options.overrides)
    out, overrides = take("out", overrides)
    folder = options.out or (Path(out) if out else None)
    told = compare(options.a, options.b, split=split or "test", overrides=overrides, out=folder)
    if options.json:
        print(json.dumps(told))
        return DONE
    _print(told)
    return DONE


def _print(told: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    print(f"A  {told['run_a']}\nB  {told['run_b']}\n{told['num_images']} images of {told['split']}")
    table = Table(box=None, header_style="bold")
    for name in ("class", "truths", "AP of A", "AP of B", "B - A", "95 %", ""):
        table.add_column(name, justify="left" if name in ("class", "") else "right", no_wrap=True)
    shown = _shown(told["classes"])
    whole = [{"class": "mean (mAP)", **told["map"]}] if told["map"] is not None else []
    for row in (*whole, *shown):
        interval = "" if row["low"] is None else f"{row['low']:+.3f} to {row['high']:+.3f}"
        values = (f"{row['truths']:,}", f"{row['ap_a']:.3f}", f"{row['ap_b']:.3f}", f"{row['difference']:+.3f}")
        table.add_row(plain(row["class"]), *values, interval, row["verdict"], style=STYLES.get(row["verdict"]))
    Console().print(table)
    if len(shown) < len(told["classes"]):
        print(f"and {len(told['classes']) - len(shown)} classes more: --json or --out has them all")
    better, worse = len(told["better_images"]), len(told["worse_images"])
    print(f"F1 of single images: {better} better in B, {worse} worse, {told['num_images'] - better - worse} the same")
    if told["out"] is not None:
        print(f"table and pictures  {told['out']}")
    else:
        print("see them with --out FOLDER")


def _shown(classes: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """In the order that they have."""
    if len(classes) <= MOST:
        return list(classes)
    by_size = sorted(classes, key=lambda row: (row["verdict"] not in ("better", "worse"), -abs(row["difference"])))
    chosen = {row["class"] for row in by_size[:MOST]}
    return [row for row in classes if row["class"] in chosen]
