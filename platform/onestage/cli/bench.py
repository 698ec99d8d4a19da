"""``onestage bench``: measure the platform."""

import argparse
import inspect
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from onestage.cli.terminal import count, writing
from onestage.errors import DONE, FAILED


def add(verbs: Any) -> None:
    """The verb's parsers, for the command line. Options are named as the parameters of the bench's function."""
    bench = verbs.add_parser("bench", help="measure the platform").add_subparsers(metavar="VERB", required=True)
    detectors = _parser(bench, "detectors", "size, speed and score from scratch of every detector, as a table")
    detectors.add_argument("names", nargs="*", metavar="NAME", help="configs of conf/detector (default: all)")
    detectors.add_argument("--data", type=Path, required=True, help="dataset folder with train, val and test")
    detectors.add_argument("--images-seen", type=int, default=4000, help="to train on, each detector (default: 4000)")
    detectors.add_argument(
        "--precision", choices=["32-true", "bf16-mixed"], default="32-true", help="32-true (the default) or bf16-mixed"
    )
    detectors.add_argument(
        "--storage", type=Path, default=Path("bench"), help="folder of the trainings; what is done there stays done"
    )
    data = _parser(bench, "data", "images/s of decoding alone, of our loader and of webdataset, side by side")
    data.add_argument("--data", help="dataset whose JPEGs to use (default: pictures drawn here, as large as COCO's)")
    data.add_argument("--num-workers", type=int, default=0, help="loader processes (default: 0, one thread for all)")
    data.add_argument("--seconds", type=float, default=60.0, help="to measure for, about (default: 60)")
    launch = _parser(bench, "launch", "the same training under Ray Train and under torchrun, side by side")
    launch.add_argument("--workers", type=int, default=2, help="processes (default: 2)")
    launch.add_argument("--steps", type=int, default=600, help="of each training (default: 600)")
    launch.add_argument("--rounds", type=int, default=3, help="trainings each way (default: 3)")
    launch.add_argument("--storage", type=Path, default=Path("bench/launch"), help="folder of the trainings")
    chaos = _parser(bench, "chaos", "harm a training on three hosts at random, and say what each harm cost (root)")
    chaos.add_argument("--kills", type=int, default=20, help="harms (default: 20)")
    chaos.add_argument("--seed", type=int, default=0, help="of kinds and times (default: 0)")
    chaos.add_argument("--data", type=Path, help="dataset folder to train on (default: scenes drawn here)")
    chaos.add_argument("--storage", type=Path, default=Path("bench/chaos"), help="folder of the run and its logs")
    sweep = _parser(bench, "sweep", "random search, ASHA and TPE with ASHA: epochs to the same score")
    sweep.add_argument("--data", type=Path, required=True, help="dataset folder")
    sweep.add_argument("--trials", type=int, default=12, help="of each search (default: 12)")
    sweep.add_argument("--epochs", type=int, default=9, help="of a trial, at most (default: 9)")
    sweep.add_argument("--seed", type=int, default=0, help="of all three (default: 0)")
    sweep.add_argument("--storage", type=Path, default=Path("bench/sweep"), help="folder of the sweeps")
    tracking = _parser(bench, "tracking", "what MLflow costs a training of 10 steps/s, and a large file on its way")
    tracking.add_argument("--rounds", type=count, default=4, help="of all ways, more than a minute each (default: 4)")
    tracking.add_argument("--storage", type=Path, default=Path("bench/tracking"), help="folder to write to")
    checkpoints = _parser(bench, "checkpoints", "what a checkpoint a minute costs the full YOLOv3")
    checkpoints.add_argument("--rounds", type=int, default=5, help="checkpoints to measure (default: 5)")
    checkpoints.add_argument("--input-size", type=int, default=256, help="side of the image in pixels (default: 256)")
    checkpoints.add_argument("--storage", type=Path, default=Path("bench/checkpoints"), help="folder to write to")


def _parser(bench: Any, name: str, what: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = bench.add_parser(name, help=what)
    parser.add_argument("--out", type=Path, help="Markdown file to write (default: on stdout)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.set_defaults(run=_run, bench=name)
    return parser


def _run(options: argparse.Namespace) -> int:
    """A bench is a module with ``bench``, whose report may say whether it ``passed``, and ``markdown`` of a report."""
    module = import_module(f"onestage.bench.{options.bench}")
    given = vars(options) | {"say": lambda text: print(text, file=sys.stderr)}
    taken = inspect.signature(module.bench).parameters
    report = module.bench(**{name: value for name, value in given.items() if name in taken})
    _hand_out(report, module.markdown(report), options)
    return DONE if report.get("passed", True) else FAILED


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
