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
    launch = bench.add_parser("launch", help="the same training under Ray Train and under torchrun, side by side")
    launch.add_argument("--workers", type=int, default=2, help="processes (default: 2)")
    launch.add_argument("--steps", type=int, default=600, help="of each training (default: 600)")
    launch.add_argument("--rounds", type=int, default=3, help="trainings each way (default: 3)")
    launch.add_argument("--storage", type=Path, default=Path("bench/launch"), help="folder of the trainings")
    _add_output(launch)
    launch.set_defaults(run=_bench_launch)
    chaos = bench.add_parser(
        "chaos", help="harm a training on three hosts at random, and say what each harm cost (root)"
    )
    chaos.add_argument("--kills", type=int, default=20, help="harms (default: 20)")
    chaos.add_argument("--seed", type=int, default=0, help="of kinds and times (default: 0)")
    chaos.add_argument("--data", type=Path, help="dataset folder to train on (default: scenes drawn here)")
    chaos.add_argument("--storage", type=Path, default=Path("bench/chaos"), help="folder of the run and its logs")
    _add_output(chaos)
    chaos.set_defaults(run=_bench_chaos)
    checkpoints = bench.add_parser("checkpoints", help="what a checkpoint a minute costs the full YOLOv3")
    checkpoints.add_argument("--rounds", type=int, default=5, help="checkpoints to measure (default: 5)")
    checkpoints.add_argument("--input-size", type=int, default=256, help="side of the image in pixels (default: 256)")
    checkpoints.add_argument("--storage", type=Path, default=Path("bench/checkpoints"), help="folder to write to")
    _add_output(checkpoints)
    checkpoints.set_defaults(run=_bench_checkpoints)


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


def _bench_launch(options: argparse.Namespace) -> int:
    from onestage.bench.launch import bench, markdown

    report = bench(
        workers=options.workers,
        steps=options.steps,
        rounds=options.rounds,
        folder=options.storage,
        say=lambda text: print(text, file=sys.stderr),
    )
    _hand_out(report, markdown(report), options)
    return DONE


def _bench_chaos(options: argparse.Namespace) -> int:
    from onestage.bench.chaos import bench, is_whole, markdown

    report = bench(
        kills=options.kills,
        seed=options.seed,
        data=options.data,
        folder=options.storage,
        say=lambda text: print(text, file=sys.stderr),
    )
    _hand_out(report, markdown(report), options)
    return DONE if is_whole(report) else FAILED


def _bench_checkpoints(options: argparse.Namespace) -> int:
    from onestage.bench.checkpoints import bench, markdown

    report = bench(
        folder=options.storage,
        rounds=options.rounds,
        input_size=options.input_size,
        say=lambda text: print(text, file=sys.stderr),
    )
    _hand_out(report, markdown(report), options)
    return DONE if report["fits"] and not report["notes"] else FAILED


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
