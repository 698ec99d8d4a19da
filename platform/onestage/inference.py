"""A trained detector, ready for images: what evaluation, prediction and the MLflow model use.

A RUN is an MLflow run id, a ``models:/name@alias`` URI, or a checkpoint file.
"""

import json
import pickle
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors.torch import load_file

from onestage.boxes.formats import clip
from onestage.config import build
from onestage.data.transforms import fit_of
from onestage.detectors.base import OneStageDetector
from onestage.errors import InputError
from onestage.training.module import to_float
from onestage.types import XYXY, Detections


@dataclass(frozen=True)
class Predictor:
    """Detects in images of any size.

    ``config`` is the run's ``detector`` and ``data``, ``overrides`` how it was composed.
    """

    detector: OneStageDetector
    classes: Sequence[str]
    config: Mapping[str, Any]
    overrides: Sequence[str]
    threshold: float

    @classmethod
    def from_folder(cls, folder: str | Path) -> Self:
        """From a folder with ``model.safetensors`` and ``model.json``, as a training leaves and MLflow stores it."""
        folder = Path(folder)
        card = json.loads((folder / "model.json").read_text())
        return cls._built(card["config"], load_file(folder / "model.safetensors"), card)

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> Self:
        """From a checkpoint of a training: its averaged weights."""
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
            card = loaded["onestage"]
        except pickle.UnpicklingError as error:  # torch's own words advise to load it all the same
            raise InputError(f"{path} is not a checkpoint of onestage: it is no torch file, or holds more") from error
        except (KeyError, RuntimeError, EOFError, OSError, ValueError, ImportError) as error:
            raise InputError(f"{path} is not a checkpoint of onestage: {str(error).splitlines()[0]}") from error
        prefix = "detector."
        weights = {k.removeprefix(prefix): v for k, v in loaded["state_dict"].items() if k.startswith(prefix)}
        return cls._built({"detector": card["detector"], "data": card["data"]}, weights, card)

    @classmethod
    def _built(cls, config: Mapping[str, Any], weights: Mapping[str, torch.Tensor], card: Mapping[str, Any]) -> Self:
        detector: OneStageDetector = build(config["detector"])
        detector.load_state_dict(weights)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(
            detector=detector.to(device).to(memory_format=torch.channels_last).eval(),
            classes=card["classes"],
            config=config,
            overrides=card["overrides"],
            threshold=card["threshold"],
        )

    @classmethod
    def open(cls, run: str, *, storage: str | Path, tracking_uri: str | None) -> Self:
        """From a RUN: its folder under ``storage`` where this machine has it, else what MLflow keeps of it."""
        file = Path(run)
        if file.is_file():
            return cls.from_checkpoint(file)
        folder = Path(storage) / run
        if "/" not in run and folder.is_dir():
            if (folder / "model" / "model.json").is_file():
                return cls.from_folder(folder / "model")
            for name in ("best.ckpt", "last.ckpt"):
                if (folder / "checkpoints" / name).is_file():
                    return cls.from_checkpoint(folder / "checkpoints" / name)
        if tracking_uri is None:
            raise InputError(f"no run {run!r} under {storage}, and no checkpoint of that name")
        from onestage.tracking import runs

        with tempfile.TemporaryDirectory() as temporary:
            return cls.from_folder(runs.download_model(tracking_uri, run, Path(temporary)))

    @torch.no_grad()
    def detect(self, images: torch.Tensor) -> list[Detections]:
        """Detections for a batch (B, 3, H, W) of the input's size, on the CPU, from the device that the model is on."""
        device = next(self.detector.parameters()).device
        found = self.detector.detect(self.detector(to_float(images.to(device))))
        return [Detections(XYXY(one.boxes.cpu()), one.scores.cpu(), one.labels.cpu()) for one in found]

    def __call__(self, images: Sequence[np.ndarray]) -> list[Detections]:
        """Detections for RGB images (H, W, 3) uint8, boxes in their own pixels."""
        if not images:
            return []
        fit = fit_of(self.config["data"].get("fit", "letterbox"))  # older runs have no such key
        placed = [fit.place(image, size=self.detector.input_size) for image in images]
        batch = torch.from_numpy(np.stack([pixels for pixels, _ in placed])).permute(0, 3, 1, 2)
        found = self.detect(batch)
        return [
            _in_image(Detections(placement.to_original(one.boxes), one.scores, one.labels), image)
            for one, (_, placement), image in zip(found, placed, images, strict=True)
        ]


def _in_image(found: Detections, image: np.ndarray) -> Detections:
    """Detections cut to the image; what lies on the letterbox's grey bars alone is none."""
    height, width = image.shape[:2]
    boxes = clip(found.boxes, height=height, width=width)
    inside = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    return Detections(XYXY(boxes[inside]), found.scores[inside], found.labels[inside])
