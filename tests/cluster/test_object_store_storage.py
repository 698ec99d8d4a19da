"""A training whose Ray workers save to an s3:// address, from where a machine that has nothing goes on."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from onestage.cluster import local_cluster
from onestage.training.checkpoints import step_of

from .conftest import SETTINGS
from .test_storage import bucket  # noqa: F401

boto3 = pytest.importorskip("boto3")

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def onestage(tmp_path: Path, bucket: str, digits: Path) -> Iterator[Start]:  # noqa: F811
    """`onestage train … cluster=ray` from a ``machine`` with a cache of its own; nodes have a login's environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONESTAGE_CACHE", str(tmp_path / "clusters"))
        cluster = local_cluster.up("s3", workers=1, cpus=2)
        try:

            def start(machine: str, *overrides: str) -> subprocess.Popen[str]:
                (tmp_path / machine).mkdir(exist_ok=True)
                command = [sys.executable, "-m", "onestage.cli", "train", f"storage={bucket}", f"data.root={digits}"]
                command += ["cluster=ray", "cluster.num_workers=2", "cluster.ship=false", "tracking=none", "--json"]
                return subprocess.Popen(
                    [*command, "data.batch_size=4", "checkpoint.every_steps=1", *SETTINGS, *overrides],
                    cwd=tmp_path / machine,
                    env=os.environ | cluster.environment | {"ONESTAGE_CACHE": str(tmp_path / machine)},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )

            yield start
        finally:
            cluster.down()


def in_bucket() -> list[str]:
    listed = boto3.client("s3").list_objects_v2(Bucket="trainings")
    return [one["Key"] for one in listed.get("Contents", [])]


@pytest.mark.slow
def test_a_machine_that_has_nothing_goes_on_from_the_bucket(onestage: Start, tmp_path: Path) -> None:
    first = onestage("one", "trainer.max_epochs=500")
    end = time.monotonic() + 150
    while not any(key.endswith("/checkpoints/last.ckpt") for key in in_bucket()):
        assert first.poll() is None and time.monotonic() < end, first.communicate(timeout=1)
        time.sleep(0.5)
    first.kill()
    first.communicate()
    (checkpoint,) = (key for key in in_bucket() if key.endswith("/checkpoints/last.ckpt"))
    run_id = checkpoint.split("/")[1]

    boto3.client("s3").download_file("trainings", checkpoint, str(tmp_path / "seen.ckpt"))
    reached = step_of(tmp_path / "seen.ckpt")
    out, err = (second := onestage("two", f"resume={run_id}", f"trainer.max_steps={reached + 30}")).communicate(
        timeout=250
    )
    assert second.returncode == 0, err
    result: dict[str, Any] = json.loads(out.splitlines()[-1])
    assert (result["run_id"], result["status"]) == (run_id, "FINISHED")
    history = (tmp_path / "two" / "runs" / run_id / "history.jsonl").read_text().splitlines()
    started = json.loads(history[0])
    assert started["event"] == "started" and reached <= started["step"] < reached + 30
    assert {f"runs/{run_id}/{name}" for name in ("config.json", "model/model.safetensors")} <= set(in_bucket())


@pytest.mark.slow
def test_workers_that_may_not_write_there_refuse_before_they_train(onestage: Start) -> None:
    """The driver may; its credentials are kept from the workers."""
    process = onestage("one", "trainer.max_epochs=1", "cluster.env=[AWS_ENDPOINT_URL,AWS_EC2_METADATA_DISABLED]")
    _, err = process.communicate(timeout=250)
    assert process.returncode == 2, err
    assert "Traceback" not in err
    assert "storage=s3://trainings/runs can't be used on " in err
    assert not any("checkpoints" in key for key in in_bucket())
