"""Runs that have a model but never trained: their detections are many and wrong, which is what the tests want."""

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def storage(digits: Path, make_model: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs; the one there is called newborn."""
    folder = tmp_path_factory.mktemp("runs")
    make_model(folder / "newborn" / "model", root=digits, classes=[str(digit) for digit in range(10)])
    return folder
