import json
import math
import signal
import threading
import time

import numpy as np
import PIL.Image
import pytest

from onestage.tracking import runs, spool, sync
from onestage.tracking.client import client
from onestage.tracking.mlflow_tracker import MlflowTracker
from onestage.tracking.tracker import NoTracker


@pytest.fixture
def experiment(request):
    return request.node.name


@pytest.fixture
def run_id(store, experiment):
    return runs.open_run(store, experiment, tags={})


@pytest.fixture
def tracker(store, run_id, tmp_path):
    tracker = MlflowTracker(uri=store, run_id=run_id, folder=tmp_path / "spool")
    yield tracker
    tracker.close(0)


def history(uri, run_id, key):
    return [(point.step, point.value) for point in client(uri).get_metric_history(run_id, key)]


class TestParams:
    def test_nested_ones_are_flat_cut_and_without_secrets(self, store, run_id, tracker):
        tracker.log_params({
            "detector": {"width": 0.25, "keypoints": "nose", "anchors": [[10, 13], [16, 30]]},
            "augment": [{"name": "mosaic", "p": 0.5}, {"name": "flip"}],
            "data": {"token": "abc", "root": "https://ann:pw@host/set"},
            "long": "x" * 7000,
            "none": None,
            "empty": {},
        })  # fmt: skip
        assert tracker.close(10)
        assert runs.find_run(store, run_id).params == {
            "detector.width": "0.25",
            "detector.keypoints": "nose",
            "detector.anchors": "[[10, 13], [16, 30]]",
            "augment.0.name": "mosaic",
            "augment.0.p": "0.5",
            "augment.1.name": "flip",
            "data.token": "***",
            "data.root": "https://***@host/set",
            "long": "x" * 6000,
            "none": "None",
            "empty": "{}",
        }

    def test_a_resume_keeps_the_first_and_says_so(self, store, run_id, tracker, tmp_path, caplog):
        tracker.log_params({f"p{number}": number for number in range(250)})
        assert tracker.close(10)
        resumed = MlflowTracker(uri=store, run_id=run_id, folder=tmp_path / "spool", resume_from_step=0)
        resumed.log_params({"p0": 0, "p1": "changed", "new": 1})
        assert resumed.close(10)
        params = runs.find_run(store, run_id).params
        assert (len(params), params["p1"], params["new"]) == (251, "1", "1")
        [warning] = [record.getMessage() for record in caplog.records if record.name.startswith("onestage")]
        assert warning.startswith("params stay") and warning.endswith(": p1")


class TestArtifacts:
    def test_arrive_as_they_were(self, store, run_id, tracker, tmp_path):
        (tmp_path / "plots").mkdir()
        (tmp_path / "plots" / "pr.svg").write_text("first")
        tracker.log_artifact(tmp_path / "plots", "figures")
        (tmp_path / "plots" / "pr.svg").write_text("second")
        tracker.log_artifact(tmp_path / "plots" / "pr.svg")
        tracker.log_text("see https://ann:pw@host", "notes/a.txt")
        tracker.log_dict({"data": {"token": "abc", "root": "/data"}}, "config.json")
        tracker.set_tags({"phase": "train"})
        assert tracker.close(10)

        def read(path):
            return runs.download(store, run_id, path, tmp_path / "got").read_text()

        assert read("figures/plots/pr.svg") == "first"
        assert read("pr.svg") == "second"
        assert read("notes/a.txt") == "see https://***@host"
        assert read("config.json") == '{\n  "data": {\n    "token": "***",\n    "root": "/data"\n  }\n}'
        assert runs.find_run(store, run_id).tags["phase"] == "train"

    def test_pictures_lie_where_the_image_tab_looks_and_once(self, store, run_id, tracker, tmp_path):
        image = np.zeros((20, 30, 3), np.uint8)
        image[..., 0] = 200
        tracker.log_picture("val/street", image, 5)
        assert tracker.close(10)
        resumed = MlflowTracker(uri=store, run_id=run_id, folder=tmp_path / "b", resume_from_step=3)
        resumed.log_picture("val/street", image, 5)
        resumed.log_picture("val/street", image, 6)
        assert resumed.close(10)
        files = [file.path for file in client(store).list_artifacts(run_id, "images") if file.path.endswith(".png")]
        assert [path.split("+timestamp")[0] for path in files] == [
            "images/val~street+step+5",
            "images/val~street+step+6",
        ]
        assert runs.find_run(store, run_id).tags["mlflow.loggedImages"] == "True"
        with PIL.Image.open(runs.download(store, run_id, files[0], tmp_path)) as picture:
            assert picture.getpixel((3, 3)) == (200, 0, 0)


def test_numbers_that_are_none_arrive(server, experiment, tmp_path):
    run_id = runs.open_run(server.uri, experiment, tags={})
    tracker = MlflowTracker(uri=server.uri, run_id=run_id, folder=tmp_path)
    for step, value in enumerate((math.nan, math.inf, -math.inf, 1.5)):
        tracker.log_metrics({"train/loss": value}, step)
    assert tracker.close(20)
    values = [value for _, value in history(server.uri, run_id, "train/loss")]
    assert math.isnan(values[0])
    assert values[1] > 1e308 > -1e308 > values[2]
    assert values[3] == 1.5


def test_a_server_that_hangs_and_dies_costs_no_point_and_no_time(server, experiment, tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setattr(spool, "POLL_S", 1.0)  # the outages are short
    run_id = runs.open_run(server.uri, experiment, tags={})
    tracker = MlflowTracker(uri=server.uri, run_id=run_id, folder=tmp_path)
    stop = threading.Event()
    slowest = 0.0
    steps = 0

    def train():
        nonlocal slowest, steps
        while not stop.wait(0.01):
            began = time.perf_counter()
            tracker.log_metrics({"train/loss": steps / 10, "lr": 0.1}, steps)
            slowest = max(slowest, time.perf_counter() - began)
            steps += 1

    training = threading.Thread(target=train)
    training.start()
    time.sleep(1.2)
    server.signal(signal.SIGSTOP)
    time.sleep(2.5)
    server.signal(signal.SIGCONT)
    time.sleep(1.5)
    server.kill()
    tracker.log_picture("val/street", np.zeros((8, 8, 3), np.uint8), 1)
    server.start()
    stop.set()
    training.join()

    assert tracker.close(30)
    assert steps > 300
    assert history(server.uri, run_id, "train/loss") == [(step, step / 10) for step in range(steps)]
    assert [step for step, _ in history(server.uri, run_id, "lr")] == list(range(steps))
    assert len(client(server.uri).list_artifacts(run_id, "images")) == 2
    assert slowest < 0.5
    outages = [record.getMessage() for record in caplog.records if record.name == "onestage.tracking.spool"]
    assert 1 <= len(outages) <= 2


def test_what_a_dead_server_missed_is_synced_later(server, store, run_id, tmp_path):
    folder = tmp_path / "spool"
    tracker = MlflowTracker(uri="http://127.0.0.1:9", run_id=run_id, folder=folder)
    tracker.log_metrics({"train/loss": 1.0}, 1)
    tracker.set_tags({"phase": "end"})
    assert not tracker.close(0.5)
    assert sync.sync(folder, uri=store).state == "arrived"
    assert history(store, run_id, "train/loss") == [(1, 1.0)]
    assert runs.find_run(store, run_id).tags["phase"] == "end"


def test_a_resume_logs_no_step_twice(store, run_id, tracker, tmp_path):
    for step in range(10):
        tracker.log_metrics({"train/loss": 1.0}, step)
    assert tracker.close(10)
    elsewhere = MlflowTracker(uri=store, run_id=run_id, folder=tmp_path / "other-host", resume_from_step=5)
    for step in range(6, 13):
        elsewhere.log_metrics({"train/loss": 2.0, "val/map": 0.5}, step)
    assert elsewhere.close(10)
    assert history(store, run_id, "train/loss") == [(step, 1.0 if step < 10 else 2.0) for step in range(13)]
    assert history(store, run_id, "val/map") == [(step, 0.5) for step in range(6, 13)]


def test_no_tracker_keeps_nothing(tmp_path):
    tracker = NoTracker()
    tracker.log_metrics({"loss": 1.0}, 1)
    tracker.log_artifact(tmp_path / "missing")
    assert tracker.close()


def test_a_dataset_is_an_input_of_the_run_once(store, run_id, tracker, tmp_path):
    profile = {"images": 205, "classes": ["RBC", "WBC"]}
    for _ in range(2):
        tracker.log_dataset(
            "https://ann:pw@host/bccd", profile, name="bccd/train", digest="a1" * 32, context="training"
        )
    assert tracker.close()
    (given,) = client(store).get_run(run_id).inputs.dataset_inputs
    assert (given.dataset.name, given.dataset.digest) == ("bccd/train", "a1" * 18)
    assert json.loads(given.dataset.profile) == profile
    assert json.loads(given.dataset.source)["uri"].endswith("@host/bccd")
    assert "pw" not in given.dataset.source
    assert [(tag.key, tag.value) for tag in given.tags] == [("mlflow.data.context", "training")]


def test_a_table_is_drawn_as_one_and_its_last_state_stays(store, run_id, tracker, tmp_path):
    tracker.log_table([{"class": "cat & dog", "AP": None}], "tables/ap.json")
    tracker.log_table([{"class": "cat & dog", "AP": 0.25}, {"class": "cat + dog", "AP": 0.5}], "tables/ap.json")
    tracker.log_table([{"class": "owl", "AP": 1.0}], "owl.json")
    assert tracker.close(10)
    import mlflow

    mlflow.set_tracking_uri(store)  # where a table is looked for, whatever the client's store is
    experiment_id = client(store).get_run(run_id).info.experiment_id
    read = client(store).load_table(experiment_id, "tables/ap.json", [run_id])
    assert read.to_dict("list") == {"class": ["cat & dog", "cat + dog"], "AP": [0.25, 0.5]}
    named = json.loads(client(store).get_run(run_id).data.tags["mlflow.loggedArtifacts"])
    assert named == [{"path": path, "type": "table"} for path in ("tables/ap.json", "owl.json")]


def test_metrics_of_classes_whose_names_become_the_same_are_kept_apart(store, run_id, tracker):
    tracker.log_metrics({"val/ap/cat&dog": 0.1, "val/ap/cat+dog": 0.2, "val/ap/cat_dog": 0.3, "val/map": 0.2}, 1)
    tracker.log_metrics({"val/map": 0.4, "val/ap/../map": 0.9}, 2)  # a class may have any name
    assert tracker.close(10)
    metrics = client(store).get_run(run_id).data.metrics
    assert sorted(metrics[key] for key in metrics if key.startswith("val/ap/cat_dog")) == [0.1, 0.2, 0.3]
    assert (metrics["val/ap/cat_dog"], metrics["val/map"], len(metrics)) == (0.3, 0.4, 5)


def test_what_is_added_later_stands_at_the_last_step_not_at_a_machines_second(store, run_id, tracker):
    tracker.log_metrics({"train/loss": 1.0}, 40)
    tracker.log_metrics({"system/host/cpu_utilization_percentage": 9.0}, 1200)
    assert tracker.close(10)
    runs.log_summary(store, run_id, {"test/map": 0.5})
    assert history(store, run_id, "test/map") == [(40, 0.5)]
