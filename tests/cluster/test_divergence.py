"""A training that diverges, as its user sees it: one line, an exit code, a FAILED run, and a batch to replay."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from .conftest import SETTINGS


@pytest.mark.slow
@pytest.mark.parametrize("workers", [["cluster=none"], ["cluster=local", "cluster.num_workers=2"]])
def test_a_training_that_diverges_ends_in_one_line(
    onestage: Callable[..., subprocess.Popen[str]], digits: Path, tmp_path: Path, workers: list[str]
) -> None:
    # The first step leaves weights of about 1e30, finite still; with them the second step's loss is not.
    ruinous = ["optimizer.lr=1e30", "checkpoint.every_steps=1", "data.batch_size=4", "trainer.max_epochs=3"]
    process = onestage("train", *workers, f"data.root={digits}", *SETTINGS, *ruinous, "--json")
    out, err = process.communicate(timeout=280)
    assert process.returncode == 1, err
    result = json.loads(out.splitlines()[-1])
    assert result["status"] == "FAILED"
    (line,) = (one for one in err.splitlines() if one.startswith("onestage: failed:"))
    assert "step 1: the loss is " in line
    assert f"go on with: onestage train resume={result['run_id']} optimizer.lr=<lower>" in err
    assert "Traceback" not in err

    folder = tmp_path / "runs" / result["run_id"]
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 1
    assert all(value.isfinite().all() for value in saved["state_dict"].values())
    files = sorted((folder / "bad_batch").iterdir())
    assert [file.name for file in files] == [f"step-1-rank-{rank}.safetensors" for rank in range(len(workers))]
    assert all(f"onestage replay {file}" in line for file in files)

    from mlflow import MlflowClient

    run = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}").get_run(result["run_id"])
    assert run.info.status == "FAILED"

    replayed = onestage("replay", str(files[-1]), "--json")
    told = json.loads(replayed.communicate(timeout=250)[0])
    assert not told["batch"]["finite"]
    assert len(told["images"]) == 4
