"""Jobs: what goes to the cluster, and what a job that was sent there does."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from onestage.cluster import jobs, local_cluster
from onestage.cluster.local_cluster import LocalCluster
from onestage.errors import InputError

from .conftest import SETTINGS

CLUSTER = {"env": ["MLFLOW_*", "NAMED"], "ship": False}


def test_only_the_named_variables_go_along() -> None:
    environment = {
        "MLFLOW_TRACKING_URI": "http://h",
        "NAMED": "1",
        "NAMED_NOT": "2",
        "RAY_AUTH_TOKEN": "t",
        "PATH": "p",
    }
    assert jobs.runtime_env(CLUSTER, driver_env=environment) == {
        "env_vars": {"MLFLOW_TRACKING_URI": "http://h", "NAMED": "1"}
    }


def test_a_shipped_package_is_a_folder_of_that_name() -> None:
    [folder] = jobs.runtime_env({**CLUSTER, "ship": True}, driver_env={})["py_modules"]
    assert Path(folder).name == "onestage" and (Path(folder) / "conf" / "train.yaml").is_file()


def test_a_job_ships_nothing_again() -> None:
    assert jobs.runtime_env({**CLUSTER, "ship": True}, driver_env={"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}) == {}


def test_addresses_stay_and_paths_become_absolute(tmp_path: Path) -> None:
    config = {"storage": "s3://bucket/runs", "cluster": {"kind": "ray"}}
    given = ["data.root=s3://bucket/coco", "detector.weights=w/yolo.weights", "tracking.uri=http://ann:pw@host"]
    assert jobs.overrides_of_job("evaluate", given, config, here=tmp_path) == [
        "data.root=s3://bucket/coco", f"detector.weights={tmp_path}/w/yolo.weights", "storage=s3://bucket/runs"
    ]  # fmt: skip


def test_an_address_to_attach_to_takes_no_jobs() -> None:
    with pytest.raises(InputError, match="takes no jobs"):
        jobs.address_of("host:6379")


def test_a_server_that_is_away_is_one_line() -> None:
    with pytest.raises(InputError, match=r"no Ray dashboard at http://127\.0\.0\.1:9"):
        jobs.jobs(address="http://127.0.0.1:9")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONESTAGE_CACHE", str(tmp_path_factory.mktemp("cache")))
        started = local_cluster.up("jobs", workers=1, cpus=2)
        yield started
        started.down()


def run(cluster: LocalCluster, folder: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "RAY_"))}
    environment |= {k: v for k, v in cluster.environment.items() if k != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "onestage.cli", *words, "--address", cluster.dashboard]
    return subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=250, check=False
    )


@pytest.mark.slow
def test_a_training_is_sent_followed_and_listed(cluster: LocalCluster, digits: Path, tmp_path: Path) -> None:
    settings = [*SETTINGS, f"data.root={digits}", "trainer.max_epochs=1", "data.batch_size=8"]
    done = run(cluster, tmp_path, "submit", "train", *settings, "--follow")
    assert done.returncode == 0, done.stdout + done.stderr
    job = done.stdout.splitlines()[0]
    assert "val/map" in run(cluster, tmp_path, "logs", job).stdout
    assert job in run(cluster, tmp_path, "list").stdout
    unknown = run(cluster, tmp_path, "status", job[:-1])
    assert unknown.returncode == 2 and unknown.stderr.strip().endswith(f"did you mean {job}?")
