"""``onestage data import`` and ``export``: what they write, what they say, and what they refuse in one line."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from onestage.cli import main
from onestage.data.formats import findings as kinds

BCCD = Path(__file__).parents[2] / "shared" / "data" / "bccd"


def yolo(folder: Path, *, num_images: int = 20, broken: int = 0) -> Path:
    """Image n has one box of class n % 2, and in the first ``broken`` images one more of a class that there isn't."""
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    (folder / "classes.txt").write_text("cat\ndog\n")
    for number in range(num_images):
        Image.fromarray(np.full((30, 40, 3), number * 5, np.uint8)).save(folder / "images" / f"{number}.png")
        extra = "7 0.5 0.5 0.5 0.5\n" * (number < broken)
        (folder / "labels" / f"{number}.txt").write_text(f"{number % 2} 0.25 0.5 0.5 0.5\n{extra}")
    return folder


def told(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    out: dict[str, object] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return out


def test_help_names_the_formats(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("import", "export"):
        with pytest.raises(SystemExit) as end:
            main(["data", verb, "--help"])
        assert end.value.code == 0
        assert "{voc,coco,yolo}" in capsys.readouterr().out


def test_in_and_out_and_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = yolo(tmp_path / "set")
    arguments = ["data", "import", "yolo", str(source), "--val", "0.2", "--test", "0.1", "--name", "pets", "--json"]
    assert main([*arguments, "--out", str(tmp_path / "first")]) == 0
    first = told(capsys)
    splits = {"train": {"images": 14, "boxes": 14}, "val": {"images": 4, "boxes": 4}, "test": {"images": 2, "boxes": 2}}
    assert first["splits"] == splits
    assert (first["name"], first["classes"], first["findings"]) == ("pets", ["cat", "dog"], [])
    assert main([*arguments, "--out", str(tmp_path / "other"), "--seed", "1"]) == 0
    assert told(capsys)["content_hash"] != first["content_hash"]
    for format in ("voc", "coco", "yolo"):
        out = str(tmp_path / format)
        assert main(["data", "export", str(tmp_path / "first"), "--format", format, "--out", out, "--json"]) == 0
        assert told(capsys) == {"out": out, "format": format, "splits": splits, "lost": []}
        assert main(["data", "import", format, out, "--out", str(tmp_path / f"{format}-again"), "--json"]) == 0
        again = told(capsys)
        assert (again["splits"], again["classes"]) == (splits, ["cat", "dog"])


def test_findings_are_told_by_kind_and_written_in_full(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = yolo(tmp_path / "set", broken=12)
    arguments = ["data", "import", "yolo", str(source), "--findings", str(tmp_path / "logs" / "findings.txt")]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert said.out == f"{tmp_path / 'out'}: 2 classes (cat, dog)\n  train       20 images       20 boxes\n" + (
        "  12 findings, told above\n"
    )
    lines = [line for line in said.err.splitlines() if line]
    assert lines[0] == "12 x unknown class: its boxes are left out: add the class to those of the set, or to --classes"
    assert lines[1] == "    labels/0.txt:2: 7, where classes run from 0 to 1"
    assert lines[-1] == "    and 9 more"
    assert len(lines) == 5
    written = (tmp_path / "logs" / "findings.txt").read_text().splitlines()
    assert len(written) == 12
    assert written[0].split("\t") == [kinds.UNKNOWN_CLASS, "labels/0.txt:2", "7, where classes run from 0 to 1"]

    assert main([*arguments, "--out", str(tmp_path / "out"), "--json"]) == 0
    found = told(capsys)
    assert found["finding_counts"] == {kinds.UNKNOWN_CLASS: 12}
    assert len(found["findings"]) == 12  # type: ignore[arg-type]


def test_classes_are_chosen_and_ordered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = yolo(tmp_path / "set")
    arguments = ["data", "import", "yolo", str(source), "--out", str(tmp_path / "out"), "--json", "--classes"]
    assert main([*arguments, "dog"]) == 0
    only = told(capsys)
    assert (only["classes"], only["splits"]) == (["dog"], {"train": {"images": 20, "boxes": 10}})
    assert main([*arguments, "dog, cat", "--overwrite"]) == 0
    assert told(capsys)["classes"] == ["dog", "cat"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["import", "voc", "set", "--out", "out"], "is not a Pascal VOC folder"),
        (["import", "coco", "nowhere", "--out", "out"], "is no COCO dataset"),
        (["import", "yolo", "set", "--out", "out", "--val", "1.5"], "val 1.5 and test 0 leave no train"),
        (["import", "yolo", "set", "--out", "out", "--val", "0.01"], "are too few for a val"),
        (["import", "voc", "bare", "--out", "out"], "bare has no box, and so no class"),
        (["import", "yolo", "set", "--out", "set/classes.txt/out"], "can't write"),
        (["import", "yolo", "set", "--out", "out", "--classes", "owl"], "has no class owl"),
        (["import", "yolo", "set", "--out", "set"], "is no dataset folder"),
        (["export", "set", "--format", "voc", "--out", "out"], "is no dataset folder"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    yolo(tmp_path / "set", num_images=5)
    (tmp_path / "bare").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "bare" / "a.jpg")
    (tmp_path / "bare" / "a.xml").write_text("<annotation/>")
    assert main(["data", *arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == 1 and said in lines[0]
    assert not (tmp_path / "out").exists()


def test_classes_are_different_names(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["data", "import", "yolo", "set", "--out", "out", "--classes", "cat,,dog"])
    assert end.value.code == 2
    assert "'cat,,dog' is no list of different names" in capsys.readouterr().err


def test_places_that_cannot_be_written_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, made = str(yolo(tmp_path / "set", num_images=5)), str(tmp_path / "made")
    assert main(["data", "import", "yolo", source, "--out", made]) == 0
    below_a_file = str(tmp_path / "set" / "classes.txt" / "new.html")
    for arguments in (
        ["import", "yolo", source, "--out", made, "--findings", str(tmp_path)],
        ["export", made, "--format", "coco", "--out", below_a_file],
        ["inspect", made, "--out", below_a_file],
    ):
        capsys.readouterr()
        assert main(["data", *arguments]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
        assert "can't be written to" in line


def test_export_says_what_a_format_cannot_keep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "set").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "set" / "a.jpg")
    crowd = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5], "iscrowd": 1}
    coco = {
        "images": [{"id": 1, "file_name": "a.jpg"}],
        "annotations": [crowd],
        "categories": [{"id": 1, "name": "x\x1b[31m"}],
    }
    (tmp_path / "set" / "set.json").write_text(json.dumps(coco))
    assert main(["data", "import", "coco", str(tmp_path / "set"), "--out", str(tmp_path / "shards")]) == 0
    assert "1 classes (x?[31m)" in capsys.readouterr().out
    assert main(["data", "export", str(tmp_path / "shards"), "--format", "yolo", "--out", str(tmp_path / "yolo")]) == 0
    said = capsys.readouterr()
    assert said.err == (
        "yolo does not keep all: crowds: 1 boxes are left out, as YOLO would take them for single objects\n"
    )
    assert said.out == f"{tmp_path / 'yolo'}: yolo\n  train        1 images        0 boxes\n"


@pytest.mark.skipif(not BCCD.is_dir(), reason=f"no BCCD at {BCCD}")
def test_bccd(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "import", "voc", str(BCCD), "--out", str(tmp_path / "out"), "--json"]) == 0
    found = told(capsys)
    assert {name: split["images"] for name, split in found["splits"].items()} == {  # type: ignore[attr-defined]
        "train": 205, "val": 87, "test": 72
    }  # fmt: skip
    assert found["finding_counts"] == {kinds.NO_AREA: 2}
