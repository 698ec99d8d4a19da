"""Which MLflow run belongs to which job of a cluster."""

import threading
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from onestage.tracking.client import SQLITE, client, is_server
from onestage.tracking.endings import bury
from onestage.tracking.redaction import without_user
from onestage.tracking.runs import JOB_TAG

LIMIT_S: Final = 12.0
"""The import of MLflow takes 5 s of them."""
NEWEST: Final = 1000


def runs_of_jobs(stores: Mapping[str, Collection[str]], *, limit_s: float = LIMIT_S) -> dict[str, str]:
    """By job, where its newest run is to be seen: its page where the store is a server, else its id.

    ``stores`` has the ids of the jobs by their store's tracking URI. Jobs without a run are left out; so are those
    whose store does not answer within ``limit_s``, which also does not keep this process from ending. Of those found,
    the ones without a living driver are KILLED.
    """
    found: dict[str, str] = {}

    def look(uri: str, jobs: Collection[str]) -> None:
        with suppress(Exception):  # a list of jobs is of use without its links
            found.update(_runs_of_jobs(uri, frozenset(jobs)))

    end = time.monotonic() + limit_s
    # Daemons, since the interpreter waits for any other thread when it ends.
    threads = [threading.Thread(target=look, args=one, daemon=True, name="job-links") for one in stores.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    return found.copy()


def _runs_of_jobs(uri: str, jobs: frozenset[str]) -> dict[str, str]:
    if uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE)).is_file():
        return {}  # another machine's, or one without a run yet: MLflow would make it here
    store = client(uri)
    runs = store.search_runs(
        [one.experiment_id for one in store.search_experiments()],
        f"tags.`{JOB_TAG}` LIKE '%'",
        order_by=["attributes.start_time DESC"],
        max_results=NEWEST,
    )
    of_job = {
        job: run
        for run in reversed(runs)  # of two runs of a job the newer counts
        for job in run.data.tags[JOB_TAG].split()  # a run that was resumed has had several
        if job in jobs
    }
    bury(uri, of_job.values())
    if not is_server(uri):
        return {job: run.info.run_id for job, run in of_job.items()}
    pages = f"{without_user(uri).rstrip('/')}/#/experiments"
    return {job: f"{pages}/{run.info.experiment_id}/runs/{run.info.run_id}" for job, run in of_job.items()}
