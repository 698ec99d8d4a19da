"""Pictures as MLflow's image cards show them.

`MlflowClient.log_image` makes of each a preview of 256 pixels, all that a card shows, however large it is drawn:
too little to tell a box from its neighbour. Names and tag are MLflow's own.
"""

import tempfile
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import PIL.Image
    from mlflow import MlflowClient

PREVIEW_SIDE_PX: Final = 1024
FOLDER: Final = "images"


def picture_name(key: str, step: int) -> str:
    """How the files of a picture begin, up to the time.

    >>> picture_name("val/image_000007", 40)
    'images/val~image_000007+step+40+'
    """
    return f"{FOLDER}/{key.replace('/', '~')}+step+{step}+"


def log_picture(
    store: "MlflowClient", run_id: str, image: "PIL.Image.Image", *, key: str, step: int, time_ms: int
) -> None:
    """Log a picture whole, as PNG, and its preview, as the last of its files: where that is, all of it is."""
    from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_IMAGES

    name = f"{picture_name(key, step)}timestamp+{time_ms}+{uuid.uuid4()}".removeprefix(f"{FOLDER}/")
    with tempfile.TemporaryDirectory(prefix="onestage-picture-") as folder:
        whole, preview = Path(folder) / f"{name}.png", Path(folder) / f"{name}+compressed.webp"
        image.save(whole)
        small = image.copy()
        small.thumbnail((PREVIEW_SIDE_PX, PREVIEW_SIDE_PX))
        small.save(preview)
        for path in (whole, preview):
            store.log_artifact(run_id, str(path), FOLDER)
    store.set_tag(run_id, MLFLOW_LOGGED_IMAGES, "True")
