"""How MLflow's dashboard shows an experiment of ours: a view of its runs with the columns that a detector is judged by.

Without one the table of runs has no metric at all, and each person would have to choose them.
"""

import json
import time
from typing import Final

from onestage.tracking.client import client
from onestage.tracking.redaction import without_user

VIEW: Final = "onestage"
VIEW_NAME: Final = "Detection"
VIEW_TAG: Final = f"mlflow.sharedViewState.{VIEW}"
KIND_TAG: Final = "mlflow.experimentKind"
TRAINING: Final = "machine_learning"
"""One of the dashboard's two faces; a browser that was never here has the other, for language models."""
METRICS: Final = ("best/map", "perf/images_per_s", "val/map", "val/map_50", "val/map_75")
TAGS: Final = ("dataset.name",)


def view_tags() -> dict[str, str]:
    """An experiment's tags that hold the view, and say that models are trained here."""
    now_ms = int(time.time() * 1000)
    state = {
        "selectedColumns": [*(f"metrics.`{name}`" for name in METRICS), *(f"tags.`{name}`" for name in TAGS)],
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,
    }
    view = {"name": VIEW_NAME, "createdAt": now_ms, "updatedAt": now_ms, "state": json.dumps(state)}
    return {KIND_TAG: "custom_model_development", VIEW_TAG: json.dumps(view)}


def home(uri: str, server: str, experiment: str) -> str:
    """What to open first at a server over the store ``uri``: the experiment's view, before its first run the server."""
    try:
        known = client(uri).get_experiment_by_name(experiment)
    except Exception:  # the browser may ask for the password that this process has not
        known = None
    return without_user(server) if known is None else experiment_page(server, known.experiment_id)


def experiment_page(server: str, experiment_id: str) -> str:
    """Where a browser finds the view at an MLflow server.

    >>> experiment_page("http://ann:pw@host:5000/", "7")
    'http://host:5000/#/experiments/7/runs?workflowType=machine_learning&viewStateShareKey=onestage'
    """
    page = f"{without_user(server).rstrip('/')}/#/experiments/{experiment_id}/runs"
    return f"{page}?workflowType={TRAINING}&viewStateShareKey={VIEW}"
