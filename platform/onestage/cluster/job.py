"""What crosses the wire: a training on its way to a worker, a command on its way to a cluster."""

from collections.abc import Mapping
from typing import Any, Final, NotRequired, TypedDict

JOB_VARIABLE: Final = "ONESTAGE_JOB"
"""In the environment of a submitted job: its id."""
RUN_FILE_VARIABLE: Final = "ONESTAGE_RUN_FILE"
"""In the environment of a job that may be started again: the file that gets its training's run id, to go on from."""


HTTP: Final = ("http://", "https://")


def is_sent(cluster: Mapping[str, Any]) -> bool:
    """Whether commands are sent there as jobs, rather than attached to what ``cluster.address`` names."""
    if cluster["kind"] == "slurm":
        return True
    return cluster["kind"] == "ray" and (cluster["address"] or "").startswith(HTTP)


class Job(TypedDict):
    """A training as plain data; ``folder`` is where its checkpoints, spool and model live, ``changes`` what the user's
    checkout has that its commit has not.
    """

    config: dict[str, Any]
    run_id: str
    folder: str
    tracking_uri: str | None
    changes: NotRequired[str | None]
