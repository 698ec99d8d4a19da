"""What a sweep has come to: the leaderboard as table and pictures, on disk and in MLflow, and the champion."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final, TypeVar

from onestage.cluster.storage import write_json
from onestage.data.manifest import Manifest
from onestage.errors import InputError
from onestage.sweeps.champion import Verdict, judge
from onestage.sweeps.folder import Setup
from onestage.sweeps.plan import Plan
from onestage.sweeps.watch import entries
from onestage.tracking.leaderboard import Entry, best_of
from onestage.tracking.origin import CHANGES, CODE_FOLDER, Code

TABLE: Final = "leaderboard.json"
SEND_S: Final = 60.0

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Conclusion:
    """``entries`` are the trials, the best first; ``pictures`` the files that show them."""

    entries: Sequence[Entry]
    pictures: Sequence[Path]
    verdict: Verdict | None


def conclude(folder: Path, setup: Setup, plan: Plan, *, crown: bool) -> Conclusion:
    """Draws up the leaderboard and may crown the winner; a part that fails is said, and the others are done."""
    manifest = Manifest.load(plan.config["data"]["root"])
    found = entries(folder, setup, dataset_hash=manifest.content_hash)
    write_json(folder / TABLE, {"metric": setup.metric, "runs": [asdict(one) for one in found]})
    pictures: list[Path] = []
    if found:
        pictures = _tried("the pictures", lambda: _draw(folder, setup, found)) or []
    verdict = None
    best = best_of(found)
    if crown and best is not None and best.state == "done" and setup.tracking_uri is not None:
        uri, name = setup.tracking_uri, plan.settings["champion"] or manifest.name
        verdict = _tried("the champion", lambda: judge(best.run_id, uri=uri, name=name, config=plan.config))
    if setup.tracking_uri is not None and setup.parent is not None:
        _tried("the record in MLflow", lambda: _send(folder, setup, found, pictures, verdict))
    return Conclusion(entries=found, pictures=pictures, verdict=verdict)


def _draw(folder: Path, setup: Setup, found: Sequence[Entry]) -> list[Path]:
    from onestage.sweeps import charts  # brings matplotlib with it

    return charts.draw(found, folder, metric=setup.metric, maximize=setup.maximize)


def _tried(what: str, do: Callable[[], T]) -> T | None:
    """The trainings are done, and nothing that fails from here on may look as if they had been lost."""
    try:
        return do()
    except Exception as error:
        words = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        print(f"onestage: {what} could not be made: {words.splitlines()[0]}", file=sys.stderr)
        return None


def _send(
    folder: Path, setup: Setup, found: Sequence[Entry], pictures: Sequence[Path], verdict: Verdict | None
) -> None:
    from onestage.tracking.mlflow_tracker import MlflowTracker

    assert setup.tracking_uri is not None and setup.parent is not None
    tracker = MlflowTracker(uri=setup.tracking_uri, run_id=setup.parent, folder=folder / "spool", resume_from_step=0)
    tracker.log_dict(_table(found), TABLE)
    if changes := Code.load(folder / CODE_FOLDER).changes:
        tracker.log_text(changes, CHANGES)
    tags = {"mlflow.loggedArtifacts": json.dumps([{"path": TABLE, "type": "table"}])}
    for picture in pictures:
        tracker.log_artifact(picture, "pictures")
    best = best_of(found)
    if best is not None:
        tags |= {"onestage.best": best.run_id, "onestage.best_trial": str(best.trial)}
        tracker.log_metrics({f"best/{setup.metric.removeprefix('val/')}": best.score or 0.0}, step=len(found))
    if verdict is not None:
        tags |= {"onestage.champion": str(verdict)}
    tracker.set_tags(tags)
    if not tracker.close(SEND_S):
        print(f"onestage: MLflow is away; the leaderboard waits for: onestage sync {folder / 'spool'}", file=sys.stderr)


def _table(found: Sequence[Entry]) -> dict[str, Any]:
    """As MLflow shows tables."""
    varied = list(dict.fromkeys(key for one in found for key in one.point))
    columns = [field.name for field in fields(Entry) if field.name != "point"]
    rows = [[*(getattr(one, name) for name in columns), *(one.point.get(key) for key in varied)] for one in found]
    return {"columns": [*columns, *varied], "data": rows}
