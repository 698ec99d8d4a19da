"""``onestage bench``: measure the platform."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from onestage.errors import DONE, FAILED


def add(verbs: Any) -> None:
    """The verb's parsers, for the command line."""
    bench = verbs.add_parser("bench", help="measure the platform").add_subparsers(metavar="VERB", required=True)
    detectors = bench.add_parser("detectors", help="size, speed and score from scratch of every detector, as a table")
    detectors.add_argument("names", nargs="*", metavar="NAME", help="configs of conf/detector (default: all)")
    detectors.add_argument("--data", type=Path, required=True, help="dataset folder with train, val and test")
    detectors.add_argument("--images-seen", type=int, default=4000, help="to train on, each detector (default: 4000)")
    detectors.add_argument(
        "--precision", choices=["32-true", "bf16-mixed"], default="32-true", help="32-true (the default) or bf16-mixed"
    )
    detectors.add_argument(
        "--storage", type=Path, default=Path("bench"), help="folder of the trainings; what is done there stays done"
    )
    detectors.add_argument("--out", type=Path, help="Markdown file to write (default: on stdout)")
    detectors.add_argument("--json", action="store_true", help="one JSON object on stdout")
    detectors.set_defaults(run=_bench_detectors)


def _bench_detectors(options: argparse.Namespace) -> int:
    from onestage.bench.detectors import bench, markdown

    report = bench(
        options.names,
        data=options.data,
        images_seen=options.images_seen,
        precision=options.precision,
        storage=options.storage,
    )
    text = markdown(report)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text, encoding="utf-8")
        print(f"written: {options.out}", file=sys.stderr)
    if options.json:
        print(json.dumps(report))
    elif options.out is None:
        print(text)
    return FAILED if any("failed" in one for one in report["detectors"]) else DONE
