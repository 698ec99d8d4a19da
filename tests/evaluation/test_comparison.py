"""`onestage compare` of two runs with a model, from the command to the files."""

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from onestage.cli import main
from onestage.data.manifest import Manifest
from onestage.data.scenes import draw
from onestage.evaluation import evaluate
from onestage.evaluation.comparison import Change, Comparison, write
from onestage.metrics.paired import differences
from onestage.metrics.tide import judge

EXPECTED = ["better_01_000000", "better_02_000001", "worse_01_000004"]
DIGITS = [str(digit) for digit in range(10)]


@pytest.fixture(scope="module")
def pair(digits: Path, make_model: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the runs "first" and "second", which were born differently."""
    folder = tmp_path_factory.mktemp("pair")
    for seed, name in enumerate(("first", "second")):
        make_model(folder / name / "model", root=digits, classes=DIGITS, seed=seed)
    return folder


def told(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return result


def test_numbers_are_those_of_the_evaluations(pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["tracking=none", f"storage={pair}", "trainer.num_pictures=2"]
    assert main(["compare", "first", "second", "split=train", *common, f"out={tmp_path / 'out'}", "--json"]) == 0
    made = told(capsys)
    for side, run in (("ap_a", "first"), ("ap_b", "second")):
        metrics = evaluate(run, split="train", overrides=common, files=False)["metrics"]
        assert made["map"][side] == pytest.approx(metrics["train/map"], abs=1e-5)
        for row in made["classes"]:
            assert row[side] == pytest.approx(metrics[f"train/ap/{row['class']}"], abs=1e-5)
    names = {Path(file).name for file in made["files"]}
    assert names == {file.name for file in (tmp_path / "out").iterdir()}
    assert names >= {"comparison.json", "per_class.csv", "differences.png"}
    with (tmp_path / "out" / "per_class.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == ["mean", *(row["class"] for row in made["classes"])]
    assert made["num_images"] == 24


def test_the_images_that_changed_most_are_drawn_by_how_much(scenes: ModuleType, tmp_path: Path) -> None:
    """Image i has four truths; a finds i of them, b finds 4 - i: 0 gains most, 4 loses most, 2 stays."""
    boxes = [[10.0 + 20 * at, 10, 25 + 20 * at, 40] for at in range(4)]

    def found(counts: list[int]) -> list[Any]:
        truths = [(box, 0) for box in boxes]
        return [
            scenes.one(truths, [(box, 0, 0.9) for box in boxes[:count]], image_id=image)
            for image, count in enumerate(counts)
        ]

    a, b = found([0, 1, 2, 3, 4]), found([4, 3, 2, 1, 0])
    images = [Change(image_id=one.image_id, a=judge(one), b=judge(two)) for one, two in zip(a, b, strict=True)]
    made = Comparison(
        a="a", b="b", split="test", dataset_hash="", classes=["x"], differences=differences(a, b), images=images
    )
    asked: list[int] = []

    def pixels(ids: Sequence[int]) -> dict[int, Any]:
        asked.extend(ids)
        return {image_id: np.zeros((60, 100, 3), np.uint8) for image_id in ids if image_id != 3}  # one can't be read

    (tmp_path / "better_07_000009.jpg").touch()  # of a comparison before
    files = write(made, {}, tmp_path, images=pixels, num_images=9)
    assert asked == [0, 1, 4, 3]
    names = ["comparison.json", "per_class.csv", "differences.png"]
    assert [file.name for file in files] == [*names, *(f"{one}.jpg" for one in EXPECTED)]
    assert {file.name for file in tmp_path.glob("*.jpg")} == {f"{one}.jpg" for one in EXPECTED}
    with Image.open(files[-1]) as picture:
        assert picture.width == 3 * 300 + 2 * 4  # three panels, drawn three times as large
    assert [one.image_id for one in made.most(1, better=False)] == [4]


def test_a_run_and_itself(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "first", "first", "split=val", "tracking=none", f"storage={pair}"]) == 0
    said = capsys.readouterr().out
    assert "0 better in B, 0 worse, 5 the same" in said and "see them with --out FOLDER" in said


@pytest.mark.parametrize("changed", ["classes", "data"])
def test_what_can_not_be_compared_is_one_line(
    changed: str, pair: Path, digits: Path, make_model: Callable[..., None], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    other = pair / f"other-{changed}"
    root = tmp_path / "drawn"
    draw(root, seed=2, num_train=2, num_val=1, num_test=1, size=96)
    if changed == "classes":
        loaded = Manifest.load(root)
        renamed = Manifest(loaded.name, tuple(f"d{name}" for name in loaded.classes), loaded.splits)
        renamed.save(root)
    make_model(other / "model", root=root, classes=DIGITS if changed == "data" else [f"d{name}" for name in DIGITS])
    assert main(["compare", "first", other.name, "tracking=none", f"storage={pair}"]) == 2
    said = capsys.readouterr().err.strip()
    assert said.count("\n") == 0
    if changed == "data":
        assert str(digits) in said and str(root) in said and "data.root=" in said
        assert main(["compare", "first", other.name, f"data.root={digits}", "tracking=none", f"storage={pair}"]) == 0
    else:
        assert f"{other.name} knows d0, d1" in said
