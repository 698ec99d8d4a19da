"""What a sweep would do and cost: `onestage sweep --dry-run`."""

import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from onestage.cluster import launch
from onestage.cluster.launch import chosen
from onestage.cluster.preflight import num_gpus
from onestage.cluster.resources import Node, counted_gpus
from onestage.data.manifest import Manifest
from onestage.data.threads import num_cores
from onestage.errors import DONE, InputError
from onestage.sweeps.plan import Plan, plan, side_by_side

PROBE_STEPS: Final = 8
MAX_SHOWN: Final = 20


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """``trials``, ``epochs`` and ``gpu_hours`` are None where nothing bounds them, the last where nothing was measured.

    ``epochs``, ``gpu_hours`` and ``hours`` (on this cluster) are (at most, expected); ``images_per_s`` by detector.
    ``concurrent`` trials of ``workers`` fit side by side.
    """

    search: str
    scheduler: str
    space: dict[str, Any]
    trials: int | None
    points: list[list[str]] | None
    epochs: tuple[float, float] | None
    images_per_s: dict[str, float]
    gpu_hours: tuple[float, float] | None
    hours: tuple[float, float] | None
    workers: str
    concurrent: int


def forecast(overrides: Sequence[str], *, probe: bool) -> Forecast:
    """Plans, and under ``probe`` measures each detector for some steps. Raises InputError as the sweep itself would."""
    made = plan(overrides)
    config, epochs = made.config, made.epochs()
    cluster = config["cluster"]
    speeds = _measured(made) if probe else {}
    gpu_hours = hours = None
    concurrent = _concurrent(made)
    if epochs is not None and speeds:
        images = Manifest.load(config["data"]["root"]).splits["train"].num_samples
        epoch = statistics.fmean(images / speed for speed in speeds.values()) / 3600  # hours
        gpu_hours = (epochs[0] * epoch * counted_gpus(cluster), epochs[1] * epoch * counted_gpus(cluster))
        at_once = min(concurrent, made.trials or concurrent)
        hours = (epochs[0] * epoch / at_once, epochs[1] * epoch / at_once)
    return Forecast(
        search=made.search,
        scheduler=made.settings["scheduler"],
        space=made.space.describe(),
        trials=made.trials,
        points=made.points(),
        epochs=epochs,
        images_per_s=speeds,
        gpu_hours=gpu_hours,
        hours=hours,
        workers=f"{cluster['num_workers']} worker{'s' * (cluster['num_workers'] > 1)} of {_share(cluster)}",
        concurrent=concurrent,
    )


def _share(cluster: dict[str, Any]) -> str:
    gpus = cluster["gpus_per_worker"]
    return f"{cluster['cpus_per_worker']} CPU" + (f" and {gpus:g} GPU" if gpus else "")


def _concurrent(made: Plan) -> int:
    """How many trials fit at once: on this machine, or on the cluster, which is asked."""
    fit = side_by_side(made.config["cluster"], _nodes(made.config["cluster"]))
    return min(fit, made.settings["max_concurrent"] or fit)


def _nodes(cluster: dict[str, Any]) -> list[Node]:
    if cluster["kind"] != "ray":
        total = {"CPU": float(max(num_cores(), cluster["num_workers"])), "GPU": float(num_gpus())}
        return [Node("this machine", total, total)]
    from onestage.cluster import connection
    from onestage.cluster.ray_train import share_gpus

    with connection.attached(cluster, wait_s=0, say=lambda text: None):
        share_gpus(cluster)
        return connection.nodes()


def _measured(made: Plan) -> dict[str, float]:
    """Images a second of each detector of the space, in a training of a few steps that nobody keeps."""
    speeds: dict[str, float] = {}
    for config in made.probes:
        name = chosen(config)
        if name in speeds:
            continue
        print(f"onestage: measuring {name} for {PROBE_STEPS} steps", file=sys.stderr)
        speeds[name] = _speed(config)
    return speeds


def _speed(config: dict[str, Any]) -> float:
    """Of a training as it would be, but for its tracking, its storage and its end."""
    from onestage.cluster.job import Job
    from onestage.cluster.stop import Stop

    with tempfile.TemporaryDirectory(prefix="onestage-probe-") as folder:
        config = config | {
            "storage": folder,
            "resume": None,
            "trainer": config["trainer"] | {"max_epochs": 1, "max_steps": PROBE_STEPS, "num_pictures": 0},
        }
        speeds: list[float] = []

        def hear(message: dict[str, Any]) -> None:
            if "step" in message and message.get("perf/images_per_s"):
                speeds.append(message["perf/images_per_s"])

        job = Job(config=config, run_id="probe", folder=str(Path(folder) / "probe"), tracking_uri=None)
        outcome = launch.train(job, by=launch.by_cluster, stop=Stop(), shown=lambda: nullcontext(hear))
        if outcome.exit_code != DONE:
            raise InputError(f"the probe of {chosen(config)} failed: {outcome.reason}")
    if not speeds:
        raise InputError("the probe heard of no step: give the split more images, or leave probe=true out")
    return statistics.median(speeds[1:] or speeds)  # the first step builds and warms up


def show(told: Forecast) -> None:
    """For people."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("parameter", "values", title=f"{told.search} search, scheduler {told.scheduler}")
    if any(one["when"] for one in told.space.values()):
        table.add_column("only with")
    for key, one in told.space.items():
        when = ", ".join(f"{k}={' or '.join(v)}" for k, v in one["when"].items())
        table.add_row(*[key, _values(one["values"]), when][: len(table.columns)])
    console.print(table)
    if told.points is not None:
        varied = [[word for word in point if word.partition("=")[0] in told.space] for point in told.points]
        for number, point in enumerate(varied[:MAX_SHOWN]):
            console.print(f"#{number}  {' '.join(point)}", highlight=False, soft_wrap=True)
        if (told.trials or 0) > MAX_SHOWN:
            console.print(f"… and {(told.trials or 0) - MAX_SHOWN} more", highlight=False)
    trials = f"{told.trials} trials" if told.trials else "trials until the budget is spent"
    console.print(f"{trials} of {told.workers}, {told.concurrent} side by side", highlight=False)
    if told.epochs is not None:
        console.print(f"epochs: at most {told.epochs[0]:g}, expected {told.epochs[1]:.3g}", highlight=False)
    for name, speed in told.images_per_s.items():
        console.print(f"{name}: {speed:.3g} images/s", highlight=False)
    if told.gpu_hours is not None and told.hours is not None:
        for what, (most, expected) in (("GPU-hours", told.gpu_hours), ("hours", told.hours)):
            console.print(f"{what} of training: at most {most:.3g}, expected {expected:.3g}", highlight=False)
    elif told.epochs is not None:
        console.print("GPU-hours: say probe=true to have the steps measured", highlight=False)


def _values(values: Sequence[Any]) -> str:
    if values and values[0] == "interval":
        _, low, high, log, whole = values
        return f"{low:g} to {high:g}{', logarithmic' if log else ''}{', whole numbers' if whole else ''}"
    return ", ".join(map(str, values))
