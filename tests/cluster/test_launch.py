"""What a launch promises: refusals before anything starts, a finished MLflow run, and no training lost to a kill."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from onestage.cli import main
from onestage.cluster.launch import run_name
from onestage.cluster.preflight import check
from onestage.config import compose
from onestage.data.threads import num_cores
from onestage.errors import InputError

from .conftest import SETTINGS

EVERY_STEP = "tracking.every_seconds=0"

Start = Callable[..., subprocess.Popen[str]]
RunJson = Callable[..., dict[str, Any]]


def closed_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def refused(capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    assert main(["train", *overrides]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


class TestBadInput:
    @pytest.fixture(autouse=True)
    def _elsewhere(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)

    def test_no_dataset_named(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "data.root is not set" in refused(capsys, "tracking=none")

    def test_a_folder_without_manifest(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        said = refused(capsys, "tracking=none", f"data.root={tmp_path}")
        assert str(tmp_path) in said
        assert "onestage data import" in said

    def test_an_unknown_key_names_the_nearest(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "'trainer.max_epochs'" in refused(capsys, "trainer.max_epoch=3")

    def test_an_override_without_a_value(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "write KEY=VALUE" in refused(capsys, "trainer.max_epochs")

    def test_an_unknown_detector_lists_what_there_is(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "yolov3, yolov3_spp, yolov3_tiny" in refused(capsys, "detector=yolov99")

    def test_a_class_count_that_does_not_fit(self, capsys: pytest.CaptureFixture[str], digits: Path) -> None:
        said = refused(capsys, "tracking=none", f"data.root={digits}", "detector.num_classes=3")
        assert "detector.num_classes is 3" in said
        assert "10 classes" in said

    def test_more_cores_than_there_are(self, capsys: pytest.CaptureFixture[str], digits: Path) -> None:
        asked = f"cluster.cpus_per_worker={num_cores() + 1}"
        assert f"this machine has {num_cores()}" in refused(capsys, "tracking=none", f"data.root={digits}", asked)

    def test_an_input_size_that_the_network_cannot_take(self, capsys: pytest.CaptureFixture[str], digits: Path) -> None:
        said = refused_after_start(
            capsys, "cluster=none", "tracking=none", f"data.root={digits}", "detector.input_size=[100,100]"
        )
        assert "multiples of 32" in said

    def test_an_unreachable_tracking_server(self, capsys: pytest.CaptureFixture[str], digits: Path) -> None:
        uri = f"http://someone:secret@127.0.0.1:{closed_port()}"
        said = refused(capsys, f"data.root={digits}", f"tracking.uri={uri}")
        assert "tracking=none" in said
        assert "secret" not in said
        assert not Path("runs").exists()

    def test_weights_that_are_not_there(self, capsys: pytest.CaptureFixture[str], digits: Path) -> None:
        said = refused(capsys, "tracking=none", f"data.root={digits}", "detector.weights=no-such.weights")
        assert "no-such.weights" in said

    @pytest.mark.parametrize("steps", [0, -2])
    def test_no_steps(self, capsys: pytest.CaptureFixture[str], digits: Path, steps: int) -> None:
        said = refused(capsys, "tracking=none", f"data.root={digits}", f"trainer.max_steps={steps}")
        assert f"trainer.max_steps must be at least 1, or -1 for no limit, got {steps}" in said

    @pytest.mark.parametrize(
        ("override", "least"),
        [
            ("trainer.val_every_epochs=0", 1),
            ("checkpoint.keep=0", 1),
            ("checkpoint.every_steps=-1", 0),
            ("checkpoint.every_minutes=-1", 0),
            ("cluster.cpus_per_worker=0", 1),
            ("cluster.gpus_per_worker=-1", 0),
        ],
    )
    def test_too_little(self, capsys: pytest.CaptureFixture[str], digits: Path, override: str, least: int) -> None:
        said = refused(capsys, "tracking=none", f"data.root={digits}", override)
        assert f"{override.partition('=')[0]} must be at least {least}, got " in said

    @pytest.mark.parametrize("precision", ["8-bit", "bf16-true", "16-true", "64-true"])
    def test_a_precision_that_nothing_trains_in(
        self, capsys: pytest.CaptureFixture[str], digits: Path, precision: str
    ) -> None:
        said = refused(capsys, "tracking=none", f"data.root={digits}", f"trainer.precision={precision}")
        assert f"trainer.precision must be one of 32-true, bf16-mixed, 16-mixed, got '{precision}'" in said

    def test_input_sizes_that_the_network_cannot_take(self, capsys: pytest.CaptureFixture[str], digits: Path) -> None:
        ssd = ["detector=ssd300", "detector.width=0.125", "data.input_sizes.every=10"]
        said = refused_after_start(capsys, "cluster=none", "tracking=none", f"data.root={digits}", *ssd)
        assert "data.input_sizes draws 320x320" in said
        assert "set data.input_sizes.every=0" in said

    def test_a_run_to_resume_that_is_not_there(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "no such run" in refused(capsys, "tracking=none", "resume=0123abcd")
        assert "no unfinished run" in refused(capsys, "tracking=none", "resume=last")

    @pytest.mark.parametrize("content", ["", "{}", "[]", '{"overrides": null}'])
    def test_a_run_to_resume_whose_config_is_damaged(self, capsys: pytest.CaptureFixture[str], content: str) -> None:
        file = Path("runs/0123abcd/config.json")
        file.parent.mkdir(parents=True)
        file.write_text(content)
        assert f"{file} is damaged" in refused(capsys, "tracking=none", "resume=0123abcd")

    def test_several_workers_in_one_process(self, capsys: pytest.CaptureFixture[str], digits: Path) -> None:
        said = refused(capsys, "cluster=none", "tracking=none", f"data.root={digits}", "cluster.num_workers=2")
        assert "cluster=local" in said


def refused_after_start(capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    """Refused by a worker, when the progress has begun."""
    assert main(["train", *overrides]) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err


def test_the_machine_is_shared_out(digits: Path) -> None:
    config = check(compose("train", [f"data.root={digits}", "cluster.gpus_per_worker=0"]))
    assert config["cluster"]["cpus_per_worker"] == num_cores()
    assert Path(config["data"]["root"]).is_absolute()
    assert Path(config["storage"]).is_absolute()


def test_more_workers_than_cores_have_one_each(digits: Path) -> None:
    workers = num_cores() + 1
    config = check(compose("train", [f"data.root={digits}", f"cluster.num_workers={workers}"]))
    assert config["cluster"]["cpus_per_worker"] == 1


def test_the_classes_of_a_dataset_at_an_address_are_counted_too(digits: Path) -> None:
    asked = [f"data.root=file://{digits}"]
    assert check(compose("train", asked))["detector"]["num_classes"] == 10
    with pytest.raises(InputError, match=r"detector.num_classes is 3, but .* has 10 classes"):
        check(compose("train", [*asked, "detector.num_classes=3"]))


def test_priors_are_fitted_before_a_run_is_opened(digits: Path) -> None:
    asked = [f"data.root={digits}", "detector=yolov3", "detector.width=0.125", "detector.input_size=[96,96]"]
    config = check(compose("train", [*asked, "detector.fit_anchors=true"]))
    priors = config["detector"]["priors"]
    assert priors != compose("train", asked)["detector"]["priors"]
    assert len(priors) == 9 and all(8 <= side <= 96 for prior in priors for side in prior), "a digit's size"
    again = compose("train", config["overrides"])["detector"]
    assert (again["priors"], again["fit_anchors"]) == (priors, False), "as a resume composes it"


def test_weights_by_a_name_are_left_to_the_worker(digits: Path) -> None:
    name = "torchvision://vgg16_features"
    config = check(compose("train", [f"data.root={digits}", "detector=ssd300", f"detector.weights={name}"]))
    assert config["detector"]["weights"] == name


def test_a_resume_does_not_ask_for_the_first_weights(digits: Path, tmp_path: Path) -> None:
    overrides = [f"data.root={digits}", "detector.weights=gone.weights", f"storage={tmp_path}", "resume=0123abcd"]
    with pytest.raises(InputError, match=r"detector\.weights: no file gone\.weights"):
        check(compose("train", overrides))
    checkpoint = tmp_path / "0123abcd" / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    torch.save({"global_step": 1}, checkpoint)
    check(compose("train", overrides))


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], "yolov3_tiny"),
        (["detector=yolov2"], "yolov2"),
        (["experiment=ssd300_paper"], "ssd300_paper"),
        (["experiment=yolov3_paper", "detector=yolov3_spp"], "yolov3_spp"),
    ],
)
def test_a_run_is_named_by_what_was_chosen(overrides: list[str], name: str) -> None:
    assert run_name(compose("train", overrides)).split()[0] == name


def test_a_run_takes_the_name_that_it_is_given() -> None:
    assert run_name(compose("train", ["name=mine"])) == "mine"


def history(folder: Path, run_id: str, key: str) -> list[tuple[int, float]]:
    from mlflow import MlflowClient

    points = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}").get_metric_history(run_id, key)
    return [(point.step, point.value) for point in points]


@pytest.mark.slow
class TestTraining:
    def test_a_run_holds_what_people_look_for(self, run_json: RunJson, digits: Path, tmp_path: Path) -> None:
        train = ["train", "cluster=none", f"data.root={digits}", "trainer.max_epochs=2", EVERY_STEP]
        result = run_json(*train, *SETTINGS)
        assert result["status"] == "FINISHED"
        state = torch.load(result["checkpoint"], weights_only=True)["state_dict"]
        assert all(torch.isfinite(value).all() for value in state.values())

        from mlflow import MlflowClient

        client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
        run = client.get_run(result["run_id"])
        assert run.info.status == "FINISHED"
        assert run.data.params["detector.width"] == "0.25"
        wanted = {
            "train/loss",
            "train/loss/box",
            "train/loss/objectness",
            "train/loss/class",
            "train/lr",
            "val/map",
            "val/map_50",
            "val/map_75",
            "val/map_medium",
            "perf/images_per_s",
            "perf/data_wait",
        }
        assert wanted <= set(run.data.metrics)
        assert any(key.startswith("val/ap/") for key in run.data.metrics)
        assert [step for step, _ in history(tmp_path, result["run_id"], "train/loss")] == list(range(6))
        artifacts = {one.path for one in client.list_artifacts(result["run_id"])}
        assert {"config.json", "dataset", "images"} <= artifacts

        code = (
            "import sys, mlflow, pandas as pd\n"
            "mlflow.set_tracking_uri(sys.argv[1])\n"
            "model = mlflow.pyfunc.load_model(sys.argv[2])\n"
            "import numpy as np\n"
            "answer = model.predict(pd.DataFrame({'image': [np.zeros((50, 70, 3), np.uint8)]}))\n"
            "print(sorted(answer.columns), len(answer))\n"
        )
        uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
        fresh = [sys.executable, "-c", code, uri, f"runs:/{result['run_id']}/model"]
        printed = subprocess.run(fresh, capture_output=True, text=True, timeout=200, cwd=tmp_path, check=True).stdout
        assert printed.splitlines()[-1] == "['boxes', 'classes', 'labels', 'scores'] 1"

    def test_two_ray_workers_train_as_one_process_does(self, run_json: RunJson, digits: Path, tmp_path: Path) -> None:
        common = [f"data.root={digits}", "trainer.max_steps=4", "detector.freeze_norm=true", EVERY_STEP, *SETTINGS]
        one = run_json("train", "cluster=none", "data.batch_size=8", *common)
        two = run_json("train", "cluster=local", "cluster.num_workers=2", "data.batch_size=4", *common)
        for key in ("train/loss", "train/loss/box", "train/grad_norm"):
            alone, together = history(tmp_path, one["run_id"], key), history(tmp_path, two["run_id"], key)
            assert [step for step, _ in alone] == [step for step, _ in together] == [0, 1, 2, 3]
            assert [value for _, value in together] == pytest.approx([value for _, value in alone], rel=1e-4)
        for key in ("val/loss", "val/map", "val/map_50"):  # five images over two workers, each counted once
            assert two["metrics"][key] == pytest.approx(one["metrics"][key], rel=1e-3, abs=1e-5)

    @pytest.mark.parametrize("cluster", ["none", "local"])
    def test_a_killed_driver_goes_on_in_the_same_run(
        self, onestage: Start, run_json: RunJson, digits: Path, tmp_path: Path, cluster: str
    ) -> None:
        train = ["train", f"cluster={cluster}", f"data.root={digits}", "data.batch_size=4", "trainer.max_epochs=60"]
        train += [EVERY_STEP]
        first = onestage(*train, *SETTINGS)
        checkpoint = wait_for_checkpoint(tmp_path / "runs", first)
        first.send_signal(signal.SIGKILL)
        first.communicate()
        run_id = checkpoint.parent.parent.name
        reached = torch.load(checkpoint, weights_only=True)["global_step"]
        assert 0 < reached < 60 * 6

        epochs = reached // 6 + 2
        result = run_json("train", f"cluster={cluster}", "resume=last", f"trainer.max_epochs={epochs}")
        assert result["run_id"] == run_id
        assert result["status"] == "FINISHED"
        assert torch.load(result["checkpoint"], weights_only=True)["global_step"] == epochs * 6

        from mlflow import MlflowClient

        client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
        assert client.get_run(run_id).info.status == "FINISHED"
        steps = [step for step, _ in history(tmp_path, run_id, "train/loss")]
        # Past its last checkpoint the killed run may have been further than the end of this one.
        assert steps == list(range(max(epochs * 6, len(steps)))), "one unbroken history, each step once"

    def test_interrupted_from_the_keyboard_the_run_is_killed_and_can_go_on(
        self, onestage: Start, digits: Path, tmp_path: Path
    ) -> None:
        process = onestage(
            "train", "cluster=local", f"data.root={digits}", "data.batch_size=4", "trainer.max_epochs=500", *SETTINGS
        )
        checkpoint = wait_for_checkpoint(tmp_path / "runs", process)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=200)
        assert process.returncode == 130
        run_id = checkpoint.parent.parent.name
        assert f"resume={run_id}" in err
        assert "Traceback" not in err

        from mlflow import MlflowClient

        client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
        assert client.get_run(run_id).info.status == "KILLED"


def wait_for_checkpoint(runs: Path, process: subprocess.Popen[str]) -> Path:
    """The first checkpoint of the only run; fails when the process ends, or after three minutes."""
    end = time.monotonic() + 180
    while time.monotonic() < end:
        found = list(runs.glob("*/checkpoints/last.ckpt"))
        if found:
            return found[0]
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    process.kill()
    raise AssertionError(f"no checkpoint within three minutes: {process.communicate()[1]}")


def test_out_of_memory_halves_the_batch_and_keeps_the_step(tmp_path: Path) -> None:
    """A training that only fits two images at once: 8 become 4, then 2, in the same run, of 8 images a step."""
    from contextlib import nullcontext

    from onestage.cluster.job import Job
    from onestage.cluster.launch import train
    from onestage.cluster.stop import Stop

    tried: list[tuple[int, int]] = []

    def by(job: Job, show: Any, stop: Stop) -> dict[str, Any]:
        data = job["config"]["data"]
        tried.append((data["batch_size"], data["global_batch"] or data["batch_size"]))
        if data["batch_size"] > 2:
            raise InputError("out of GPU memory on node7: lower data.batch_size")
        return {"metrics": {"val/map": 0.5}, "checkpoint": "last.ckpt"}

    def ended(*overrides: str) -> Any:
        config = compose("train", [f"storage={tmp_path}", *overrides])
        config["data"]["global_batch"] = None
        job = Job(config=config, run_id="one", folder=str(tmp_path / "one"), tracking_uri=None)
        return train(job, by=by, stop=Stop(), shown=lambda: nullcontext(lambda message: None))

    assert ended("on_oom=shrink").status == "FINISHED"
    assert tried == [(8, 8), (4, 8), (2, 8)]
    tried.clear()
    failed = ended()
    assert (failed.exit_code, tried) == (2, [(8, 8)])
    tried.clear()
    assert ended("on_oom=shrink", "data.batch_size=3").status == "FINISHED"
    assert tried == [(3, 3), (2, 3)]
