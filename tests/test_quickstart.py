"""The README's first command: interrupted and called again, it ends with what it promises."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_interrupted_and_called_again_it_keeps_its_promises(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "RAY_"))} | {
        "HOME": str(tmp_path)
    }
    command = [sys.executable, "-m", "onestage.cli", "quickstart"]
    first = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 300
    while not (checkpoints := list(tmp_path.glob("quickstart/runs/*/checkpoints/last.ckpt"))):
        assert first.poll() is None, first.communicate()[1]
        assert time.monotonic() < end, "no checkpoint within five minutes"
        time.sleep(0.2)
    first.send_signal(signal.SIGINT)
    _, said = first.communicate(timeout=60)
    assert first.returncode == 130
    assert "goes on from the last checkpoint" in said

    second = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert second.returncode == 0, second.stderr
    run_id = checkpoints[0].parent.parent.name
    assert f"going on with run {run_id}" in second.stderr
    assert "onestage dashboard tracking.uri=" in second.stdout

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["val/map_50"] >= 0.90
    assert run.data.metrics["test/map_50"] >= 0.85
    assert {"train/loss", "train/loss/box", "train/loss/objectness", "train/loss/class"} <= set(run.data.metrics)
    assert {"images", "predictions"} <= {one.path for one in client.list_artifacts(run_id)}
    assert run.outputs is not None
    assert run.outputs.model_outputs
    pictures = list((tmp_path / "quickstart" / "predictions").glob("*.jpg"))
    results = json.loads((tmp_path / "quickstart" / "predictions" / "predictions.json").read_text())
    assert len(pictures) == 12
    assert len(results) > 12
