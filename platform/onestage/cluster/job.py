"""What crosses the wire from the driver to a worker."""

from typing import Any, TypedDict


class Job(TypedDict):
    """A training as plain data; ``folder`` is where its checkpoints, spool and model live."""

    config: dict[str, Any]
    run_id: str
    folder: str
    tracking_uri: str | None
