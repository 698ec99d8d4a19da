"""What the tests of several rooms share: detectors built from ``conf/``, Darknet's own numbers, a Darknet of ours."""

import importlib.util
import json
import os
import pwd
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

UNTRAINED = ("detector=yolov3_tiny", "detector.width=0.125", "detector.input_size=[96,96]", "data.num_workers=0")
SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Shards from an address, and marks on local ones, go here rather than to whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONESTAGE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset folder: 24 scenes of digits to train on, 5 to validate, 4 to test."""
    from onestage.data.scenes import draw

    folder = tmp_path_factory.mktemp("data") / "digits"
    draw(folder, seed=1, num_train=24, num_val=5, num_test=4, size=96)
    return folder


@pytest.fixture(scope="session")
def make_model() -> Callable[..., None]:
    """``make_model(folder, root=..., classes=...)`` leaves what a training leaves in its ``model`` folder."""
    import torch
    from safetensors.torch import save_file

    from onestage.config import build, compose

    def make(folder: Path, *, root: Path, classes: Sequence[str], seed: int = 0) -> None:
        torch.manual_seed(seed)
        overrides = [*UNTRAINED, f"data.root={root}", f"detector.num_classes={len(classes)}"]
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
def assert_detections_are_darknets(darknet_refs: ModuleType, shared: Path) -> Callable[..., None]:
    """Asks that on the drawn image a detector finds what Darknet found, ``when`` is "before_nms" or "after_nms"."""

    def compare(detector: Any, name: str, width: int, height: int, when: str) -> None:
        import numpy as np
        import torch

        reference = json.loads((shared / "refs" / "dets" / f"{name}.json").read_text())[f"{width}x{height}"]
        rows = [[*box["box"], *pair] for box in reference[when] for pair in box["cls"]]  # cx cy w h class p
        expected = np.array(rows)
        detector.score_threshold = reference["thresh"]
        detector.nms_iou = reference["nms"] if when == "after_nms" else 1.0
        with torch.no_grad():
            (found,) = detector.detect(detector(torch.from_numpy(darknet_refs.image(name, width, height))[None]))
        half = expected[:, 2:4] / 2
        corners = np.concatenate((expected[:, :2] - half, expected[:, :2] + half), axis=1).clip(0, 1)
        expected = np.column_stack((corners, expected[:, 5], 1000 * expected[:, 4]))
        boxes = found.boxes.numpy() / [width, height, width, height]
        pairs = np.column_stack((boxes, found.scores.numpy(), 1000 * found.labels.numpy()))
        same = abs(pairs[:, None] - expected).max(axis=2) <= 1e-4
        assert same.shape == (len(expected), len(expected))
        assert (same.sum(axis=0) == 1).all() and (same.sum(axis=1) == 1).all()

    return compare


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


@pytest.fixture(scope="session")
def scenes() -> ModuleType:
    """Truths and detections to measure: ``tests/references/scenes.py``."""
    return _module("reference_scenes", Path(__file__).parent / "references" / "scenes.py")


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """The URI, with a password, of an empty database of a PostgreSQL that lives as long as the tests."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    if not folders:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    user: list[str] = []
    if os.getuid() == 0:  # which it refuses to run as
        names = {one.pw_name for one in pwd.getpwall()}
        name = next((one for one in ("postgres", "nobody") if one in names), "")
        if not name or shutil.which("runuser") is None:
            pytest.skip("PostgreSQL does not run as root, and there is no runuser to be somebody else with")
        user = ["runuser", "-u", name, "--"]
    folder = Path(tempfile.mkdtemp(prefix="onestage-pg-"))  # pytest's own folders are closed to others
    if user:
        shutil.chown(folder, name)
    try:
        yield from _postgresql(folders[-1], folder, user)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _postgresql(binaries: Path, folder: Path, user: list[str]) -> Iterator[str]:
    def run(program: str, *words: str) -> None:
        command = [*user, str(binaries / program), *words]
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=120)

    password = secrets.token_hex(12)
    (folder / "password").write_text(password)
    (folder / "password").chmod(0o644)
    port = free_port()
    data = str(folder / "data")
    run("initdb", "-D", data, "-U", "onestage", "--auth=scram-sha-256", f"--pwfile={folder}/password", "--no-sync")
    settings = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories='' -c fsync=off"
    run("pg_ctl", "-D", data, "-o", settings, "-l", str(folder / "log"), "-w", "-t", "60", "start")
    try:
        yield f"postgresql://onestage:{password}@127.0.0.1:{port}/postgres"
    finally:
        run("pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """http://HOST:PORT of an S3 server in a process of its own, which takes any key."""
    command = Path(sys.executable).parent / "moto_server"
    if not command.is_file():
        pytest.skip("moto's server is not installed")
    port = free_port()
    with (tmp_path_factory.mktemp("moto") / "log").open("w") as log:
        process = subprocess.Popen([command, "-H", "127.0.0.1", "-p", str(port)], stdout=log, stderr=log)
    try:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


def free_port() -> int:
    """Of 127.0.0.1."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
