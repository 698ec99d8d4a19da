"""Runs that have a model but never trained: their detections are many and wrong, which is what the tests want."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from onestage.config import build, compose

SETTINGS = ("detector=yolov3_tiny", "detector.width=0.125", "detector.input_size=[96,96]", "data.num_workers=0")


@pytest.fixture(scope="session")
def make_model() -> Callable[..., None]:
    """``make_model(folder, root=..., classes=...)`` leaves what a training leaves in its ``model`` folder."""

    def make(folder: Path, *, root: Path, classes: Sequence[str]) -> None:
        torch.manual_seed(0)
        overrides = [*SETTINGS, f"data.root={root}", f"detector.num_classes={len(classes)}"]
        config = compose("train", overrides)
        detector: Any = build(config["detector"])
        with torch.no_grad():  # to be sure of something, as a network at its birth is not
            for parameter in detector.head.parameters():
                parameter.normal_(0, 0.5)
        folder.mkdir(parents=True)
        save_file({name: value.contiguous() for name, value in detector.state_dict().items()},
                  folder / "model.safetensors")  # fmt: skip
        card = {
            "config": {"detector": config["detector"], "data": config["data"]},
            "overrides": overrides,
            "classes": list(classes),
            "input_size": [96, 96],
            "threshold": 0.25,
        }
        (folder / "model.json").write_text(json.dumps(card))

    return make


@pytest.fixture(scope="session")
def storage(digits: Path, make_model: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs; the one there is called newborn."""
    folder = tmp_path_factory.mktemp("runs")
    make_model(folder / "newborn" / "model", root=digits, classes=[str(digit) for digit in range(10)])
    return folder
