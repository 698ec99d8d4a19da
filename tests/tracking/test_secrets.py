"""A password in the tracking address, on the command line: it is used, and comes to rest nowhere."""

import json
import os
import subprocess
import sys

import pytest

from onestage.tracking import runs
from onestage.tracking.leaderboard import entries

SECRET = "hunter2pass"
SMALL = [
    "detector.width=0.125",
    "detector.input_size=[64,64]",
    "augment=none",
    "data.num_workers=0",
    "data.batch_size=4",
    "trainer.num_pictures=0",
    "trainer.max_steps=2",
    "cluster.cpus_per_worker=1",
]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("verb", [["train", "cluster=none"], ["sweep", "sweep.name=one", "seed=1,2"]])
def test_is_in_no_file_no_run_and_no_output(server, digits, tmp_path, verb):
    uri = f"http://ann:{SECRET}@127.0.0.1:{server.port}"
    experiment = f"secrets of {verb[0]}"
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "RAY_"))}
    command = [sys.executable, "-m", "onestage.cli", *verb, f"data.root={digits}", *SMALL]
    command += [f"tracking.uri={uri}", f"tracking.experiment={experiment}", "+extra.api_token=sk-0123", "--json"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    expected = 1 if verb[0] == "train" else 2
    assert len(told.get("runs", [told])) == expected
    [*_, newest] = [one.run_id for one in entries(server.uri, experiment)]
    assert runs.find_run(server.uri, newest).status == "FINISHED"
    assert SECRET not in done.stdout + done.stderr
    assert [path for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()] == []
    assert [path for path in server.folder.rglob("*") if path.is_file() and _holds_any(path)] == []


def _holds_any(path):
    content = path.read_bytes()
    return SECRET.encode() in content or b"sk-0123" in content
