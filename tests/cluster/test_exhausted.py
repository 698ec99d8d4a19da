"""Memory and object stores that are used up: named with the host and a remedy, and no endless tries."""

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from onestage.cluster.memory import oom_kills, ran_out

from .conftest import SETTINGS

Start = Callable[..., subprocess.Popen[str]]

CGROUPS = (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/cgroup.procs"))
MIB = 2**20


def raised_from(cause: BaseException) -> RuntimeError:
    error = RuntimeError("the training function failed")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (WorkerHealthCheckFailedError("", OutOfMemoryError("low")), "Ray's memory monitor ended"),
        (WorkerHealthCheckFailedError("", ActorDiedError()), None),
        (raised_from(MemoryError()), "an allocation failed in"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            "an allocation failed in",
        ),
        (RuntimeError("no such file"), None),
    ],
)
def test_who_found_the_memory_too_small(failure: BaseException, told: str | None) -> None:
    assert ran_out(failure) == told


def test_the_kernels_count_is_read() -> None:
    assert oom_kills() == int(subprocess.check_output(["awk", '$1 == "oom_kill" {print $2}', "/proc/vmstat"]))


def history(folder: Path) -> list[dict[str, Any]]:
    with suppress(FileNotFoundError, ValueError):
        (file,) = folder.glob("runs/*/history.jsonl")
        return [json.loads(line) for line in file.read_text().splitlines()]
    return []


@pytest.mark.slow
def test_an_allocation_that_fails_twice_at_the_same_step_ends_the_training(
    onestage: Start, digits: Path, tmp_path: Path
) -> None:
    train = ["train", "cluster=local", "cluster.num_workers=2", "cluster.backoff_s=0.1", "tracking=none"]
    process = onestage(*train, f"data.root={digits}", *SETTINGS, "detector.width=10000")
    _, err = process.communicate(timeout=280)
    assert process.returncode == 1, err
    (end,) = (line for line in err.splitlines() if line.startswith("onestage: failed"))
    assert "out of memory on " in end and "an allocation failed in worker" in end and "twice at the same step" in end
    assert "lower data.num_workers or data.batch_size" in end
    assert [event["event"] for event in history(tmp_path)] == ["lost", "restart", "failed"]


@pytest.fixture
def tiny_cgroup() -> Iterator[Path]:
    """A memory cgroup of 1 MiB: who is moved into it is ended by the kernel as soon as it takes more."""
    old, new = CGROUPS
    parent = old.parent if old.is_file() else new.parent
    group = parent / f"onestage-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if old.is_file() else "memory.max")).write_text(str(MIB))
    except OSError as error:
        with suppress(OSError):
            group.rmdir()
        pytest.skip(f"no memory cgroup can be made here: {error}")
    yield group
    end = time.monotonic() + 30
    while group.is_dir() and time.monotonic() < end:  # busy until the last process is gone
        with suppress(OSError):
            group.rmdir()
        time.sleep(0.1)


@pytest.mark.slow
def test_a_worker_that_the_kernel_ends_for_want_of_memory_is_named_so(
    onestage: Start, digits: Path, tmp_path: Path, tiny_cgroup: Path
) -> None:
    train = ["train", "cluster=local", "cluster.num_workers=2", "cluster.backoff_s=0.1", "tracking=none"]
    process = onestage(*train, f"data.root={digits}", *SETTINGS, "trainer.max_epochs=100", "data.batch_size=4")
    wait(process, lambda: "started" in [event["event"] for event in history(tmp_path)])
    workers = [one for one in psutil.Process(process.pid).children(recursive=True) if is_train_worker(one)]
    (tiny_cgroup / "cgroup.procs").write_text(str(workers[1].pid))
    wait(process, lambda: "lost" in [event["event"] for event in history(tmp_path)])
    process.kill()
    process.communicate()
    (lost,) = (event["why"] for event in history(tmp_path) if event["event"] == "lost")
    assert lost.startswith("out of memory on ") and "the kernel ended a process there" in lost
    assert "lower data.num_workers or data.batch_size" in lost


def wait(process: subprocess.Popen[str], done: Callable[[], bool]) -> None:
    end = time.monotonic() + 150
    while not done():
        assert process.poll() is None and time.monotonic() < end, process.communicate(timeout=1)
        time.sleep(0.2)


def is_train_worker(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        return any("RayTrainWorker" in word for word in process.cmdline())
    return False
