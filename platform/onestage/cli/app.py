"""The command line. Everything heavy is imported by the verb that needs it."""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from onestage import __version__
from onestage.cli import anchors, bench, cluster, compare, data, doctor, jobs, leaderboard, models, server, sweep, sync
from onestage.cli.terminal import take
from onestage.errors import DONE, FAILED, INTERRUPTED, WRONG_INPUT, InputError

TRAIN_HELP = """\
usage: onestage train [KEY=VALUE …] [--json] [--cfg job]

Train a detector, on this machine unless cluster says otherwise. Settings are Hydra overrides:

  onestage train data.root=shards/bccd                           the defaults: yolov3_tiny, Ray on this machine
  onestage train detector=yolov3 data.root=… cluster.num_workers=2
  onestage train resume=RUN_ID            go on where a run was cut (or resume=last), in the same MLflow run
  onestage train --cfg job                print every setting

Groups: {groups}
Often set: data.root data.batch_size data.num_workers detector.width detector.input_size detector.weights seed
  optimizer.lr trainer.max_epochs trainer.max_steps trainer.precision trainer.deterministic cluster.num_workers
  checkpoint.every_steps checkpoint.every_minutes tracking.uri tracking.experiment resume
--json (or output=json) prints one JSON object last on stdout: run_id, status, metrics, checkpoint.
Exit codes: 0 done, 1 failed, 2 wrong usage or input, 75 preempted, 130 interrupted.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb and returns its exit code; the errors that a person can mend are one line on stderr."""
    from onestage.cluster.job import JOB_VARIABLE

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    verb, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if JOB_VARIABLE in os.environ:
        from onestage.cluster.jobs import heed_stop

        heed_stop()
    try:
        if verb == "train":
            return train(rest)
        if verb == "sweep":
            return sweep.sweep(rest)
        return _other(arguments)
    except InputError as error:
        print(f"onestage: {error}", file=sys.stderr)
        return WRONG_INPUT
    except KeyboardInterrupt:
        print("onestage: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        return DONE
    except Exception as error:
        if not _is_mlflows(error):
            raise
        from onestage.tracking.redaction import redact

        told = str(error).strip().partition("\n")[0]
        print(f"onestage: the tracking store fails ({redact(told)}): try again when it answers", file=sys.stderr)
        return FAILED


def _is_mlflows(error: Exception) -> bool:
    """Of a store that went away or refuses, in whatever command; MLflow need not be imported to know."""
    mlflow = sys.modules.get("mlflow.exceptions")
    return mlflow is not None and isinstance(error, mlflow.MlflowException)


def train(arguments: Sequence[str]) -> int:
    """``onestage train``: Hydra's command line over ``conf/train.yaml``."""
    if any(one in ("-h", "--help") for one in arguments):
        from onestage.config.folder import CONF

        groups = sorted(path.name for path in CONF.iterdir() if path.is_dir())
        choices = {group: sorted(file.stem for file in (CONF / group).glob("*.yaml")) for group in groups}
        listed = "".join(f"\n  {group}={'|'.join(names)}" for group, names in choices.items() if names)
        print(TRAIN_HELP.format(groups=listed))
        return DONE
    if any(one in ("-m", "--multirun") for one in arguments):
        return sweep.sweep(arguments)
    from onestage.config.app import run

    overrides = ["output=json" if one == "--json" else one for one in arguments]
    if "--cfg" in overrides:  # Hydra takes it before or behind all overrides only
        at = overrides.index("--cfg")
        overrides = [*overrides[at : at + 2], *overrides[:at], *overrides[at + 2 :]]
    return run("train", overrides, _train)


def _train(config: dict[str, Any]) -> int:
    from onestage.cluster.job import JOB_VARIABLE, is_sent

    if is_sent(config["cluster"]):
        from onestage.cluster.queue import submit_and_follow

        return submit_and_follow("train", config["overrides"], config)
    from onestage.cluster.launch import launch
    from onestage.tracking.redaction import without_user

    outcome = launch(config)
    if outcome.reason is not None:
        print(f"onestage: {outcome.status.lower()}: {outcome.reason}", file=sys.stderr)
        if outcome.resumable:
            changed = " optimizer.lr=<lower> (as it was, it would diverge again)" if outcome.diverged else ""
            train = "submit train" if JOB_VARIABLE in os.environ else "train"
            print(f"onestage: go on with: onestage {train} resume={outcome.run_id}{changed}", file=sys.stderr)
    if config["output"] == "json":
        print(
            json.dumps(
                {
                    "run_id": outcome.run_id,
                    "status": outcome.status,
                    "metrics": outcome.metrics,
                    "checkpoint": outcome.checkpoint,
                    "folder": str(outcome.folder),
                    "tracking_uri": outcome.tracking_uri and without_user(outcome.tracking_uri),
                }
            )
        )
    elif outcome.exit_code == DONE:
        _table(f"run {outcome.run_id}", {k: v for k, v in outcome.metrics.items() if k.startswith("val/")})
        print(f"checkpoint  {outcome.checkpoint}\nevaluate    onestage evaluate {outcome.run_id} split=test")
    return outcome.exit_code


def _other(arguments: Sequence[str]) -> int:
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    positional = getattr(options, "overrides", getattr(options, "images", None))
    if positional is None or any(one.startswith("-") for one in rest):
        parser.parse_args(arguments)  # says what it does not know
    else:
        positional += rest  # overrides and pictures may stand behind the options as well
    run: Callable[[argparse.Namespace], int] = options.run
    return run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="onestage", description="Train, evaluate and compare one-stage object detectors.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"onestage {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    verbs.add_parser("train", help="train a detector: `onestage train --help`", add_help=False)

    verbs.add_parser("sweep", help="many trainings, and the best of them: `onestage sweep --help`", add_help=False)

    quickstart = verbs.add_parser("quickstart", help="the whole road in five minutes, on data drawn here")
    quickstart.add_argument("--out", type=Path, default=Path("quickstart"), help="folder for data and pictures")
    quickstart.set_defaults(run=_quickstart)

    data.add(verbs)
    anchors.add(verbs)
    jobs.add(verbs)
    cluster.add(verbs)
    doctor.add(verbs)
    leaderboard.add(verbs)
    sync.add(verbs)
    models.add(verbs)
    server.add(verbs)

    evaluate = verbs.add_parser("evaluate", help="COCO's and VOC's metrics of a run on a split, and where it errs")
    evaluate.add_argument("target", metavar="RUN", help="MLflow run id, models:/name@alias, or a checkpoint file")
    evaluate.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="split=test (the default), out=FOLDER, data.root=…, data.batch_size=…, trainer.num_pictures=0",
    )
    evaluate.add_argument(
        "--out", type=Path, help="folder for tables and pictures (default: evaluation/SPLIT in the run's folder)"
    )
    evaluate.add_argument("--json", action="store_true", help="one JSON object on stdout")
    evaluate.set_defaults(run=_evaluate)
    compare.add(verbs)

    predict = verbs.add_parser("predict", help="annotated pictures and COCO results")
    predict.add_argument("target", metavar="RUN", help="MLflow run id, models:/name@alias, or a checkpoint file")
    predict.add_argument("images", nargs="+", metavar="IMAGE", help="pictures, folders of them, or KEY=VALUE overrides")
    predict.add_argument("--out", type=Path, required=True, help="folder to write to")
    predict.add_argument(
        "--threshold", type=float, help="lowest score that is drawn (default: the model's, 0.25); the JSON holds all"
    )
    predict.add_argument("--json", action="store_true", help="one JSON object on stdout")
    predict.set_defaults(run=_predict)

    export = verbs.add_parser("export", help="a run's weights for other programs")
    export.add_argument("target", metavar="RUN", help="MLflow run id, models:/name@alias, or a checkpoint file")
    export.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="storage=…, tracking.uri=…, tracking=none")
    export.add_argument("--format", choices=["darknet"], required=True, help="darknet: a .weights file")
    export.add_argument("--out", type=Path, help="file to write (default: RUN.weights)")
    export.add_argument("--json", action="store_true", help="one JSON object on stdout")
    export.set_defaults(run=_export)

    replay = verbs.add_parser("replay", help="which image made a training diverge")
    replay.add_argument("file", type=Path, metavar="FILE", help="what the training saved, RUN/bad_batch/….safetensors")
    replay.add_argument("--json", action="store_true", help="one JSON object on stdout")
    replay.set_defaults(run=_replay)

    bench.add(verbs)
    return parser


def _quickstart(options: argparse.Namespace) -> int:
    from onestage.quickstart import quickstart

    return quickstart(options.out)


def _evaluate(options: argparse.Namespace) -> int:
    from onestage.evaluation import evaluate, shown

    split, overrides = take("split", options.overrides)
    out, overrides = take("out", overrides)
    split, folder = split or "test", options.out or (Path(out) if out else None)
    result = evaluate(options.target, split=split, overrides=overrides, out=folder)
    if options.json:
        print(json.dumps(result))
        return DONE
    _table(f"{result['num_images']} images of {split}", shown(result["metrics"]))
    print(f"tables and pictures  {result['out']}")
    if result["artifacts"] is not None:
        print(f"and in the run       {result['artifacts']}, among its artifacts")
    return DONE


def _predict(options: argparse.Namespace) -> int:
    from onestage.evaluation import predict

    images = [one for one in options.images if "=" not in one or Path(one).exists()]
    overrides = [one for one in options.images if one not in images]
    result = predict(options.target, images, out=options.out, threshold=options.threshold, overrides=overrides)
    if options.json:
        print(json.dumps(result))
    else:
        print(
            f"{result['num_images']} pictures with {result['num_drawn']} boxes, and predictions.json with all "
            f"{result['num_detections']}, in {options.out}"
        )
    return DONE


def _export(options: argparse.Namespace) -> int:
    from onestage.export import darknet

    result = darknet.export(options.target, out=options.out, overrides=options.overrides)
    if options.json:
        print(json.dumps(result))
        return DONE
    classes = result["classes"]
    print(f"{result['out']}: {result['floats']:,} floats, {result['bytes']:,} bytes")
    print(f"classes={len(classes)} ({', '.join(classes)})")
    height, width = result["input_size"]
    if result["cfg"] is None:
        print(f"no cfg of Darknet has this network (detector.width={result['width']}): change the layers of one")
    else:
        print(f"use it with {result['cfg']}, with width={width}, height={height}, these classes, and what follows from")
        print("them: the filters before each [yolo] or [region]; in a yolov1 the side of [detection] and its output")
    return DONE


def _replay(options: argparse.Namespace) -> int:
    from onestage.replay import replay

    result = replay(options.file)
    if options.json:
        print(json.dumps(_json_ready(result), allow_nan=False))
        return DONE
    from rich.console import Console
    from rich.table import Table

    whole = result["batch"]
    table = Table("image", "boxes", *whole["parts"], "gradient")
    for name, boxes, one in [
        *((image["key"], image["boxes"], image) for image in result["images"]),
        ("all together", sum(image["boxes"] for image in result["images"]), whole),
    ]:
        numbers = (f"{value:.6g}" for value in (*one["parts"].values(), one["grad_norm"]))
        table.add_row(name, str(boxes), *numbers, style=None if one["finite"] else "red")
    print(f"step {result['step']} on rank {result['rank']}: {result['detector']}, {result['precision']}")
    Console().print(table)
    print(_verdict(result))
    return DONE


def _json_ready(value: Any) -> Any:
    """``value`` with "nan", "inf" and "-inf" for the numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _json_ready(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_json_ready(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _verdict(result: dict[str, Any]) -> str:
    """What a replayed batch says about who made the training diverge."""
    bad = [image["key"] for image in result["images"] if not image["finite"]]
    if result["weights"]:
        return f"the weights were not finite before this step ({result['weights'][0]}): lower optimizer.lr"
    if bad and len(bad) < len(result["images"]):
        return f"not finite alone: {', '.join(bad)}"
    if len(bad) == 1:
        return f"not finite: {bad[0]}, the only image there: see its boxes, or lower optimizer.lr"
    if bad:
        return "every image alone is not finite: the weights have left their range; lower optimizer.lr"
    if not result["batch"]["finite"]:
        return "each image alone is finite, all together are not: the batch norm of just this batch"
    return "finite on this machine: the hardware or the precision of the training made it so"


def _table(title: str, metrics: dict[str, float]) -> None:
    from rich.console import Console
    from rich.table import Table

    print(title)
    table = Table("metric", "value")
    for name, value in metrics.items():
        table.add_row(name, f"{value:.4f}")
    Console().print(table)
