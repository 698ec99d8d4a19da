"""A config is refused in one line, or it is whole: resolved, typed and plain."""

import json
from pathlib import Path

import pytest

from onestage.config import compose, merged, options
from onestage.errors import InputError


def test_it_is_plain_data_that_crosses_a_wire() -> None:
    config = compose("train", ["detector=yolov3", "detector.num_classes=3", "detector.width=0.25"])
    assert json.loads(json.dumps(config)) == config
    assert config["detector"]["backbone"]["width"] == 0.25
    assert config["data"]["input_size"] == config["detector"]["input_size"] == [416, 416]


def test_data_follows_the_detectors_input_size() -> None:
    config = compose("train", ["detector.input_size=[320,640]"])
    assert config["data"]["input_size"] == [320, 640]
    assert config["augment"]["placement"]["size"] == [320, 640]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("detector.widht=0.5", "no config key 'detector.widht'; the nearest is 'detector.width'"),
        ("optimzer.lr=0.1", "the nearest is 'optimizer.lr'"),
        ("lr=0.1", "the nearest is 'optimizer.lr'"),
        ("augment.mosaic.probability=0.5", "no config key 'augment.mosaic.probability'; augment=full or yolov4 has it"),
        ("augment.flip=0.5", "augment.flip=0.5: augment.flip has settings of its own: augment.flip.p"),
        ("detector=yolo9", "no detector 'yolo9'; there are: retinanet_r101"),
        ("detector.width=wide", "detector.width must be a number, got 'wide'"),
        ("detector.input_size=416", "detector.input_size must be a list, got 416"),
        ("detector.freeze_norm=1", "detector.freeze_norm must be true or false, got 1"),
        ("trainer.max_epochs=many", "trainer.max_epochs"),
        ("data.batch_size=2.5", "data.batch_size"),
        ("budget.trials=many", "budget.trials=many; Value 'many' of type 'str' could not be converted to Integer"),
        ("+new=1", "new keys go under extra, as +extra.new"),
        ("+detector.new=1", "new keys go under extra"),
        ("seed", "missing EQUAL"),
    ],
)
def test_bad_overrides_are_refused_in_one_line(override: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        compose("train", [override])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_extra_is_free() -> None:
    assert compose("train", ["+extra.note=mine"])["extra"] == {"note": "mine"}


def test_the_number_of_classes_is_the_datasets_unless_said(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text('{"classes": ["a", "b"]}')
    assert compose("train", [f"data.root={tmp_path}"])["detector"]["num_classes"] == 2
    assert compose("train", [f"data.root={tmp_path}", "detector.num_classes=5"])["detector"]["num_classes"] == 5
    assert compose("train", [])["detector"]["num_classes"] == 80


def test_environment_lies_between_command_line_and_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://from-environment:5000")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "cells")
    tracking = compose("train", [])["tracking"]
    assert (tracking["uri"], tracking["experiment"]) == ("http://from-environment:5000", "cells")
    tracking = compose("train", ["tracking.uri=sqlite:///mine.db", "tracking.experiment=mine"])["tracking"]
    assert (tracking["uri"], tracking["experiment"]) == ("sqlite:///mine.db", "mine")


def test_later_overrides_of_a_key_count() -> None:
    assert merged(["detector=yolov3", "seed=1"], ["+extra.a=1", "detector=yolov3_tiny"]) == [
        "detector=yolov3_tiny",
        "seed=1",
        "+extra.a=1",
    ]


@pytest.mark.parametrize("group", ["detector", "optimizer", "schedule", "cluster", "tracking", "augment", "data"])
def test_every_choice_of_every_group_composes(group: str) -> None:
    assert options(group)
    for choice in options(group):
        compose("train", [f"{group}={choice}"])
