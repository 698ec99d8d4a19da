"""``onestage doctor``: what would go wrong on a cluster, and what to do about it."""

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from onestage.cli.terminal import plain
from onestage.errors import DONE, FAILED

if TYPE_CHECKING:
    from onestage.cluster.doctor import Report
    from onestage.cluster.doctor_verdicts import Row

STYLES: Final = {"ok": "green", "skipped": "dim", "warning": "yellow", "problem": "bold red"}
MANY: Final = 4
"""More places than these with the same verdict are counted rather than named."""


def add(verbs: Any) -> None:
    """The verb's parser, for the command line."""
    doctor = verbs.add_parser("doctor", help="what would go wrong on this machine or cluster, before a training does")
    doctor.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="what a training would be given: cluster=ray cluster.address=…, data.root=…, storage=…, tracking.uri=…",
    )
    doctor.add_argument("--json", action="store_true", help="one JSON object on stdout")
    doctor.set_defaults(run=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    from rich.console import Console

    from onestage.cluster.doctor import doctor
    from onestage.config import compose

    config = compose("train", options.overrides)
    console = Console(stderr=True)
    with console.status("") as status:

        def say(text: str) -> None:
            status.update(text)
            if not console.is_terminal:
                console.print(text, markup=False, highlight=False, soft_wrap=True)

        report = doctor(config, say=say)
    if options.json:
        rows = [asdict(row) for row in report.rows]
        print(json.dumps({"level": report.level, "seconds": report.seconds, "rows": rows}))
    else:
        _print(report)
    return FAILED if report.level == "problem" else DONE


def _print(report: "Report") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("check", "where", "", "figure and remedy", show_lines=False)
    for places, row in _grouped(report.rows):
        where = f"{len(places)} places" if len(places) > MANY else ", ".join(places)
        lines = Text(plain(row.figure))
        if row.remedy:
            lines.append(f"\n{plain(row.remedy)}", style="italic")
        table.add_row(row.check, plain(where), Text(row.level, style=STYLES[row.level]), lines)
    Console().print(table)
    counts = {level: sum(row.level == level for row in report.rows) for level in ("problem", "warning")}
    found = ", ".join(f"{count} {level}{'s' * (count > 1)}" for level, count in counts.items() if count)
    print(f"{found or 'all well'}; {report.seconds:.0f} s")


def _grouped(rows: "list[Row]") -> "list[tuple[list[str], Row]]":
    """Rows that say the same of several places, as one."""
    groups: dict[tuple[str, str, str, str], tuple[list[str], Row]] = {}
    for row in rows:
        places, _ = groups.setdefault((row.check, row.level, row.figure, row.remedy), ([], row))
        places.append(row.where)
    return list(groups.values())
