"""The logged model: safetensors and JSON behind MLflow's pyfunc, nothing pickled.

`save` writes it; MLflow calls `_load_pyfunc` to read it. A request is a DataFrame with a column ``image``; the answer
has a row per image: boxes (lists of left, top, right, bottom in its own pixels), scores, labels and class names.
"""

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from onestage.errors import InputError
from onestage.tracking.client import set_defaults
from onestage.types import Detections

if TYPE_CHECKING:
    import pandas as pd

PACKAGES: Final = ("onestage", "torch", "torchvision", "safetensors", "opencv-python-headless")


class Predictor(Protocol):
    """What `onestage.inference.Predictor` is to this room."""

    @property
    def classes(self) -> Sequence[str]:
        """Names by label."""

    def __call__(self, images: list[NDArray[np.uint8]]) -> list[Detections]:
        """Detections in original pixels, one per image (H, W, 3) RGB."""


class DetectorModel:
    """A detector as MLflow calls it."""

    def __init__(self, *, predictor: Predictor) -> None:
        self._predictor = predictor

    def predict(self, requests: "pd.DataFrame", params: Mapping[str, Any] | None = None) -> "pd.DataFrame":
        """A row per row of ``requests.image``: RGB arrays (H, W, 3) uint8, encoded images, their base64, or paths.

        Raises InputError for an image that can't be read. MLflow hands in ``params``; there are none.
        """
        import pandas as pd

        images = [_read_image(image, row=row) for row, image in enumerate(requests["image"])]
        return pd.DataFrame([self._row(found) for found in self._predictor(images)], index=requests.index)

    def _row(self, found: Detections) -> dict[str, list[Any]]:
        labels = found.labels.tolist()
        return {
            "boxes": found.boxes.tolist(),
            "scores": found.scores.tolist(),
            "labels": labels,
            "classes": [self._predictor.classes[label] for label in labels],
        }


def save(folder: Path, to: Path) -> None:
    """Write the model in ``folder`` (``model.safetensors``, ``model.json``) as an MLflow model into the folder ``to``.

    ``to`` must be empty or absent. It refers to ``onestage`` for its code, at the version that is installed.
    """
    set_defaults()
    import mlflow.pyfunc
    import pandas as pd
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import AnyType, Array

    description = json.loads((folder / "model.json").read_text())
    request = Schema([ColSpec(AnyType(), "image")])
    answer = Schema([
        ColSpec(Array(Array(DataType.double)), "boxes"),
        ColSpec(Array(DataType.double), "scores"),
        ColSpec(Array(DataType.long), "labels"),
        ColSpec(Array(DataType.string), "classes"),
    ])  # fmt: skip
    mlflow.pyfunc.save_model(
        path=str(to),
        loader_module=__name__,
        data_path=str(folder),
        signature=ModelSignature(inputs=request, outputs=answer),
        input_example=pd.DataFrame({"image": [_example(description["input_size"])]}),
        pip_requirements=[_requirement(package) for package in PACKAGES],
        metadata={key: description[key] for key in ("classes", "input_size", "threshold") if key in description},
    )


def _load_pyfunc(data_path: str) -> DetectorModel:
    """MLflow's entry: the model whose folder was saved."""
    from onestage.inference import Predictor as FolderPredictor

    return DetectorModel(predictor=FolderPredictor.from_folder(Path(data_path)))


def _read_image(image: object, *, row: int) -> NDArray[np.uint8]:
    """Any form of a request's image as (H, W, 3) RGB."""
    if isinstance(image, np.ndarray | list):
        pixels = np.asarray(image)
        if pixels.ndim != 3 or pixels.shape[2] != 3 or not np.issubdtype(pixels.dtype, np.integer):
            raise InputError(
                f"image {row} is an array {pixels.shape} of {pixels.dtype}: send (H, W, 3) RGB with values 0 to 255"
            )
        return pixels.astype(np.uint8)
    encoded = np.frombuffer(_encoded(image, row=row), np.uint8)
    decoded = cv2.imdecode(encoded, cv2.IMREAD_COLOR) if encoded.size else None
    if decoded is None:
        raise InputError(f"image {row} can't be decoded: send JPEG or PNG, not cut short")
    return cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB).astype(np.uint8, copy=False)


def _encoded(image: object, *, row: int) -> bytes:
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if isinstance(image, Path):
        image = str(image)
    if not isinstance(image, str):
        raise InputError(f"image {row} is a {type(image).__name__}: send an RGB array, JPEG or PNG bytes, or a path")
    with suppress(OSError, ValueError):  # what no path may be long, or hold
        if Path(image).is_file():
            return Path(image).read_bytes()
    try:
        return base64.b64decode(image, validate=True)  # JSON has no bytes: a serving client sends base64.
    except binascii.Error:
        raise InputError(f"image {row}: there is no file {image[:200]!r}, and it is no base64 either") from None


def _example(input_size: Sequence[int]) -> str:
    """A grey image of the input's size as a client would put it into JSON: base64 of a PNG."""
    height, width = input_size
    _, png = cv2.imencode(".png", np.full((height, width, 3), 128, np.uint8))
    return base64.b64encode(png.tobytes()).decode()


def _requirement(package: str) -> str:
    try:
        # A local version such as 2.15.0+cu130 is on no index.
        return f"{package}=={version(package).partition('+')[0]}"
    except PackageNotFoundError:
        return package
