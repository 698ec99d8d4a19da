"""What an evaluation leaves in the run that it is about."""

import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from onestage.tracking.client import client, missing, refused
from onestage.tracking.delivery import allowed_name, last_step
from onestage.tracking.images import log_picture


def log_evaluation(
    uri: str, run: str, folder: Path, artifact_path: str, pictures: Mapping[str, NDArray[np.uint8]]
) -> bool:
    """Copy ``folder`` to ``artifact_path`` of a run's artifacts, and ``pictures`` (H, W, 3) into its image tab.

    Each picture stands at the run's last step, under its key. False when ``run`` is no run's id, say a checkpoint's
    path: then nothing happens.
    """
    import PIL.Image

    try:
        found = client(uri).get_run(run)
    except Exception as error:
        if missing(error) or refused(error):
            return False
        raise
    step = last_step(found)
    client(uri).log_artifacts(run, str(folder), artifact_path)
    for key, pixels in pictures.items():
        image = PIL.Image.fromarray(np.ascontiguousarray(pixels))
        named = allowed_name(key).replace(":", "_")
        log_picture(client(uri), run, image, key=named, step=step, time_ms=int(time.time() * 1000))
    return True
