"""Size, speed and score of every detector, each trained from scratch on the same number of images."""

import json
import math
import platform
import shlex
import time
import tomllib
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from onestage import __version__
from onestage.config import CONF, build, compose, merged, options
from onestage.data.manifest import Manifest
from onestage.errors import INTERRUPTED, PREEMPTED, InputError
from onestage.training.module import to_float

WARM_STEPS: Final = 2
TIMED_STEPS: Final = 6
COLUMNS: Final = (
    "detector",
    *("input", "parameters", "GFLOPs"),
    *("width trained", "input", "parameters", "GFLOPs"),
    *("images/s", "mAP@0.5"),
)


def bench(names: Sequence[str], *, data: Path, images_seen: int, precision: str, storage: Path) -> dict[str, Any]:
    """Measures the named detectors, or all, one after the other; what ``storage`` has measured so is not done again.

    A detector that fails has "failed" with the reason, and the others still run. Raises InputError for an unknown name
    or a folder that is no dataset, KeyboardInterrupt where a training was interrupted.
    """
    from rich.console import Console

    known = options("detector")
    for name in names:
        if name not in known:
            raise InputError(f"no detector {name!r}; there are: {', '.join(known)}")
    if images_seen < 1:
        raise InputError(f"--images-seen must be at least 1, got {images_seen}")
    manifest = Manifest.load(data)
    manifest.split("test")
    small: dict[str, list[str]] = tomllib.loads((CONF / "bench" / "detectors.toml").read_text())
    asked = ["--data", str(data), "--images-seen", str(images_seen), "--precision", precision, *names]
    common = _training(manifest, data=data, images_seen=images_seen, precision=precision)
    report = {
        "command": shlex.join(["onestage", "bench", "detectors", *asked]),
        "date": date.today().isoformat(),
        "machine": machine(),
        "dataset": manifest.name,
        "images_seen": images_seen,
        "settings": _settings(compose("train", common)),
    }
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    rows: list[dict[str, Any]] = []
    chosen = list(names or known)
    for number, name in enumerate(chosen, start=1):
        console.print(f"{number} of {len(chosen)}: {name}")
        overrides = merged([f"detector={name}"], common, small.get(name, []))
        key = {
            "version": __version__,
            "overrides": overrides,
            "dataset": manifest.content_hash,
            "machine": report["machine"],
        }
        try:
            rows.append(_once(name, key, folder=storage / name))
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            console.print(f"{name} failed: {reason}")
            rows.append({"name": name, "failed": reason})
    return report | {"detectors": rows, "passed": not any("failed" in row for row in rows)}


def _training(manifest: Manifest, *, data: Path, images_seen: int, precision: str) -> list[str]:
    """The overrides of a training that sees so many images and validates once, at its end."""
    batch_size = compose("train", [])["data"]["batch_size"]
    epochs = math.ceil(images_seen / manifest.split("train").num_samples)
    return [
        f"data.root={data}",
        f"data.batch_size={batch_size}",
        f"trainer.max_steps={math.ceil(images_seen / batch_size)}",
        f"trainer.max_epochs={epochs}",
        f"trainer.val_every_epochs={epochs}",
        f"trainer.precision={precision}",
        "cluster=none",
        "tracking=none",
    ]


def _once(name: str, key: Mapping[str, Any], *, folder: Path) -> dict[str, Any]:
    """What an earlier bench measured under the same ``key``, or a new measurement, kept for the next."""
    kept = folder / "result.json"
    if kept.is_file():
        before: dict[str, Any] = json.loads(kept.read_text())
        if before["key"] == key:
            return before["result"]  # type: ignore[no-any-return]
    result = {"name": name, **_measure(name, key["overrides"], folder=folder)}
    kept.write_text(json.dumps({"key": key, "result": result}, indent=1))
    return result


def _measure(name: str, overrides: Sequence[str], *, folder: Path) -> dict[str, Any]:
    config = compose("train", [*overrides, f"storage={folder}"])
    num_classes = config["detector"]["num_classes"]
    paper = compose("train", [f"detector={name}", f"detector.num_classes={num_classes}"])["detector"]
    return {
        "paper": size(paper),
        "trained": size(config["detector"]) | {"width": config["detector"]["width"]},
        "images_per_s": images_per_s(config),
        "map_50": _test_map_50(config),
    }


def size(node: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of a detector's config, and 10^9 operations (twice the multiply-adds) of one image's forward."""
    detector = build(node).eval()
    height, width = detector.input_size
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        detector.to("meta")(torch.zeros(1, 3, height, width, device="meta"))
    return {
        "input_size": [height, width],
        "parameters": sum(parameter.numel() for parameter in detector.parameters()),
        "gflops": counter.get_total_flops() / 1e9,
    }


def images_per_s(config: Mapping[str, Any]) -> float:
    """Images a second through forward, losses, backward and the optimizer's step, without the loading of data."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch = next(iter(build(config["data"]).train_dataloader())).to(device)
    detector: nn.Module = build(config["detector"]).to(device, memory_format=torch.channels_last)
    optimizer = build(config["optimizer"])(detector.parameters())
    half = config["trainer"]["precision"] == "bf16-mixed"
    start = time.perf_counter()
    for step in range(WARM_STEPS + TIMED_STEPS):
        if step == WARM_STEPS:
            start = time.perf_counter()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=half):
            parts = detector.losses(detector(to_float(batch.images)), batch.targets)  # type: ignore[operator]
        loss = torch.stack(list(parts.values())).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the device
    return TIMED_STEPS * len(batch) / (time.perf_counter() - start)


def _test_map_50(config: dict[str, Any]) -> float:
    """Trains, from where an interrupted bench left the same training, and evaluates on the test split."""
    from onestage.cluster.launch import launch
    from onestage.evaluation import evaluate

    unfinished = _unfinished(config)
    if unfinished is not None:
        config = compose("train", [*config["overrides"], f"resume={unfinished}"])
    outcome = launch(config)
    if outcome.exit_code in (INTERRUPTED, PREEMPTED):
        raise KeyboardInterrupt
    if outcome.reason is not None:
        raise RuntimeError(outcome.reason)
    overrides = ["tracking=none", f"storage={config['storage']}"]
    metrics = evaluate(outcome.run_id, split="test", overrides=overrides, files=False)["metrics"]
    return float(metrics["test/map_50"])


def _unfinished(config: Mapping[str, Any]) -> str | None:
    """The run of the same training that has a checkpoint but no model."""
    for file in Path(config["storage"]).glob("*/config.json"):
        begun = (file.parent / "checkpoints" / "last.ckpt").is_file() and not (file.parent / "model").exists()
        before = [one for one in json.loads(file.read_text())["overrides"] if not one.startswith("resume=")]
        if begun and before == config["overrides"]:
            return file.parent.name
    return None


def machine() -> str:
    """The processor, its cores that this process may use, the GPU where there is one, and torch's version."""
    from onestage.data.threads import num_cores

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    parts = [names[0] if names else platform.processor() or platform.machine(), f"{num_cores()} cores"]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return ", ".join([*parts, f"torch {torch.__version__}"])


def _settings(config: Mapping[str, Any]) -> str:
    optimizer, schedule, trainer = config["optimizer"], config["schedule"], config["trainer"]
    return ", ".join(
        [
            f"{optimizer['_target_'].rpartition('.')[2]} at {optimizer['lr']:g}",
            schedule["_target_"].rpartition(".")[2],
            f"batches of {config['data']['batch_size']}",
            f"{trainer['max_steps']} steps in {trainer['max_epochs']} epochs",
            f"averaged weights ({trainer['ema_decay']:g})",
            trainer["precision"],
        ]
    )


def markdown(report: Mapping[str, Any]) -> str:
    """The report of ``bench`` as a page with a table."""
    lines = [
        "# Detectors",
        "",
        f"Every detector trained from scratch on {report['images_seen']:,} images of {report['dataset']}, and scored "
        "on its test split.",
        "Parameters in millions; GFLOPs of one image's forward, twice the multiply-adds; first as in",
        "the paper, then as trained here. Images a second are a training step's, without the loading of data.",
        "So short a training says who learns fast: a network without batch norm, or one with a single object a cell,",
        "stands low here whatever it reaches in the end.",
        "",
        f"- command: `{report['command']}`",
        f"- machine: {report['machine']}",
        f"- date: {report['date']}",
        f"- settings: {report['settings']}",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "| --- |" + " --: |" * (len(COLUMNS) - 1),
        *map(_row, report["detectors"]),
    ]
    return "\n".join([*lines, ""])


def _row(result: Mapping[str, Any]) -> str:
    if "failed" in result:
        return f"| {result['name']} | failed: {result['failed'].replace('|', '/')} |" + " |" * (len(COLUMNS) - 2)

    def cells(one: Mapping[str, Any]) -> list[str]:
        height, width = one["input_size"]
        return [f"{height}×{width}", f"{one['parameters'] / 1e6:.2f}", f"{one['gflops']:.2f}"]

    trained = [f"{result['trained']['width']:g}", *cells(result["trained"])]
    measured = [f"{result['images_per_s']:.1f}", f"{result['map_50']:.3f}"]
    return "| " + " | ".join([result["name"], *cells(result["paper"]), *trained, *measured]) + " |"
