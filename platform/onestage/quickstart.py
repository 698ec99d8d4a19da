"""The main job on data that it draws itself: shards, two DDP workers on Ray, evaluation, pictures, MLflow."""

import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from onestage.errors import DONE, InputError

if TYPE_CHECKING:
    from onestage.cluster.launch import Outcome

EXPERIMENT: Final = "quickstart"
SEED: Final = 7
NUM_TRAIN, NUM_VAL, NUM_TEST = 1600, 160, 160
SIZE_PX: Final = 192
NUM_PICTURES: Final = 12
SETTINGS: Final = (
    "detector=yolov3_tiny",
    "detector.width=0.25",
    f"detector.input_size=[{SIZE_PX},{SIZE_PX}]",
    "augment.flip=null",  # a mirrored digit is another sign
    "data.batch_size=8",
    "data.num_workers=0",
    "optimizer.lr=2e-3",
    "schedule.warmup_epochs=0.5",
    "trainer.max_epochs=10",
    "trainer.val_every_epochs=5",
    "cluster=local",
    f"tracking.experiment={EXPERIMENT}",
    "name=quickstart",
)


def quickstart(out: Path) -> int:
    """Draws, trains, evaluates and predicts under ``out``; what an earlier call left unfinished it goes on with."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    started = time.monotonic()
    data = _draw(out / "digits", console)
    outcome = _train(out, data, console)
    if outcome.exit_code != DONE:
        print(f"onestage: quickstart: {outcome.status.lower()}: {outcome.reason}", file=sys.stderr)
        print("onestage: `onestage quickstart` again goes on from the last checkpoint", file=sys.stderr)
        return outcome.exit_code
    from onestage.evaluation import evaluate, predict

    overrides = [f"tracking.uri={outcome.tracking_uri}", f"storage={outcome.folder.parent}"]
    tested = evaluate(outcome.run_id, split="test", overrides=overrides)["metrics"]
    pictures = out / "predictions"
    shutil.rmtree(pictures, ignore_errors=True)
    scenes = _write_scenes(data, out / "scenes")
    predict(outcome.run_id, [str(scenes)], out=pictures, threshold=None, overrides=overrides)
    _log_pictures(outcome, pictures)
    _report(outcome, tested, pictures, minutes=(time.monotonic() - started) / 60)
    return DONE


def _draw(folder: Path, console: Any) -> Path:
    """The digit scenes; drawn once, the same ones every time."""
    from rich.progress import Progress

    from onestage.data.manifest import Manifest
    from onestage.data.scenes import draw

    try:
        Manifest.load(folder)
        return folder
    except InputError:
        pass
    folder.parent.mkdir(parents=True, exist_ok=True)
    with Progress(console=console) as bar:
        task = bar.add_task("drawing scenes of digits", total=NUM_TRAIN + NUM_VAL + NUM_TEST)
        draw(
            folder,
            seed=SEED,
            num_train=NUM_TRAIN,
            num_val=NUM_VAL,
            num_test=NUM_TEST,
            size=SIZE_PX,
            progress=lambda done, _: bar.update(task, completed=done),
        )
    return folder


def _train(out: Path, data: Path, console: Any) -> "Outcome":
    """From the last checkpoint of an unfinished quickstart where there is one, else from the start."""
    from onestage.cluster.launch import launch
    from onestage.config import compose
    from onestage.data.threads import num_cores

    workers = min(2, num_cores())
    settings = [*SETTINGS, f"cluster.num_workers={workers}", f"data.root={data}", f"storage={out / 'runs'}"]
    if (unfinished := _unfinished(out / "runs")) is not None:
        console.print(f"going on with run {unfinished}")
        try:
            return launch(compose("train", [*settings, f"resume={unfinished}"]))
        except InputError as error:  # its tracking store may be gone
            console.print(f"that run can't go on ({error}); starting a new one")
            shutil.rmtree(out / "runs" / unfinished, ignore_errors=True)
    return launch(compose("train", settings))


def _unfinished(runs: Path) -> str | None:
    """The newest run with a checkpoint and without a model."""
    folders = [
        path.parent.parent
        for path in runs.glob("*/checkpoints/last.ckpt")
        if not (path.parent.parent / "model" / "model.json").is_file()
    ]
    return max(folders, key=lambda folder: folder.stat().st_mtime).name if folders else None


def _write_scenes(data: Path, folder: Path) -> Path:
    """A few test scenes as JPEG files, as they lie in the shards."""
    from onestage.data.manifest import Manifest
    from onestage.data.order import in_order
    from onestage.data.shards import ShardReader

    manifest = Manifest.load(data)
    reader = ShardReader(data, "test", manifest=manifest)
    folder.mkdir(parents=True, exist_ok=True)
    for key in in_order(manifest, "test", rank=0, world_size=1)[:NUM_PICTURES]:
        (folder / f"{key}.jpg").write_bytes(reader.read(key)["jpg"])
    return folder


def _log_pictures(outcome: "Outcome", pictures: Path) -> None:
    from onestage.tracking.mlflow_tracker import MlflowTracker

    assert outcome.tracking_uri is not None
    tracker = MlflowTracker(
        uri=outcome.tracking_uri, run_id=outcome.run_id, folder=outcome.folder / "spool", resume_from_step=0
    )
    tracker.log_artifact(pictures)
    tracker.close()


def _report(outcome: "Outcome", tested: dict[str, float], pictures: Path, *, minutes: float) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("split", "mAP", "mAP@0.5", "mAP@0.75", title="digits, yolov3_tiny", title_justify="left")
    for split, values in (("val", outcome.metrics), ("test", tested)):
        table.add_row(split, *(f"{values[f'{split}/{name}']:.3f}" for name in ("map", "map_50", "map_75")))
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    console.print(f"{minutes:.1f} minutes, MLflow run {outcome.run_id}")
    console.print(f"pictures:  {pictures}/")
    console.print(f"dashboard: .venv/bin/onestage dashboard tracking.uri={outcome.tracking_uri}")
