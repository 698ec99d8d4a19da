"""The table of detectors: sizes as Darknet counts them, results that are kept, and failures that stop nobody else."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from onestage.bench import detectors
from onestage.cli import main
from onestage.cluster.launch import Outcome
from onestage.config import CONF, compose, options

MEASURED = {
    "paper": {"input_size": [416, 416], "parameters": 8_674_496, "gflops": 5.445},
    "trained": {"input_size": [224, 224], "parameters": 547_336, "gflops": 0.1255, "width": 0.25},
    "images_per_s": 75.5,
    "map_50": 0.8125,
}


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    from onestage.data.scenes import draw

    draw(tmp_path / "digits", seed=1, num_train=8, num_val=3, num_test=3, size=96)
    return tmp_path / "digits"


def test_operations_are_twice_the_multiply_adds() -> None:
    """Darknet's page lists YOLOv3-tiny with 5.56 Bn; its file holds 35,434,956 bytes, 20 of them a header."""
    size = detectors.size(compose("train", ["detector=yolov3_tiny"])["detector"])
    assert size["gflops"] == pytest.approx(5.56, abs=0.01)
    means_and_variances = 2 * 3_184
    assert size["parameters"] == (35_434_956 - 20) // 4 - means_and_variances
    assert size["input_size"] == [416, 416]


def test_what_it_is_trained_with_composes_for_every_detector() -> None:
    table = tomllib.loads((CONF / "bench" / "detectors.toml").read_text())
    for name in options("detector"):
        assert table[name], f"conf/bench/detectors.toml has no overrides for {name}"
        compose("train", [f"detector={name}", *table[name]])


def bench(data: Path, storage: Path, *names: str) -> dict[str, Any]:
    return detectors.bench(names, data=data, images_seen=16, precision="32-true", storage=storage)


def test_what_is_measured_is_kept_and_a_failure_is_tried_again(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def measure(name: str, overrides: list[str], *, folder: Path) -> dict[str, Any]:
        calls.append(name)
        if name == "yolov3":
            raise RuntimeError("out of memory\nat length")
        folder.mkdir(parents=True)
        return MEASURED

    monkeypatch.setattr(detectors, "_measure", measure)
    for _ in range(2):
        first, second = bench(digits, tmp_path / "bench", "yolov3", "yolov3_tiny")["detectors"]
        assert first == {"name": "yolov3", "failed": "out of memory"}
        assert second == {"name": "yolov3_tiny", **MEASURED}
    assert calls == ["yolov3", "yolov3_tiny", "yolov3"]


def test_other_settings_are_measured_anew(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def measure(name: str, overrides: list[str], *, folder: Path) -> dict[str, Any]:
        folder.mkdir(parents=True, exist_ok=True)
        seen.extend(one for one in overrides if one.startswith("trainer.max_"))
        return MEASURED

    monkeypatch.setattr(detectors, "_measure", measure)
    for images in (16, 40):
        detectors.bench(["yolov3_tiny"], data=digits, images_seen=images, precision="32-true", storage=tmp_path / "b")
    # Batches of 8, epochs of 8 images.
    assert seen == ["trainer.max_steps=2", "trainer.max_epochs=2", "trainer.max_steps=5", "trainer.max_epochs=5"]


def test_the_table_says_what_was_measured_and_how() -> None:
    report = {
        "command": "onestage bench detectors --data cells",
        "date": "2030-01-31",
        "machine": "a processor, 2 cores",
        "dataset": "cells",
        "images_seen": 4000,
        "settings": "AdamW at 0.001",
        "detectors": [{"name": "yolov3_tiny", **MEASURED}, {"name": "ssd300", "failed": "no | memory"}],
    }
    lines = detectors.markdown(report).splitlines()
    assert "- command: `onestage bench detectors --data cells`" in lines
    assert "- machine: a processor, 2 cores" in lines
    assert lines[-2] == "| yolov3_tiny | 416×416 | 8.67 | 5.45 | 0.25 | 224×224 | 0.55 | 0.13 | 75.5 | 0.812 |"
    assert lines[-1].startswith("| ssd300 | failed: no / memory |")
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


def test_a_failure_is_reported_and_the_exit_code_is_1(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(name: str, overrides: list[str], *, folder: Path) -> dict[str, Any]:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(detectors, "_measure", measure)
    out = tmp_path / "docs" / "detectors.md"
    arguments = ["bench", "detectors", "--data", str(digits), "--storage", str(tmp_path), "--out", str(out), "--json"]
    assert main([*arguments, "yolov3_tiny"]) == 1
    assert json.loads(capsys.readouterr().out)["detectors"] == [{"name": "yolov3_tiny", "failed": "out of memory"}]
    assert "| yolov3_tiny | failed: out of memory |" in out.read_text()


def test_an_unknown_detector_is_one_line(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "detectors", "--data", str(digits), "yolov99"]) == 2
    said = capsys.readouterr().err
    assert "no detector 'yolov99'; there are: " in said
    assert said.count("\n") == 1


def test_another_precision_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["bench", "detectors", "--data", "cells", "--precision", "16-mixed"])
    assert end.value.code == 2
    assert "--precision: invalid choice: '16-mixed'" in capsys.readouterr().err


def test_another_version_measures_anew(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def measure(name: str, overrides: list[str], *, folder: Path) -> dict[str, Any]:
        folder.mkdir(parents=True, exist_ok=True)
        calls.append(name)
        return MEASURED

    monkeypatch.setattr(detectors, "_measure", measure)
    bench(digits, tmp_path / "bench", "yolov3_tiny")
    monkeypatch.setattr(detectors, "__version__", "999.0")
    bench(digits, tmp_path / "bench", "yolov3_tiny")
    assert calls == ["yolov3_tiny"] * 2


def test_an_interrupted_training_is_gone_on_with(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resumed: list[str | None] = []

    def launch(config: dict[str, Any]) -> Outcome:
        """A training that its first checkpoint outlives, and that ends the second time."""
        resumed.append(config["resume"])
        folder = Path(config["storage"]) / "half"
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        (folder / "checkpoints" / "last.ckpt").touch()
        (folder / "config.json").write_text(json.dumps(config))
        code = 0 if config["resume"] else 130
        return Outcome("half", "FINISHED", code, folder, metrics={}, checkpoint=None, tracking_uri=None)

    monkeypatch.setattr("onestage.cluster.launch.launch", launch)
    monkeypatch.setattr("onestage.evaluation.evaluate", lambda run, **_: {"metrics": {"test/map_50": 0.25}})
    monkeypatch.setattr(detectors, "size", lambda node: {})
    monkeypatch.setattr(detectors, "images_per_s", lambda config: 1.0)
    with pytest.raises(KeyboardInterrupt):
        bench(digits, tmp_path / "bench", "yolov3_tiny")
    (row,) = bench(digits, tmp_path / "bench", "yolov3_tiny")["detectors"]
    assert row["map_50"] == 0.25
    assert resumed == [None, "half"]


@pytest.mark.slow
def test_one_detector_is_trained_timed_and_scored(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = tmp_path / "bench"
    (row,) = bench(digits, storage, "yolov3_tiny")["detectors"]
    assert "failed" not in row, row
    assert row["trained"]["width"] == 0.25
    assert row["trained"]["parameters"] < row["paper"]["parameters"]
    assert row["images_per_s"] > 0
    assert 0 <= row["map_50"] <= 1
    assert len(list(storage.glob("yolov3_tiny/*/checkpoints/last.ckpt"))) == 1

    monkeypatch.setattr(detectors, "_measure", None)
    assert bench(digits, storage, "yolov3_tiny")["detectors"] == [row]
