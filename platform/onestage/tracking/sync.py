"""What trainings left on disk when they ended or died, sent to their runs: `onestage sync`."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from onestage.errors import InputError
from onestage.tracking import runs
from onestage.tracking.client import with_user
from onestage.tracking.delivery import RunDelivery
from onestage.tracking.origin import process_tags
from onestage.tracking.spool import SPOOL_FOLDER, TARGET, Spool, in_use, remember

ENDING: Final = "ending.json"
PATIENCE_S: Final = 30.0
"""So long a store may give nothing but errors before what is left waits for another day."""
# Of a run over several machines, each has a spool of its own.
_SPOOL: Final = f"{SPOOL_FOLDER}*/{TARGET}"  # rank 0's, and those of the other machines
PLACES: Final = (TARGET, _SPOOL, f"*/{_SPOOL}", f"sweeps/*/{_SPOOL}")

State = Literal["nothing", "arrived", "waits", "busy"]
Tell = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Left:
    """What waits in ``folder`` for a run: calls that logged metrics, other items, and how the run ended, if so."""

    folder: Path
    run_id: str
    uri: str  # without a password
    every_s: float
    metrics: int
    items: int
    ending: dict[str, Any] | None

    @property
    def anything(self) -> bool:
        return bool(self.metrics or self.items or self.ending)


@dataclass(frozen=True, kw_only=True)
class Synced:
    """What became of it; ``reason`` in one line where it waits still, or a training is busy with it."""

    folder: str
    run_id: str
    state: State
    metrics: int
    items: int
    reason: str | None = None


def spools(place: Path) -> list[Path]:
    """The spools of a folder: a spool itself, a run's folder, or a storage with runs and sweeps."""
    return sorted({file.parent for pattern in PLACES for file in place.glob(pattern)})


def left_in(folder: Path) -> Left:
    """What waits in a spool's folder. Raises InputError where it is none."""
    try:
        target = json.loads((folder / TARGET).read_text())
        run_id, uri = target["run_id"], target["uri"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder} holds nothing to sync: give the spool of a run (it has a {TARGET})") from error
    metrics, sent = folder / "metrics.jsonl", folder / "metrics.sent"
    lines = 0
    if metrics.exists():
        with metrics.open("rb") as file:
            file.seek(int(sent.read_text()) if sent.exists() else 0)
            lines = sum(line.endswith(b"\n") for line in file)
    items = [place for place in folder.glob("files/*") if place.suffix != ".part"]
    ending = folder / ENDING
    return Left(
        folder=folder,
        run_id=run_id,
        uri=uri,
        every_s=target.get("every_s", 0.0),
        metrics=lines,
        items=len(items),
        ending=json.loads(ending.read_text()) if ending.exists() else None,
    )


def keep_ending(folder: Path, *, uri: str, run_id: str, status: runs.Ending, reason: str | None) -> None:
    """For a driver whose store is away at the end: says in the spool how its run ended, until `sync` can tell."""
    remember(folder, uri=uri, run_id=run_id)
    ending = {"status": status, "reason": reason, "time": int(time.time() * 1000), "process": process_tags()}
    (folder / ENDING).write_text(json.dumps(ending))


def sync(folder: Path, *, uri: str | None = None, patience_s: float = PATIENCE_S, tell: Tell | None = None) -> Synced:
    """Sends what waits in a spool's folder, then how the run ended; ``tell`` hears of bytes, done and in all.

    ``uri`` replaces the store that the training used; the password of that one comes from MLFLOW_TRACKING_URI. A run
    whose driver died is KILLED then. Raises InputError where the folder is no spool.
    """
    left = left_in(folder)
    if in_use(folder):
        return _synced(left, "busy", f"a training still logs through {folder}: it sends by itself")
    if not left.anything:
        return _synced(left, "nothing")
    store = runs.tracking_uri(uri or with_user(left.uri))
    try:
        runs.check(store)
        found = runs.find_run(store, left.run_id)
    except InputError as error:
        return _synced(left, "waits", str(error))
    if found.status == "RUNNING" and runs.is_busy(store, found.tags):
        return _synced(left, "busy", f"the run's driver is alive on {runs.where(found.tags)}: it sends by itself")
    if trouble := _send(left, store, patience_s=patience_s, tell=tell):
        return _synced(left, "waits", trouble)
    if left.ending is not None and not _end(left, store, left.ending):
        return _synced(left, "waits", "how the run ended could not be told")
    if left_in(folder).items:
        return _synced(left, "waits", "the store answers but does not take all of it")
    return _synced(left, "arrived")


def _synced(left: Left, state: State, reason: str | None = None) -> Synced:
    return Synced(
        folder=str(left.folder),
        run_id=left.run_id,
        state=state,
        metrics=left.metrics,
        items=left.items,
        reason=reason,
    )


def _send(left: Left, store: str, *, patience_s: float, tell: Tell | None) -> str | None:
    """Why something waits still; None when all of it was sent."""
    spool = Spool(delivery=RunDelivery(uri=store, run_id=left.run_id), folder=left.folder, every_s=left.every_s)
    try:
        whole = least = spool.backlog()
        since = time.monotonic()
        while not spool.flush(0.5):
            backlog = spool.backlog()
            if backlog < least or spool.trouble is None:  # a large file may take its time
                least, since = backlog, time.monotonic()
            elif time.monotonic() - since > patience_s:
                return spool.trouble
            if tell is not None:
                tell(whole - backlog, whole)
        return None
    finally:
        spool.close(0)


def _end(left: Left, store: str, ending: dict[str, Any]) -> bool:
    """Tells how the run ended, if no other process has gone on with it since."""
    found = runs.find_run(store, left.run_id)
    mine = all(found.tags.get(key) == value for key, value in ending["process"].items())
    if mine and not runs.end_run(store, left.run_id, ending["status"], ending["reason"], at_ms=ending["time"]):
        return False
    (left.folder / ENDING).unlink()
    return True


def summary(found: Sequence[Synced]) -> tuple[int, int]:
    """How many of them have arrived, and how many wait still."""
    return sum(one.state == "arrived" for one in found), sum(one.state == "waits" for one in found)
