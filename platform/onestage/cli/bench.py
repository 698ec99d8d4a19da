"""``onestage bench``: measure the platform."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from onestage.cli.terminal import writing
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
    _add_output(detectors)
    detectors.set_defaults(run=_bench_detectors)
    data = bench.add_parser("data", help="images/s of decoding alone, of our loader and of webdataset, side by side")
    data.add_argument("--data", help="dataset whose JPEGs to use (default: pictures drawn here, as large as COCO's)")
    data.add_argument("--num-workers", type=int, default=0, help="loader processes (default: 0, one thread for all)")
    data.add_argument("--seconds", type=float, default=60.0, help="to measure for, about (default: 60)")
    _add_output(data)
    data.set_defaults(run=_bench_data)


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, help="Markdown file to write (default: on stdout)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def _bench_detectors(options: argparse.Namespace) -> int:
    from onestage.bench.detectors import bench, markdown

    report = bench(
        options.names,
        data=options.data,
        images_seen=options.images_seen,
        precision=options.precision,
        storage=options.storage,
    )
    _hand_out(report, markdown(report), options)
    return FAILED if any("failed" in one for one in report["detectors"]) else DONE


def _bench_data(options: argparse.Namespace) -> int:
    from onestage.bench.data import bench, markdown

    report = bench(data=options.data, num_workers=options.num_workers, seconds=options.seconds)
    _hand_out(report, markdown(report), options)
    return DONE


def _hand_out(report: dict[str, Any], text: str, options: argparse.Namespace) -> None:
    if options.out is not None:
        with writing(options.out):
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(text, encoding="utf-8")
        print(f"written: {options.out}", file=sys.stderr)
    if options.json:
        print(json.dumps(report))
    elif options.out is None:
        print(text)
