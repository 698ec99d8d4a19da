"""What the tests of several rooms share: detectors built from ``conf/``, Darknet's own numbers, a Darknet of ours."""

import importlib.util
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

SHARED = Path(__file__).parents[2] / "shared"


def _module(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


class Reference(NamedTuple):
    """Darknet once more, in plain terms and without a line of the package: ``tests/references``."""

    nets: ModuleType
    darknet: ModuleType
    losses: ModuleType


@pytest.fixture(scope="session")
def reference() -> Reference:
    folder = Path(__file__).parent / "references"
    return Reference(*(_module(f"reference_{name}", folder / f"{name}.py") for name in Reference._fields))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder beside the repository that holds references too large or too foreign for it."""
    if not (SHARED / "refs").is_dir():
        pytest.skip(f"no references: {SHARED / 'refs'} is not here")
    return SHARED


@pytest.fixture(scope="session")
def darknet_refs(shared: Path) -> ModuleType:
    """The generator of deterministic weights, images and head maps that Darknet was run on."""
    return _module("darknet_refs", shared / "refs" / "weights.py")


@pytest.fixture(scope="session")
def tiny_weights(darknet_refs: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ``.weights`` file for yolov3-tiny with 80 classes, not written by the code under test."""
    path: Path = tmp_path_factory.mktemp("weights") / "yolov3-tiny.weights"
    darknet_refs.write("yolov3-tiny", path)
    return path


@cache
def _node(name: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    from onestage.config import compose

    node: dict[str, Any] = compose("train", [f"detector={name}", *(f"detector.{one}" for one in overrides)])["detector"]
    return node


@pytest.fixture(scope="session")
def make_detector() -> Callable[..., Any]:
    """``make_detector("yolov3", "width=0.125")``: a detector as a user's overrides would build it, seeded."""

    def make(name: str, *overrides: str) -> Any:
        import torch

        from onestage.config import build

        torch.manual_seed(0)
        return build(_node(name, overrides))

    return make
