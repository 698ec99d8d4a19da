"""``onestage data check`` and ``inspect`` as they are typed."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from onestage.cli import main
from onestage.data.scenes import draw

SIDES = ("xmin", "ymin", "xmax", "ymax")


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """Six images of 100x80 with a cat each in two splits; two have a box without area beside it."""
    folder = tmp_path / "voc"
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 256, (80, 100, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "JPEGImages" / f"{number}.jpg")
        boxes = [(11, 11, 60, 70)] + [(20, 20, 20, 50)] * (number < 2)
        objects = "".join(
            "<object><name>cat</name><bndbox>"
            + "".join(f"<{side}>{value}</{side}>" for side, value in zip(SIDES, box, strict=True))
            + "</bndbox></object>"
            for box in boxes
        )
        (folder / "Annotations" / f"{number}.xml").write_text(f"<annotation>{objects}</annotation>")
    (folder / "ImageSets" / "Main" / "train.txt").write_text("0\n1\n2\n3\n")
    (folder / "ImageSets" / "Main" / "val.txt").write_text("4\n5\n")
    return folder


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    draw(folder / "digits", seed=5, num_train=40, num_val=40, num_test=40, size=128)
    return folder / "digits"


def test_findings_as_a_table(voc: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["data", "check", str(voc), "--examples", "1"]) == 0
    said = capsys.readouterr().out
    assert "images: 6, boxes: 6, classes: 1" in said
    (row,) = [line for line in said.splitlines() if "box without area" in line]
    assert row.split("│")[2].strip() == "2"
    assert "left out" in row
    assert "Annotations/0.xml" in said and "Annotations/1.xml" not in said and "and 1 more" in said


def test_findings_as_json(voc: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(voc), "--format", "voc", "--strict", "--json"]) == 1
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["images"] == 6 and told["boxes"] == 6 and told["classes"] == {"cat": 6}
    assert told["splits"]["val"] == {"images": 2, "without_boxes": 0, "boxes": 2, "classes": {"cat": 2}}
    (found,) = told["findings"]
    assert (found["kind"], found["count"]) == ("box without area", 2)
    assert [one["where"] for one in found["examples"]] == ["Annotations/0.xml", "Annotations/1.xml"]
    assert found["remedy"].startswith("left out")


def test_a_clean_set_passes_the_strictest_check(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(digits), "--strict", "--input-size", "128"]) == 0
    assert capsys.readouterr().out.endswith("classes: 10; nothing wrong was found\n")


def test_input_size_and_strides_decide_what_is_too_small(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At 64x128 a scene of 128x128 is halved, and half a stride of 32 is 16: sides under 32 pixels are too short."""
    boxes = []
    for shard in digits.glob("*.tar"):
        with tarfile.open(shard) as tar:
            jsons = [tar.extractfile(info) for info in tar if info.name.endswith(".json")]
            boxes += [box for file in jsons for box in json.loads(file.read())["boxes"]]  # type: ignore[union-attr]
    short = sum(min(right - left, bottom - top) < 32 for left, top, right, bottom in boxes)
    assert 0 < short < len(boxes)
    arguments = ["data", "check", str(digits), "--strict", "--json", "--strides", "64,32"]
    assert main([*arguments, "--input-size", "64x128"]) == 1
    (found,) = json.loads(capsys.readouterr().out)["findings"]
    assert (found["kind"], found["count"]) == ("box too small for the input", short)
    assert main([*arguments, "--input-size", "2048"]) == 0


def test_inspecting_writes_a_page_and_prints_the_numbers(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["data", "inspect", str(digits), "--images", "3"]) == 0
    said = capsys.readouterr().out
    assert "written: inspect.html" in said
    row = next(line for line in said.splitlines() if "images" in line)
    assert [cell.strip() for cell in row.split("│")[1:-1]] == ["images", "40", "40", "40", "120"]
    page = (tmp_path / "inspect.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and page.count("<figure>") == 9


def test_inspecting_labelled_files_as_json(voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "pages" / "cats.html"
    assert main(["data", "inspect", str(voc), "--out", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["out"], told["name"], told["images"], told["num_findings"]) == (str(out), "voc", 6, 2)
    assert out.is_file()


@pytest.mark.parametrize("verb", ["check", "inspect"])
@pytest.mark.parametrize(
    ("place", "more", "said"),
    [
        ("nowhere", [], "there is nothing at nowhere"),
        (".", [], "is no dataset folder"),
        ("digits", ["--classes", "1,2"], "whose classes are settled"),
    ],
)
def test_a_wrong_place_is_one_line(
    verb: str,
    place: str,
    more: list[str],
    said: str,
    digits: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(digits.parent)
    assert main(["data", verb, place, *more]) == 2
    told = capsys.readouterr()
    assert said in told.err
    assert told.err.count("\n") == 1 and told.out == ""
    assert not Path("inspect.html").exists()


def test_a_name_cannot_steer_the_terminal(voc: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (voc / "Annotations").iterdir():
        path.write_text(path.read_text().replace("cat", "c[red]at\x9b2J"))
    assert main(["data", "check", str(voc)]) == 0
    assert main(["data", "inspect", str(voc), "--out", str(voc / "page.html")]) == 0
    said = capsys.readouterr().out
    assert "c[red]at?2J" in said and "\x9b" not in said


def test_a_page_needs_a_pages_name(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "inspect", str(digits), "--out", str(digits / "dataset.json")]) == 2
    assert "give a file that ends in .html" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [
        ["--input-size", "0"],
        ["--input-size", "416x"],
        ["--strides", "8,,16"],
        ["--strides", "0"],
        ["--classes", "a,a"],
        ["--format", "csv"],
    ],
)
def test_options_are_checked(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["data", "check", "somewhere", *wrong])
    assert end.value.code == 2
    assert wrong[0] in capsys.readouterr().err
