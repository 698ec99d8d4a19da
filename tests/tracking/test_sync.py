"""What a training left on disk, and `onestage sync`."""

import json
import re

import pytest

from onestage.cli import main
from onestage.errors import InputError
from onestage.tracking import runs, sync
from onestage.tracking.client import client
from onestage.tracking.mlflow_tracker import MlflowTracker
from onestage.tracking.spool import open_spool


@pytest.fixture
def experiment(request):
    return re.sub(r"\W", "-", request.node.name)


@pytest.fixture
def dead(store, experiment, tmp_path):
    """Makes the folder of a run whose driver died while the store was away; at the full rate or a point a second."""

    def leave(name, *, every_s=0.0, uri=None, steps=40):
        run_id = runs.open_run(store, experiment, name=name, tags={})
        client(store).set_tag(run_id, "onestage.pid", "1")
        client(store).set_tag(run_id, "onestage.started", "12345.00")
        folder = tmp_path / "runs" / run_id / "spool"
        tracker = MlflowTracker(uri="http://127.0.0.1:9", run_id=run_id, folder=folder, every_s=every_s)
        for step in range(steps):
            tracker.log_metrics({"train/loss": float(step)}, step)
        tracker.set_tags({"phase": "end"})
        assert not tracker.close(0)
        told = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps(told | {"uri": uri or store}))
        return run_id, folder

    return leave


@pytest.fixture(autouse=True)
def _patience(monkeypatch):
    monkeypatch.setattr(sync, "PATIENCE_S", 0.5)


def history(store, run_id):
    return [(point.step, point.value) for point in client(store).get_metric_history(run_id, "train/loss")]


def test_everything_arrives_once_and_the_dead_are_marked(store, dead):
    run_id, folder = dead("one")
    heard = []
    found = sync.sync(folder, tell=lambda done, total: heard.append((done, total)))
    assert (found.state, found.metrics, found.items) == ("arrived", 40, 1)
    assert history(store, run_id) == [(step, step) for step in range(40)]
    run = runs.find_run(store, run_id)
    assert (run.status, run.tags["phase"]) == ("KILLED", "end")
    assert run.tags["onestage.reason"] == "its process ended without a word"
    assert sync.sync(folder).state == "nothing"
    assert len(history(store, run_id)) == 40


def test_averages_as_the_training_would_have(store, dead):
    run_id, folder = dead("one", every_s=1000.0)
    assert sync.sync(folder).state == "arrived"
    points = history(store, run_id)
    assert len(points) <= 2 and points[-1][0] == 39  # a second window, should a thousand seconds just be full
    before = -1
    for step, value in points:
        assert value == pytest.approx((before + 1 + step) / 2)  # the mean of the steps since the point before
        before = step


def test_how_a_run_ended_is_told_though_it_was_marked_dead(store, experiment, tmp_path):
    """The store was away when the training finished; meanwhile another command saw that its process was gone."""
    run_id = runs.open_run(store, experiment, tags={})
    folder = tmp_path / "spool"
    sync.keep_ending(folder, uri=store, run_id=run_id, status="FINISHED", reason=None)
    runs.end_run(store, run_id, "KILLED", "its process ended without a word")
    told = json.loads((folder / "ending.json").read_text())
    assert sync.sync(folder).state == "arrived"
    run = client(store).get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.info.end_time == told["time"]
    assert "onestage.reason" not in run.data.tags
    assert sync.sync(folder).state == "nothing"


def test_the_end_of_a_former_life_is_not_told(store, experiment, tmp_path):
    run_id = runs.open_run(store, experiment, tags={})
    sync.keep_ending(tmp_path, uri=store, run_id=run_id, status="FAILED", reason="boom")
    client(store).set_tag(run_id, "onestage.started", "17.00")  # another process has gone on with it, and is gone
    assert sync.sync(tmp_path).state == "arrived"
    assert "boom" not in runs.find_run(store, run_id).tags["onestage.reason"]


def test_what_a_training_still_logs_is_its_own(store, dead, tmp_path):
    run_id = runs.open_run(store, "busy", tags={})
    spool = open_spool(uri=store, run_id=run_id, folder=tmp_path / "spool")
    assert "still logs through" in sync.sync(tmp_path / "spool").reason
    spool.close(0)
    run_id, folder = dead("elsewhere")  # whose lock a network file system may not show here
    client(store).set_tag(run_id, "onestage.host", "far")
    found = sync.sync(folder)
    assert (found.state, found.reason) == ("busy", "the run's driver is alive on far: it sends by itself")


@pytest.mark.parametrize(
    ("uri", "why"), [("http://127.0.0.1:9", "no MLflow server answers"), (None, "is deleted: bring it back")]
)
def test_what_can_not_be_sent_waits_with_its_reason(store, dead, uri, why):
    run_id, folder = dead("one", uri=uri)
    if uri is None:
        client(store).delete_run(run_id)
    found = sync.sync(folder)
    assert found.state == "waits" and why in found.reason and "\n" not in found.reason
    assert sync.left_in(folder).metrics == 40


def test_a_store_that_answers_and_takes_nothing_is_given_up(store, dead, proxy, monkeypatch):
    monkeypatch.setattr(runs, "check", lambda uri: None)
    monkeypatch.setattr(runs, "find_run", lambda uri, run_id: found)
    run_id, folder = dead("one", uri=proxy.uri)
    found = runs.FoundRun(
        run_id=run_id, name="", experiment="", status="KILLED", artifact_uri="", params={}, tags={}, metrics={}
    )
    proxy.failing = True
    told = sync.sync(folder, patience_s=0.5)
    assert told.state == "waits" and "500" in told.reason


class TestCommand:
    @pytest.fixture(autouse=True)
    def _here(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def test_sends_all_of_the_storage(self, store, dead, capsys):
        ids = [dead(name)[0] for name in ("one", "two")]
        assert main(["sync"]) == 0
        out = capsys.readouterr().out
        assert sorted(out.splitlines()) == sorted(
            f"{run_id}  arrived: 40 calls of metrics, 1 other items" for run_id in ids
        )
        assert [len(history(store, run_id)) for run_id in ids] == [40, 40]
        assert main(["sync"]) == 0
        assert capsys.readouterr().out == "nothing waits, in 2 runs\n"

    def test_sends_one_run_by_its_id_or_its_folder(self, store, dead, capsys):
        (first, _), (second, folder) = dead("one"), dead("two")
        assert main(["sync", first, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["arrived"] and [one["run_id"] for one in told["runs"]] == [first]
        assert history(store, second) == []
        assert main(["sync", str(folder.parent)]) == 0
        assert len(history(store, second)) == 40

    def test_sends_what_other_machines_of_a_run_left(self, store, dead, capsys):
        (run_id, folder), (_, other) = dead("one"), dead("two")
        told = json.loads((other / "run.json").read_text())
        (other / "run.json").write_text(json.dumps(told | {"run_id": run_id}))
        lines = (other / "metrics.jsonl").read_text().replace("train/loss", "system/b/cpu")
        (other / "metrics.jsonl").write_text(lines)
        other.rename(folder.parent / "spool-b")
        assert main(["sync", run_id, "--json"]) == 0
        assert [one["state"] for one in json.loads(capsys.readouterr().out)["runs"]] == ["arrived", "arrived"]
        assert len(client(store).get_metric_history(run_id, "system/b/cpu")) == 40

    def test_says_in_one_line_what_waits_and_fails(self, dead, capsys):
        run_id, _ = dead("one", uri="http://ann:hunter2@127.0.0.1:9")
        assert main(["sync", "--json"]) == 1
        captured = capsys.readouterr()
        assert json.loads(captured.out)["arrived"] is False
        assert main(["sync"]) == 1
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith(f"{run_id}  waits: 40 calls of metrics, 1 other items, in ")
        assert "no MLflow server answers at http://" in line and "hunter2" not in line + captured.out

    def test_goes_to_another_store_where_one_is_named(self, store, dead):
        run_id, _ = dead("one", uri="http://127.0.0.1:9")
        assert main(["sync", f"tracking.uri={store}"]) == 0
        assert len(history(store, run_id)) == 40

    def test_refuses_a_run_that_trains_and_passes_it_over_among_others(self, store, dead, tmp_path, capsys):
        mine = runs.open_run(store, "busy", tags={})
        spool = open_spool(uri=store, run_id=mine, folder=tmp_path / "runs" / mine / "spool")
        run_id, _ = dead("one")
        assert main(["sync", mine]) == 2
        assert "still logs through" in capsys.readouterr().err
        assert main(["sync"]) == 0
        captured = capsys.readouterr()
        assert f"{mine}  passed over: a training still logs" in captured.err
        assert captured.out.startswith(run_id)
        spool.close(0)

    @pytest.mark.parametrize(
        ("what", "said"),
        [("0123", "no run '0123' with a spool under runs"), (".", "holds nothing to sync")],
    )
    def test_knows_no_such_run(self, what, said, capsys):
        assert main(["sync", what]) == 2
        assert said in capsys.readouterr().err

    def test_an_unknown_id_names_the_nearest(self, dead, capsys):
        run_id, _ = dead("one")
        assert main(["sync", run_id[:20]]) == 2
        assert f"did you mean {run_id}?" in capsys.readouterr().err

    def test_has_nothing_to_do_where_nothing_is(self, capsys):
        assert main(["sync"]) == 0
        assert capsys.readouterr().out == "no run here has anything to send\n"


def test_a_folder_that_is_no_spool_is_refused(tmp_path):
    with pytest.raises(InputError, match="nothing to sync"):
        sync.sync(tmp_path)


def test_the_password_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ann:hunter2@host:5000")
    assert runs.tracking_uri("http://host:5000") == "http://ann:hunter2@host:5000"
    assert runs.tracking_uri("http://host:5001") == "http://host:5001"
