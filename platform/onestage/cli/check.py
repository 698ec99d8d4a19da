"""``onestage data check`` and ``inspect``: what is wrong with a dataset, and what is in it."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onestage.cli.terminal import FORMATS, count, names, plain, size, steps, writing
from onestage.errors import DONE, FAILED

if TYPE_CHECKING:
    from onestage.data.check import Group
    from onestage.data.statistics import Statistics


def add(verbs: Any) -> None:
    """The parsers of check and inspect, among the verbs of ``onestage data``."""
    check = verbs.add_parser("check", help="what is wrong with a dataset, and what is done about it")
    _add_common(check)
    check.add_argument("--examples", type=count, default=3, metavar="N", help="of each finding (default: 3)")
    check.add_argument("--strict", action="store_true", help="exit with 1 if anything is found")
    check.set_defaults(run=_check)

    inspect = verbs.add_parser("inspect", help="a page with pictures, boxes and charts, and the numbers as a table")
    _add_common(inspect)
    inspect.add_argument("--out", type=Path, default=Path("inspect.html"), help="page (default: inspect.html)")
    inspect.add_argument(
        "--images",
        dest="num_images",
        type=count,
        default=24,
        metavar="N",
        help="pictures of each split (default: 24)",
    )
    inspect.set_defaults(run=_inspect)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("place", metavar="DIR|SOURCE", help="dataset folder, or labelled images as import takes them")
    parser.add_argument("--format", choices=FORMATS, help="how SOURCE is labelled (default: found out)")
    parser.add_argument(
        "--classes", type=names, metavar="A,B,…", help="as for import: of SOURCE, which and in what order"
    )
    parser.add_argument(
        "--input-size", type=size, default=[416, 416], metavar="SIDE|HxW", help="of the network (default: 416)"
    )
    parser.add_argument(
        "--strides", type=_strides, default=[8, 16, 32], metavar="N,N,…", help="of the network (default: 8,16,32)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def _strides(text: str) -> list[int]:
    return sorted(count(one.strip()) for one in text.split(","))


def _check(options: argparse.Namespace) -> int:
    from onestage.data.check import check
    from onestage.data.contents import open_set
    from onestage.data.statistics import as_dict, measure

    with steps() as step:
        contents = open_set(
            options.place, format=options.format, classes=options.classes, verify=True, progress=step("reading")
        )
        statistics = measure(contents)
        judged = {"input_size": options.input_size, "strides": options.strides}
        groups = check(contents, statistics, **judged, progress=step("decoding"))
    if options.json:
        findings = [
            {
                "kind": group.kind,
                "count": len(group.findings),
                "remedy": group.remedy,
                "examples": [{"where": one.where, "what": one.what} for one in group.findings[: options.examples]],
            }
            for group in groups
        ]
        print(json.dumps({"place": options.place, "name": contents.name, **as_dict(statistics), "findings": findings}))
    else:
        _show_findings(groups, statistics, num_examples=options.examples)
    return FAILED if options.strict and groups else DONE


def _inspect(options: argparse.Namespace) -> int:
    from onestage.data import overview
    from onestage.data.contents import open_set
    from onestage.data.statistics import as_dict

    overview.check_name(options.out)
    with writing(options.out), steps() as step:
        contents = open_set(options.place, format=options.format, classes=options.classes, progress=step("reading"))
        statistics = overview.write(
            contents,
            options.out,
            num_images=options.num_images,
            input_size=options.input_size,
            strides=options.strides,
            progress=step("drawing"),
        )
    if options.json:
        told = {"place": options.place, "out": str(options.out), "name": contents.name, **as_dict(statistics)}
        print(json.dumps({**told, "num_findings": len(contents.findings)}))
        return DONE
    _show_numbers(statistics)
    if contents.findings:
        print(f"{len(contents.findings):,} findings: see onestage data check {options.place}")
    print(f"written: {options.out}")
    return DONE


def _show_findings(groups: Sequence["Group"], statistics: "Statistics", *, num_examples: int) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    total = statistics.total()
    numbers = f"images: {total.images:,}, boxes: {total.boxes:,}, classes: {len(statistics.classes):,}"
    if not groups:
        print(f"{numbers}; nothing wrong was found")
        return
    table = Table("finding", "count", "what is done, what to do", show_lines=True)
    table.columns[1].justify = "right"
    for group in groups:
        # Text and not markup, and plain: names come from the data.
        lines = [Text(group.remedy)]
        lines += [Text(plain(f"{one.where}: {one.what}"), style="dim") for one in group.findings[:num_examples]]
        if len(group.findings) > num_examples:
            lines.append(Text(f"and {len(group.findings) - num_examples:,} more", style="dim"))
        table.add_row(group.kind, f"{len(group.findings):,}", Text("\n").join(lines))
    print(numbers)
    Console().print(table)


def _show_numbers(statistics: "Statistics") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("")
    counts = [*statistics.splits.values(), statistics.total()]
    for name in [*statistics.splits, "all"]:
        table.add_column(Text(plain(name)), justify="right")
    table.add_row("images", *(f"{count.images:,}" for count in counts))
    table.add_row("without boxes", *(f"{count.without_boxes:,}" for count in counts))
    table.add_row("boxes", *(f"{count.boxes:,}" for count in counts), end_section=True)
    for label, name in enumerate(statistics.classes):
        table.add_row(Text(plain(name)), *(f"{count.by_class[label]:,}" for count in counts))
    Console().print(table)
