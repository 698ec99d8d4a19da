"""A run's files outlive the machine: in a folder that all see, or at an address."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
import torch

from onestage.cluster import storage
from onestage.cluster.storage import RunFolder, check_storage, marked, same_place
from onestage.errors import InputError
from onestage.training.checkpoint_files import step_of
from onestage.training.checkpoints import Writer


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this machine keeps what lies at an address; another is another machine."""
    monkeypatch.setenv("ONESTAGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def memory() -> str:
    return f"memory://{uuid4().hex}/runs"


def write(run: RunFolder, writer: Writer, step: int, *, best: bool = False) -> None:
    state = {"global_step": step, "state_dict": {"weight": torch.full((500,), float(step))}}
    writer.save_checkpoint(state, None, storage_options={"best": best})
    assert writer.wait() and writer.notes == []


def writer_of(run: RunFolder, *, keep: int = 2) -> Writer:
    return Writer(run.checkpoints, keep=keep, send=lambda: run.send_checkpoints(keep=keep))


def elsewhere(address: str, monkeypatch: pytest.MonkeyPatch, cache: Path) -> RunFolder:
    """The same run as a machine that has nothing of it sees it."""
    monkeypatch.setenv("ONESTAGE_CACHE", str(cache.parent / uuid4().hex))
    return RunFolder(address, "run")


class TestFolder:
    def test_is_where_everybody_reads_and_writes(self, tmp_path: Path) -> None:
        run = RunFolder(str(tmp_path / "runs"), "run")
        assert run.local == tmp_path / "runs" / "run"
        assert run.fetch_checkpoint(print) is None
        write(run, writer_of(run), 3)
        assert run.fetch_checkpoint(print) == tmp_path / "runs" / "run" / "checkpoints" / "last.ckpt"


class TestAddress:
    def test_works_in_a_folder_of_its_own(self, memory: str, cache: Path) -> None:
        assert RunFolder(memory, "run").local == cache / "runs" / "run"

    def test_another_machine_goes_on_from_the_newest(
        self, memory: str, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = RunFolder(memory, "run")
        writer = writer_of(run)
        write(run, writer, 1, best=True)
        write(run, writer, 2)
        there = elsewhere(memory, monkeypatch, cache)
        found = there.fetch_checkpoint(print)
        assert found is not None and found == there.checkpoints / "last.ckpt" and step_of(found) == 2
        assert step_of(there.checkpoints / "best.ckpt") == 1

    def test_the_last_k_are_there_and_no_others(self, memory: str, cache: Path) -> None:
        run = RunFolder(memory, "run")
        writer = writer_of(run, keep=3)
        for step in (1, 2, 3, 4, 5):
            write(run, writer, step)
        assert sorted(run._names_there()) == ["last-3.ckpt", "last-4.ckpt", "last.ckpt"]
        for name, step in (("last-3.ckpt", 3), ("last-4.ckpt", 4), ("last.ckpt", 5)):
            found = run.fetch(f"checkpoints/{name}")
            assert found is not None and step_of(found) == step

    def test_a_damaged_newest_is_passed_over_and_named(
        self, memory: str, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = RunFolder(memory, "run")
        writer = writer_of(run)
        write(run, writer, 1)
        write(run, writer, 2)
        files, root = run._connection()
        content = files.cat_file(f"{root}/checkpoints/last.ckpt")
        files.pipe_file(f"{root}/checkpoints/last.ckpt", content[: len(content) // 2])
        told: list[str] = []
        found = elsewhere(memory, monkeypatch, cache).fetch_checkpoint(told.append)
        assert found is not None and step_of(found) == 1
        assert len(told) == 1 and f"{memory}/run/checkpoints/last.ckpt is damaged" in told[0]

    def test_a_new_process_on_another_machine_writes_on(
        self, memory: str, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = RunFolder(memory, "run")
        write(run, writer_of(run), 1)
        there = elsewhere(memory, monkeypatch, cache)
        there.fetch_checkpoint(print)
        write(there, writer_of(there), 2)
        assert sorted(there._names_there()) == ["last-1.ckpt", "last.ckpt"]

    def test_folders_and_files_are_sent_and_fetched(
        self, memory: str, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = RunFolder(memory, "run")
        (run.local / "model" / "deep").mkdir(parents=True)
        (run.local / "model" / "deep" / "a.json").write_text("{}")
        (run.local / "config.json").write_text("[1]")
        run.send(run.local / "model")
        run.send(run.local / "config.json")
        there = elsewhere(memory, monkeypatch, cache)
        for name, text in (("model/deep/a.json", "{}"), ("config.json", "[1]")):
            found = there.fetch(name)
            assert found is not None and found.read_text() == text
        assert there.fetch("none.json") is None

    def test_a_store_that_takes_half_is_found_out(self, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
        run = RunFolder(memory, "run")
        files, _ = run._connection()

        def half(local: str, there: str) -> None:
            content = Path(local).read_bytes()
            files.pipe_file(there, content[: len(content) // 2])

        monkeypatch.setattr(files, "put_file", half)
        writer = writer_of(run)
        writer.save_checkpoint({"global_step": 1, "state_dict": {}}, None)
        assert writer.wait()
        (note,) = writer.notes
        assert "has" in note and "bytes there, not" in note
        assert step_of(run.checkpoints / "last.ckpt") == 1, "here it is whole"


class TestCheck:
    def test_leaves_nothing_behind(self, tmp_path: Path, memory: str) -> None:
        check_storage(str(tmp_path / "runs"))
        assert list((tmp_path / "runs").iterdir()) == []
        check_storage(memory)

    def test_names_host_and_remedy(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(InputError, match=f"can't be used on {socket.gethostname()} .*: mend it.*set storage="):
            check_storage(str(tmp_path / "file"))

    def test_a_password_is_not_shown(self) -> None:
        with pytest.raises(InputError) as raised:
            check_storage("nostore://ann:hunter2@host/runs?sig=abc")
        assert "hunter2" not in str(raised.value) and "abc" not in str(raised.value)

    def test_a_store_that_does_not_answer(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(storage, "CHECK_S", 0.2)
        monkeypatch.setattr(Path, "open", lambda *_: time.sleep(2))
        with pytest.raises(InputError, match=r"no answer in 0\.2 s"):
            check_storage(str(tmp_path))


class TestSamePlace:
    def test_the_same_folder_is(self, tmp_path: Path) -> None:
        with marked(str(tmp_path)) as token:
            same_place(str(tmp_path), token)
        assert list(tmp_path.iterdir()) == []

    def test_another_of_that_name_is_refused(self, tmp_path: Path) -> None:
        with (
            marked(str(tmp_path / "a")) as token,
            pytest.raises(InputError, match=r"is not the folder that the driver .*network file system"),
        ):
            same_place(str(tmp_path / "b"), token)

    def test_an_address_is_the_same_everywhere(self, memory: str) -> None:
        with marked(memory) as token:
            same_place(memory, token)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """A bucket of an S3 server of its own process, which the environment says how to reach."""
    boto3 = pytest.importorskip("boto3")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = Path(sys.executable).parent / "moto_server"
    if not command.is_file():
        pytest.skip("moto's server is not installed")
    with (tmp_path / "moto.log").open("w") as log:
        process = subprocess.Popen([command, "-H", "127.0.0.1", "-p", str(port)], stdout=log, stderr=log)
    try:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "hunter2",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }.items():
            monkeypatch.setenv(name, value)
        end = time.monotonic() + 60
        while time.monotonic() < end:
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        boto3.client("s3").create_bucket(Bucket="trainings")
        yield "s3://trainings/runs"
    finally:
        process.terminate()
        process.wait(10)


@pytest.mark.slow
def test_on_s3(bucket: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_storage(bucket)
    run = RunFolder(bucket, "run")
    writer = writer_of(run)
    for step in (1, 2, 3):
        write(run, writer, step, best=step == 2)
    there = elsewhere(bucket, monkeypatch, cache)
    found = there.fetch_checkpoint(print)
    assert found is not None and step_of(found) == 3
    assert step_of(there.checkpoints / "best.ckpt") == 2
    assert sorted(there._names_there()) == ["best.ckpt", "last-2.ckpt", "last.ckpt"]
    with pytest.raises(InputError, match="can't be used on"):
        check_storage("s3://no-such-bucket/runs")
