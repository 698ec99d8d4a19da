"""Each machine of a training watches itself: MLflow's system metrics, logged by one of the ranks that are on it."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from filelock import FileLock, Timeout

from onestage.cluster.job import Job
from onestage.cluster.storage import RunFolder
from onestage.data import cache
from onestage.tracking.tracker import Tracker


@contextmanager
def watched(job: Job, run: RunFolder, tracker: Tracker, *, rank: int, local_rank: int) -> Iterator[None]:
    """Within this the first rank of each machine logs what the machine does; rank 0 by its ``tracker``, the others by
    a spool of their own beside that one's.
    """
    uri = job["tracking_uri"]
    if uri is None or local_rank != 0:
        yield
        return
    from onestage.tracking.mlflow_tracker import MlflowTracker
    from onestage.tracking.spool import SPOOL_FOLDER
    from onestage.tracking.system import SystemMetrics

    host = socket.gethostname()
    # Several nodes of a cluster may be one machine.
    alone = FileLock(cache.folder(None) / f"{job['run_id']}.watched")
    try:
        alone.acquire(timeout=0)
    except (Timeout, OSError):
        yield
        return
    mine = tracker
    if rank != 0:
        folder = run.local / f"{SPOOL_FOLDER}-{host}"
        mine = MlflowTracker(uri=uri, run_id=job["run_id"], folder=folder, resume_from_step=0)
    try:
        with SystemMetrics(uri=uri, run_id=job["run_id"], node=host, log=mine.log_metrics):
            yield
    finally:
        if mine is not tracker:
            mine.close()
        alone.release()
