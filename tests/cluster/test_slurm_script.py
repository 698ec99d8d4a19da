"""Scripts for sbatch: what they ask for, and what does not get into them."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from onestage.cli import main
from onestage.cluster import slurm, slurm_script
from onestage.cluster.queue import overrides_of_job
from onestage.config import compose
from onestage.errors import InputError


def cluster(*overrides: str) -> dict[str, Any]:
    config: dict[str, Any] = compose("train", ["cluster=slurm", *(f"cluster.{one}" for one in overrides)])["cluster"]
    return config


def script(tmp_path: Path, *overrides: str, environment: dict[str, str] | None = None) -> str:
    return slurm_script.script(
        job="train-1124-010203-abcd",
        verb="train",
        first=["train", "name=it's"],
        again=["train"],
        begun="",
        folder=tmp_path,
        cluster=cluster(*overrides),
        environment=environment or {},
    )


def directives(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]


@pytest.mark.parametrize(
    ("overrides", "nodes", "cpus", "gpus"),
    [
        ((), 1, 1, 0),
        (("num_workers=16", "slurm.gpus_per_node=8", "cpus_per_worker=4"), 2, 32, 8),
        (("num_workers=3", "gpus_per_worker=1"), 1, 3, 3),
        (("num_workers=5", "slurm.nodes=2"), 2, 3, 0),
        (("num_workers=5", "slurm.cpus_per_node=2"), 3, 2, 0),
        (("num_workers=4", "gpus_per_worker=0.5", "slurm.gpus_per_node=1"), 2, 2, 1),
    ],
)
def test_it_asks_for_room_for_its_workers(overrides: tuple[str, ...], nodes: int, cpus: int, gpus: int) -> None:
    asked = slurm_script.allocation(cluster(*overrides))
    assert (asked.nodes, asked.cpus, asked.gpus) == (nodes, cpus, gpus)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("num_workers=4", "slurm.nodes=1", "slurm.cpus_per_node=2"), "4 workers of 1 CPUs and 0 GPUs do not fit"),
        (("slurm.nodes=0",), "cluster.slurm.nodes must be at least 1"),
        (("slurm.partition='a b'",), "cluster.slurm.partition='a b' is none"),
        (('slurm.time="1:00\\n#SBATCH --uid=0"',), "cluster.slurm.time="),
        (("slurm.directives=['--reservation=a\\n--uid=0']",), "no --name or --name=value without blanks"),
        (("slurm.directives=['--comment=x']",), "--comment is for onestage to say"),
        (("slurm.modules=['cuda; rm -rf ~']",), "is no module's name"),
        (("slurm.warn_s=5",), "cluster.slurm.warn_s must be from 30"),
    ],
)
def test_what_sbatch_could_misread_is_refused(overrides: tuple[str, ...], told: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as refused:
        script(tmp_path, *overrides)
    assert told in str(refused.value)


def test_the_directives_are_those_of_the_settings(tmp_path: Path) -> None:
    told = directives(
        script(
            tmp_path, "num_workers=4", "slurm.gpus_per_node=2", "slurm.gpu_type=a100", "slurm.partition=gpu",
            "slurm.time=12:00:00", "slurm.memory=64G", "slurm.directives=[--exclusive]", "min_workers=2",
        )
    )  # fmt: skip
    assert {"--nodes=2", "--gres=gpu:a100:2", "--partition=gpu", "--time=12:00:00", "--mem=64G", "--exclusive",
            "--signal=B:USR1@180", "--requeue", "--no-kill", "--cpus-per-task=2"} <= set(told)  # fmt: skip


def test_only_what_is_named_leaves_the_senders_environment_and_no_value_is_in_the_script(tmp_path: Path) -> None:
    environment = {"MLFLOW_TRACKING_PASSWORD": "hush", "MY_TOKEN": "hush", "PATH": "/bin", "CUDA_VISIBLE_DEVICES": "0"}
    text = script(tmp_path, environment=environment)
    assert "--export=MLFLOW_TRACKING_PASSWORD,PATH" in directives(text)
    assert "hush" not in text


@pytest.mark.parametrize("overrides", [(), ("slurm.modules=[cuda/12]", "slurm.within=[apptainer,exec,--nv,a.sif]")])
def test_the_script_is_clean(overrides: tuple[str, ...], tmp_path: Path) -> None:
    shellcheck = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or "shellcheck"
    argv = [shellcheck, "--shell=bash", "-"]
    text = script(tmp_path, *overrides)
    done = subprocess.run(argv, input=text, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


def test_the_job_itself_attaches_to_its_own_ray(tmp_path: Path) -> None:
    config = {"storage": "runs", "cluster": {"kind": "slurm"}}
    given = ["cluster=slurm", "cluster.slurm.time=60", "seed=1"]
    assert overrides_of_job(given, config, here=tmp_path) == [
        "seed=1", f"storage={tmp_path}/runs", "cluster=ray", "cluster.address=auto", "cluster.ship=false"
    ]  # fmt: skip


def test_render_prints_the_script_and_asks_nobody(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["submit", "sweep", "cluster=slurm", "optimizer.lr=1e-3,1e-2", "--render"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("#!/bin/bash\n#SBATCH --job-name=sweep-")
    assert "again=(sweep resume sweep-" in text and "sweep.name=sweep-" in text


def test_a_secret_among_the_overrides_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "train", "cluster=slurm", "data.root=s3://ann:pw@host/coco", "--render"]) == 2
    error = capsys.readouterr().err
    assert "a secret would be in the job's script" in error and "pw" not in error.replace("ann:pw", "")


def test_without_slurm_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["list", "--address", "slurm"]) == 2
    assert "there is no squeue on PATH" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("state", "code", "expected"),
    [
        ("PENDING", None, ("pending", None)),
        ("COMPLETING", None, ("running", None)),
        ("CANCELLED by 0", None, ("stopped", None)),
        ("FAILED", 75, ("stopped", 75)),
        ("FAILED", 1, ("failed", 1)),
        ("TIMEOUT", None, ("failed", None)),
        ("COMPLETED", 0, ("succeeded", 0)),
    ],
)
def test_slurms_states_are_ours(
    state: str, code: int | None, expected: tuple[str, int | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "_folder", lambda job: tmp_path)
    if code is not None:
        (tmp_path / "exit_code").write_text(f"{code}\n")
    note = {"id": "train-1", "submitted": 0.0, "user": "ann", "verb": "train", "command": "", "tracking": ""}
    info = slurm._info(note, {"state": state, "reason": "None"})
    assert (info.state, info.exit_code) == expected
