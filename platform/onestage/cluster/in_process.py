"""A training in the calling process, without Ray."""

import logging
from collections.abc import Callable
from typing import Any

from onestage.cluster.job import Job
from onestage.cluster.stop import Stop


def run(job: Job, *, show: Callable[[dict[str, Any]], None], stop: Stop) -> dict[str, Any]:
    """Trains here and now; ``show`` gets the progress."""
    import torch

    from onestage.cluster import worker
    from onestage.training.endings import Stopped

    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    cluster = job["config"]["cluster"]
    threads = torch.get_num_threads()
    torch.set_num_threads(cluster["cpus_per_worker"])
    options = {"accelerator": "gpu" if cluster["gpus_per_worker"] else "cpu", "devices": 1}
    try:
        with stop.listened():
            return worker.train(
                job, rank=0, trainer_options=options, progress=show, asked=lambda: stop.asked is not None
            )
    except Stopped:
        stop.raise_asked()
        raise
    finally:
        torch.set_num_threads(threads)
