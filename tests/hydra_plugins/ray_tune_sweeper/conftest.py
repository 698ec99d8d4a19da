"""One Ray of two CPUs for all tests of a module, and the app as its users call it."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra.test_utils.test_utils import TSweepRunner

PLATFORM = Path(__file__).parents[3] / "platform"


def sweeping(runner: TSweepRunner, folder: Path, *overrides: str, task: Callable[..., Any] | None = None) -> Any:
    """A sweep with Hydra's own test configs, foo and bar, in this process: done when its block is entered."""
    return runner(
        calling_file=None,
        calling_module="hydra.test_utils.a_module",
        task_function=task,
        config_path="configs",
        config_name="compose",
        overrides=["hydra/sweeper=ray_tune", *overrides],
        temp_dir=folder,
    )


@pytest.fixture(scope="module")
def own_ray() -> Iterator[str]:
    """Address of a Ray that this process is connected to."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture
def app(own_ray: str, tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Starts the app with ``-m hydra/sweeper=ray_tune`` and further arguments, on the module's Ray."""
    environment = {**os.environ, "RAY_ADDRESS": own_ray, "PYTHONPATH": str(PLATFORM)}

    def start(*arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("app.py")), "-m", "hydra/sweeper=ray_tune", *arguments],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start
