import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from onestage.errors import InputError
from onestage.tracking import client as client_module
from onestage.tracking import runs
from onestage.tracking.client import client


@pytest.fixture
def experiment(request):
    return request.node.name


def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class TestTrackingUri:
    def test_configured_before_environment_before_default(self, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://from-environment:5000")
        assert runs.tracking_uri("http://configured:5000") == "http://configured:5000"
        assert runs.tracking_uri(None) == "http://from-environment:5000"
        monkeypatch.delenv("MLFLOW_TRACKING_URI")
        assert runs.tracking_uri(None) == f"sqlite:///{tmp_path}/mlflow.db"

    def test_local_ones_are_absolute(self, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        assert runs.tracking_uri("sqlite:///some/x.db") == f"sqlite:///{tmp_path}/some/x.db"
        assert runs.tracking_uri("sqlite:////data/x.db") == "sqlite:////data/x.db"
        assert runs.tracking_uri("./mlruns") == f"file://{tmp_path}/mlruns"


class TestCheck:
    def test_closed_port(self):
        uri = f"http://ann:hunter2@127.0.0.1:{closed_port()}"
        began = time.monotonic()
        with pytest.raises(
            InputError, match=r"no MLflow server answers at http://\*\*\*@.*refused.*tracking=none"
        ) as info:
            runs.check(uri)
        assert time.monotonic() - began < 10
        assert "hunter2" not in str(info.value)
        assert "\n" not in str(info.value)

    def test_server_that_accepts_and_never_answers(self, monkeypatch):
        monkeypatch.setattr(client_module, "REACH_TIMEOUT_S", 0.5)
        with socket.socket() as mute:
            mute.bind(("127.0.0.1", 0))
            mute.listen()
            with pytest.raises(InputError, match="timed out"):
                runs.check(f"http://127.0.0.1:{mute.getsockname()[1]}")

    def test_folder_store_says_what_to_do(self, tmp_path):
        with pytest.raises(InputError, match="MLFLOW_ALLOW_FILE_STORE"):
            runs.check(runs.tracking_uri(str(tmp_path / "mlruns")))

    def test_answering_server(self, server):
        runs.check(server.uri)


class TestOpenRun:
    def test_a_run_says_where_it_comes_from(self, store, experiment):
        run_id = runs.open_run(store, experiment, name="first", tags={"sweep": "a", "api_key": "abc"})
        found = runs.find_run(store, run_id)
        assert (found.name, found.experiment, found.status) == ("first", experiment, "RUNNING")
        assert found.tags["onestage.pid"] == str(os.getpid())
        assert found.tags["onestage.host"] == socket.gethostname()
        assert found.tags["sweep"] == "a"
        assert found.tags["api_key"] == "***"
        assert found.tags["mlflow.user"]

    def test_artifacts_lie_beside_the_sqlite_file(self, store, experiment):
        found = runs.find_run(store, runs.open_run(store, experiment, tags={}))
        beside = Path(store.removeprefix("sqlite:///")).parent / "mlruns" / experiment
        assert found.artifact_uri == f"{beside.as_uri()}/{found.run_id}/artifacts"

    def test_a_deleted_experiment_is_said_so(self, store, experiment):
        runs.open_run(store, experiment, tags={})
        client(store).delete_experiment(client(store).get_experiment_by_name(experiment).experiment_id)
        with pytest.raises(InputError, match=r"is deleted .* restore --experiment-id"):
            runs.open_run(store, experiment, tags={})

    def test_leaves_no_active_run(self, store, experiment):
        import mlflow

        runs.open_run(store, experiment, tags={})
        assert mlflow.active_run() is None


class TestEndAndReopen:
    def test_an_ended_run_runs_again(self, store, experiment):
        run_id = runs.open_run(store, experiment, tags={})
        assert runs.end_run(store, run_id, "FAILED", "boom at http://ann:pw@host")
        failed = runs.find_run(store, run_id)
        assert (failed.status, failed.tags["onestage.reason"]) == ("FAILED", "boom at http://***@host")
        runs.reopen_run(store, run_id)
        assert runs.find_run(store, run_id).status == "RUNNING"

    def test_an_unknown_run_names_its_neighbours(self, store, experiment):
        run_id = runs.open_run(store, experiment, tags={})
        with pytest.raises(InputError, match=f"no run '{run_id[:10]}' in .*did you mean {run_id}"):
            runs.reopen_run(store, run_id[:10])

    def test_a_deleted_run_is_said_so(self, store, experiment):
        run_id = runs.open_run(store, experiment, tags={})
        client(store).delete_run(run_id)
        with pytest.raises(InputError, match=f"deleted: .*--run-id {run_id}"):
            runs.find_run(store, run_id)

    def test_ending_without_a_server_is_no_error(self):
        assert not runs.end_run(f"http://127.0.0.1:{closed_port()}", "0" * 32, "FINISHED")


def test_last_unfinished_is_the_newest_that_did_not_finish(store, experiment):
    assert runs.last_unfinished(store, experiment) is None
    first, second, third = (runs.open_run(store, experiment, tags={}) for _ in range(3))
    runs.end_run(store, third, "FINISHED")
    assert runs.last_unfinished(store, experiment) == second
    runs.end_run(store, second, "KILLED")
    assert runs.last_unfinished(store, experiment) == second
    runs.end_run(store, second, "FINISHED")
    assert runs.last_unfinished(store, experiment) == first


def test_a_killed_process_leaves_a_killed_run(store, experiment):
    script = (
        "import sys, time, onestage.tracking.runs as runs\n"
        "assert 'mlflow' not in sys.modules\n"
        f"print(runs.open_run({store!r}, {experiment!r}, tags={{}}), flush=True)\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    theirs = process.stdout.readline().strip()
    mine = runs.open_run(store, experiment, tags={})
    elsewhere = runs.open_run(store, experiment, tags={})
    client(store).set_tag(elsewhere, "onestage.host", "another-host")
    assert runs.mark_dead(store, experiment) == []
    runs.end_run(store, mine, "FINISHED")
    runs.end_run(store, elsewhere, "FINISHED")
    assert runs.last_unfinished(store, experiment) is None  # Theirs is busy.

    process.send_signal(signal.SIGKILL)
    process.wait(timeout=10)
    process.stdout.close()

    assert runs.mark_dead(store, experiment) == [theirs]
    found = runs.find_run(store, theirs)
    assert (found.status, found.tags["onestage.reason"]) == ("KILLED", "its process ended without a word")
    assert runs.last_unfinished(store, experiment) == theirs


def test_mlflow_is_imported_where_it_is_used_alone():
    for file in Path(runs.__file__).parent.glob("*.py"):
        assert not [line for line in file.read_text().splitlines() if line.startswith(("import mlflow", "from mlflow"))]


def test_a_reused_pid_is_seen(store, experiment):
    run_id = runs.open_run(store, experiment, tags={})
    client(store).set_tag(run_id, "onestage.started", "12345.00")
    assert runs.mark_dead(store, experiment) == [run_id]


class TestLogSummary:
    def test_adds_to_the_last_step(self, store, experiment):
        run_id = runs.open_run(store, experiment, tags={})
        client(store).log_metric(run_id, "train/loss", 1.0, step=70)
        runs.log_summary(store, run_id, {"test/ap/cat&dog": 0.25})
        [point] = client(store).get_metric_history(run_id, "test/ap/cat_dog")
        assert (point.value, point.step) == (0.25, 70)

    @pytest.mark.parametrize("run", ["/some/best.ckpt", "models:/cats@champion", "0" * 32])
    def test_what_is_no_run_is_passed_over(self, store, run):
        runs.log_summary(store, run, {"test/map": 0.25})


class TestDownload:
    def test_an_artifact(self, store, experiment, tmp_path):
        run_id = runs.open_run(store, experiment, tags={})
        client(store).log_text(run_id, "hello", "notes/hello.txt")
        assert runs.download(store, run_id, "notes/hello.txt", tmp_path / "to").read_text() == "hello"

    def test_what_is_missing_is_listed_against(self, store, experiment, tmp_path):
        run_id = runs.open_run(store, experiment, tags={})
        client(store).log_text(run_id, "hello", "notes/hello.txt")
        with pytest.raises(InputError, match=r"no artifact 'plots'.*\['notes'\]"):
            runs.download(store, run_id, "plots", tmp_path)
        with pytest.raises(InputError, match=r"no artifact 'notes/bye.txt'.*\['notes/hello.txt'\]"):
            runs.download(store, run_id, "notes/bye.txt", tmp_path)

    @pytest.mark.parametrize("model", ["models:/none@champion", "models:/none/3", "models:/m-123"])
    def test_unknown_models(self, store, model, tmp_path):
        with pytest.raises(InputError, match="no model"):
            runs.download_model(store, model, tmp_path)

    def test_malformed_model(self, store, tmp_path):
        with pytest.raises(InputError, match="models:/NAME@ALIAS"):
            runs.download_model(store, "models:/none", tmp_path)

    def test_a_run_without_a_model(self, store, experiment, tmp_path):
        with pytest.raises(InputError, match="has logged no model"):
            runs.download_model(store, runs.open_run(store, experiment, tags={}), tmp_path)
