"""How runs end in MLflow: by their drivers, or because a driver is dead."""

from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Literal

from onestage.tracking.client import client
from onestage.tracking.heartbeat import REASON_TAG, dead_because, is_presumed, last_beat, store_time
from onestage.tracking.redaction import redact

if TYPE_CHECKING:
    from mlflow.entities import Run

Ending = Literal["FINISHED", "FAILED", "KILLED"]


def end_run(uri: str, run_id: str, status: Ending, reason: str | None = None, *, at_ms: int | None = None) -> bool:
    """End a run, with a reason where it didn't finish. False when the store could not be told; never raises."""
    try:
        if reason is not None:
            client(uri).set_tag(run_id, REASON_TAG, redact(reason))
        elif is_presumed(client(uri).get_run(run_id).data.tags):
            client(uri).delete_tag(run_id, REASON_TAG)
        client(uri).set_terminated(run_id, status, end_time=at_ms)
    except Exception:
        return False
    return True


def end_if_running(uri: str, run_id: str, reason: str) -> bool:
    """Sets a run to KILLED whose process is known to be gone; whether it was RUNNING. Never raises."""
    try:
        running = client(uri).get_run(run_id).info.status == "RUNNING"
    except Exception:
        return False
    return running and end_run(uri, run_id, "KILLED", reason)


def bury(uri: str, found: "Iterable[Run]") -> list[str]:
    """Set those of the runs to KILLED that are RUNNING without a living driver, as of its last sign of life."""
    now = cache(lambda: store_time(uri))
    marked = []
    for run in found:
        tags = run.data.tags
        if run.info.status != "RUNNING" or (reason := dead_because(tags, now)) is None:
            continue
        if client(uri).get_run(run.info.run_id).info.status != "RUNNING":  # it has ended itself meanwhile
            continue
        beat = last_beat(tags)
        at_ms = max(int(1000 * beat), run.info.start_time) if beat is not None else None
        if end_run(uri, run.info.run_id, "KILLED", reason, at_ms=at_ms):
            marked.append(str(run.info.run_id))
    return marked
