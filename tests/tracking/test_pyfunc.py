import base64
import json
import os
import subprocess
import sys
import types

import cv2
import numpy as np
import pandas as pd
import pytest
import torch

from onestage.errors import InputError
from onestage.tracking import pyfunc, runs
from onestage.tracking.client import client
from onestage.tracking.mlflow_tracker import MlflowTracker
from onestage.types import Detections


class WholeImage:
    """Finds one dog as large as the image, scored by the red of its first pixel."""

    classes = ("cat", "dog")

    @classmethod
    def from_folder(cls, folder):
        assert (folder / "model.safetensors").read_text() == "weights"
        return cls()

    def __call__(self, images):
        return [
            Detections(
                boxes=torch.tensor([[0.0, 0.0, image.shape[1], image.shape[0]]]),
                scores=torch.tensor([image[0, 0, 0] / 255]),
                labels=torch.tensor([1]),
            )
            for image in images
        ]


@pytest.fixture
def model_folder(tmp_path, monkeypatch):
    inference = types.ModuleType("onestage.inference")
    inference.Predictor = WholeImage
    monkeypatch.setitem(sys.modules, "onestage.inference", inference)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_text("weights")
    card = {"config": {"detector": {}}, "classes": ["cat", "dog"], "input_size": [32, 48], "threshold": 0.25}
    (folder / "model.json").write_text(json.dumps(card))
    return folder


@pytest.fixture
def red():
    """An image (8, 9, 3) RGB."""
    return np.full((8, 9, 3), (255, 0, 0), np.uint8)


def png(image):
    return cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes()


def logged(uri, experiment, model_folder, folder):
    run_id = runs.open_run(uri, experiment, tags={})
    tracker = MlflowTracker(uri=uri, run_id=run_id, folder=folder)
    tracker.log_metrics({"val/map": 0.5}, 40)
    tracker.log_model(model_folder, {"val/map": 0.5}, step=40)
    assert tracker.close(30)
    return run_id


def test_through_the_store_and_back(store, model_folder, red, request, tmp_path, caplog):
    import mlflow

    run_id = logged(store, request.node.name, model_folder, tmp_path / "spool")
    model = runs.logged_model(store, run_id)
    assert (model.name, model.source_run_id) == ("model", run_id)
    assert [(metric.key, metric.value, metric.step) for metric in model.metrics] == [("val/map", 0.5, 40)]
    assert len(client(store).get_metric_history(run_id, "val/map")) == 1

    mlflow.set_tracking_uri(store)
    loaded = mlflow.pyfunc.load_model(model.model_uri)
    assert loaded.metadata.metadata == {"classes": ["cat", "dog"], "input_size": [32, 48], "threshold": 0.25}
    assert loaded.metadata.model_id == model.model_id
    path = tmp_path / "red.png"
    path.write_bytes(png(red))
    images = [red, png(red), str(path), base64.b64encode(png(red)).decode(), red.tolist()]
    answer = loaded.predict(pd.DataFrame({"image": images}))
    assert list(answer.columns) == ["boxes", "scores", "labels", "classes"]
    assert answer.values.tolist() == [[[[0.0, 0.0, 9.0, 8.0]], [1.0], [1], ["dog"]]] * 5
    example = loaded.predict(loaded.input_example)
    assert example.boxes[0] == [[0.0, 0.0, 48.0, 32.0]]
    assert mlflow.active_run() is None
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == []


def test_downloaded_by_run_alias_and_version(server, model_folder, request, tmp_path):
    run_id = logged(server.uri, request.node.name, model_folder, tmp_path / "spool")
    registry = client(server.uri)
    registry.create_registered_model("cats")
    source = runs.logged_model(server.uri, run_id)
    version = registry.create_model_version("cats", source.model_uri, run_id, model_id=source.model_id).version
    registry.set_registered_model_alias("cats", "champion", version)
    for number, model in enumerate([run_id, "models:/cats@champion", f"models:/cats/{version}", source.model_uri]):
        folder = runs.download_model(server.uri, model, tmp_path / str(number))
        assert sorted(path.name for path in folder.iterdir()) == ["model.json", "model.safetensors"]


def test_the_saved_folder_holds_no_pickle_and_pins_its_packages(model_folder, tmp_path):
    pyfunc.save(model_folder, tmp_path / "saved")
    files = [path for path in (tmp_path / "saved").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {"", ".yaml", ".txt", ".json", ".safetensors"}
    pinned = (tmp_path / "saved" / "requirements.txt").read_text()
    assert f"torch=={torch.__version__.partition('+')[0]}\n" in pinned
    assert "onestage" in pinned


def test_a_model_that_can_not_be_saved_is_one_warning(store, request, tmp_path, caplog):
    tracker = MlflowTracker(uri=store, run_id=runs.open_run(store, request.node.name, tags={}), folder=tmp_path / "s")
    tracker.log_model(tmp_path / "missing", {}, step=1)
    assert tracker.close(5)
    assert [record.getMessage()[:33] for record in caplog.records] == ["model not kept: FileNotFoundError"]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"no image", "image 1 can't be decoded"),
        (b"", "image 1 can't be decoded"),
        ("/missing/x.png", "image 1: there is no file '/missing/x.png'"),
        (np.zeros((4, 4), np.uint8), r"image 1 is an array \(4, 4\) of uint8"),
        (np.zeros((4, 4, 3), np.float32), "of float32: send"),
        (7, "image 1 is a int"),
    ],
)
def test_images_that_can_not_be_read(image, message, red):
    model = pyfunc.DetectorModel(predictor=WholeImage())
    with pytest.raises(InputError, match=message):
        model.predict(pd.DataFrame({"image": [red, image]}))


@pytest.mark.parametrize("side", [8, 64, 600])
def test_base64_of_any_length_is_no_path(side):
    noise = np.random.default_rng(0).integers(0, 255, (side, side, 3), np.uint8)
    model = pyfunc.DetectorModel(predictor=WholeImage())
    answer = model.predict(pd.DataFrame({"image": [base64.b64encode(png(noise)).decode()]}))
    assert answer.boxes[0] == [[0.0, 0.0, side, side]]


FRESH = """
import json, sys
import mlflow, numpy, pandas
from mlflow.models import validate_serving_input
from mlflow.models.utils import load_serving_example

uri, picture = sys.argv[1:]
model = mlflow.pyfunc.load_model(uri)
with open(picture, "rb") as file:
    encoded = file.read()
black = numpy.zeros((40, 60, 3), numpy.uint8)
answer = model.predict(pandas.DataFrame({"image": [black, encoded, picture]}))
served = validate_serving_input(uri, load_serving_example(uri))
example = model.predict(model.input_example)
print(json.dumps([answer.to_dict("list"), served.to_dict("list"), example.to_dict("list")]))
"""


@pytest.mark.slow
def test_a_fresh_process_loads_it_over_http_and_serves_its_example(server, request, red, tmp_path):
    from safetensors.torch import save_file

    from onestage.config import build, compose
    from onestage.inference import Predictor

    detector = ["detector=yolov3_tiny", "detector.width=0.125", "detector.input_size=[64,64]", "detector.num_classes=2"]
    config = compose("train", detector)
    folder = tmp_path / "real"
    folder.mkdir()
    torch.manual_seed(0)
    save_file(
        {name: value.contiguous() for name, value in build(config["detector"]).state_dict().items()},
        folder / "model.safetensors",
    )
    card = {"config": {key: config[key] for key in ("detector", "data")}, "overrides": detector}
    card |= {"classes": ["cat", "dog"], "input_size": [64, 64], "threshold": 0.25}
    (folder / "model.json").write_text(json.dumps(card))
    model = runs.logged_model(server.uri, logged(server.uri, request.node.name, folder, tmp_path / "spool"))
    picture = tmp_path / "red.png"
    picture.write_bytes(png(red))

    command = [sys.executable, "-c", FRESH, model.model_uri, str(picture)]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": server.uri, "MLFLOW_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    answer, served, example = json.loads(done.stdout.splitlines()[-1])
    assert list(answer) == ["boxes", "scores", "labels", "classes"]
    black, *reds = Predictor.from_folder(folder)([np.zeros((40, 60, 3), np.uint8), red, red])
    for row, expected in enumerate([black, *reds]):
        assert answer["scores"][row] == pytest.approx(expected.scores.tolist(), abs=1e-5)
        assert answer["labels"][row] == expected.labels.tolist()
    assert len(answer["scores"][0]) > 0
    assert served == example and len(example["boxes"]) == 1
