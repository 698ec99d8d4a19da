"""The end of a run in MLflow, as its driver tells it; what can't be told then waits on disk."""

import contextlib
import shlex
import sys
from pathlib import Path

from onestage.cluster.history import Summary
from onestage.cluster.job import Job
from onestage.errors import InputError
from onestage.tracking.endings import Ending


def end(job: Job, status: Ending, reason: str | None, history: Summary | None) -> None:
    """Ends the run; where not all could be told, a line says so, and what sends it."""
    uri, run_id = job["tracking_uri"], job["run_id"]
    if uri is None:
        return
    from onestage.tracking import runs, sync
    from onestage.tracking.spool import SPOOL_FOLDER

    spool = Path(job["folder"]) / SPOOL_FOLDER
    with contextlib.suppress(OSError, InputError):
        if runs.end_run(uri, run_id, status, reason):
            (spool / sync.ENDING).unlink(missing_ok=True)  # of an earlier life
        else:
            sync.keep_ending(spool, uri=uri, run_id=run_id, status=status, reason=reason)
        if sync.spools(spool) and sync.left_in(spool).anything:
            again = f"onestage sync {shlex.quote(str(spool))}"
            print(f"onestage: not all has reached MLflow; what waits in {spool} is sent by: {again}", file=sys.stderr)
    if history is not None and history["restarts"]:
        _log_restarts(uri, run_id, history)


def _log_restarts(uri: str, run_id: str, history: Summary) -> None:
    """What the losses of this run cost, beside its other numbers; where the server is away, the file has it."""
    from onestage.tracking import runs

    numbers = {
        "cluster/restarts": history["restarts"],
        "cluster/lost_images": history["lost_images"],
        "cluster/recovery_s": sum(history["recovery_s"]),
    }
    with contextlib.suppress(Exception):
        runs.log_summary(uri, run_id, numbers)
