"""Which MLflow run belongs to which job of a cluster."""

from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as TooLate
from typing import Final

from onestage.tracking.client import client
from onestage.tracking.redaction import without_user

JOB_TAG: Final = "onestage.job"
LIMIT_S: Final = 12.0
"""The import of MLflow takes 5 s of them."""
NEWEST: Final = 1000


def runs_of_jobs(uri: str, job_ids: Collection[str], *, limit_s: float = LIMIT_S) -> dict[str, str]:
    """By job, the address of its newest run's page where ``uri`` is a server's, else the run's id.

    Jobs without a run are left out; so are all of them where the store does not answer within ``limit_s``.
    """
    if not job_ids:
        return {}
    pool = ThreadPoolExecutor(1, thread_name_prefix="job-links")
    try:
        return pool.submit(_found, uri, frozenset(job_ids)).result(limit_s)
    except (Exception, TooLate):  # a list of jobs is of use without its links
        return {}
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _found(uri: str, job_ids: frozenset[str]) -> dict[str, str]:
    store = client(uri)
    experiments = [one.experiment_id for one in store.search_experiments()]
    runs = store.search_runs(
        experiments, f"tags.`{JOB_TAG}` LIKE '%'", order_by=["attributes.start_time DESC"], max_results=NEWEST
    )
    base = without_user(uri).rstrip("/") if uri.startswith(("http://", "https://")) else None
    return {
        run.data.tags[JOB_TAG]: run.info.run_id
        if base is None
        else f"{base}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
        for run in reversed(runs)  # of two runs of a job the newer counts
        if run.data.tags[JOB_TAG] in job_ids
    }
