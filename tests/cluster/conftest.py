"""A small dataset, and the command line as users call it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SETTINGS = [
    "detector.width=0.25",
    "detector.input_size=[96,96]",
    "data.num_workers=0",
    "schedule.warmup_epochs=0.0",
    "trainer.num_pictures=2",
]


@pytest.fixture
def onestage(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Starts `onestage …` in a folder of the test's own, with its own tracking store there."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "RAY_"))}

    def start(*arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "onestage.cli", *arguments],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture
def run_json(onestage: Callable[..., subprocess.Popen[str]]) -> Callable[..., dict[str, Any]]:
    """Runs `onestage … --json` to its end and returns what it printed last."""

    def run(*arguments: str) -> dict[str, Any]:
        process = onestage(*arguments, "--json")
        out, err = process.communicate(timeout=280)
        assert process.returncode == 0, err
        result: dict[str, Any] = json.loads(out.splitlines()[-1])
        return result

    return run
