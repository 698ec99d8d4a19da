"""``onestage leaderboard EXPERIMENT``: trainings beside each other, the best first."""

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onestage.errors import DONE

if TYPE_CHECKING:
    from onestage.tracking.leaderboard import Entry


def add(verbs: Any) -> None:
    """The verb's parser, for the command line."""
    board = verbs.add_parser("leaderboard", help="an experiment's trainings, the best first")
    board.add_argument(
        "experiment", nargs="?", metavar="EXPERIMENT", help="of MLflow (default: tracking.experiment, onestage)"
    )
    board.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="tracking.uri=…")
    board.add_argument("--sweep", help="only the trials of this sweep")
    board.add_argument("--csv", metavar="FILE", help="as comma-separated values; - for stdout")
    board.add_argument("--json", action="store_true", help="one JSON object on stdout")
    board.set_defaults(run=_leaderboard)


def _leaderboard(options: argparse.Namespace) -> int:
    from onestage.config import compose
    from onestage.errors import InputError
    from onestage.tracking.leaderboard import entries
    from onestage.tracking.tracker import store_uri

    if "=" in (options.experiment or ""):  # none was named
        options.overrides.insert(0, options.experiment)
        options.experiment = None
    config = compose("train", options.overrides)
    experiment, uri = options.experiment or config["tracking"]["experiment"], store_uri(config)
    if uri is None:
        raise InputError("tracking=none keeps no runs to compare")
    found = entries(uri, experiment, sweep=options.sweep)
    if len({one.dataset_hash for one in found if one.score is not None}) > 1:
        print("onestage: not all of them were scored on the same data: compare within a dataset", file=sys.stderr)
    if options.json:
        print(json.dumps({"experiment": experiment, "runs": [asdict(one) for one in found]}))
    elif options.csv is not None:
        _write(found, options.csv)
    else:
        show(found)
    return DONE


def _write(found: Sequence["Entry"], file: str) -> None:
    rows = [{key: value for key, value in asdict(one).items() if key != "point"} | dict(one.point) for one in found]
    names = list(dict.fromkeys(key for row in rows for key in row)) or ["run_id"]
    with open(sys.stdout.fileno() if file == "-" else Path(file), "w", newline="", closefd=file != "-") as target:
        writer = csv.DictWriter(target, names, restval="")
        writer.writeheader()
        writer.writerows(rows)


def show(found: Sequence["Entry"]) -> None:
    """As a table, in the order that they have."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from onestage.tracking.leaderboard import in_short

    console, datasets = Console(), {one.dataset_hash for one in found}
    table = Table(box=None, header_style="bold")
    for name in (
        "",
        "run",
        found[0].metric if found else "score",
        "95 %",
        "epochs",
        "GPU-h",
        "ms",
        "state",
        *(["data"] if len(datasets) > 1 else []),
    ):
        table.add_column(name, no_wrap=True)
    table.add_column("what")
    for place, one in enumerate(found, 1):
        varied = in_short({key: value for key, value in one.point.items() if key != "detector"})
        table.add_row(
            str(place),
            one.run_id[:8],
            _number(one.score, ".4f"),
            "" if one.low is None or one.high is None else f"{one.low:.3f}–{one.high:.3f}",
            "" if one.epochs is None else str(one.epochs),
            _number(one.gpu_hours, ".3f"),
            _number(one.latency_ms, ".1f"),
            one.state or one.status.lower(),
            *([(one.dataset_hash or "")[:8]] if len(datasets) > 1 else []),
            Text(f"{one.detector} {varied}".strip(), overflow="fold"),
        )
    console.print(table)
    if len(datasets) == 1 and (only := next(iter(datasets))) is not None:
        console.print(f"dataset {only[:12]}", highlight=False)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
