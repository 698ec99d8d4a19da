"""``onestage anchors``: what it prints is what ``onestage train`` takes, and the numbers are true."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import box_iou

from onestage.cli import main
from onestage.config import CONF, build, compose
from onestage.data.formats.record import Record, Source
from onestage.data.pack import pack

SHAPES = [(12, 20), (24, 16), (40, 44), (64, 30), (70, 90), (120, 100), (100, 180), (200, 120), (190, 210)]
"""Widths and heights in pixels of an image of 416 wide and 208 high, by area; two are too high for it."""
YOLOV3 = [(10, 13), (16, 30), (33, 23), (30, 61), (62, 45), (59, 119), (116, 90), (156, 198), (373, 326)]
"""arXiv:1804.02767, Sec. 2.3."""


@pytest.fixture(scope="session")
def shaped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train has each of ``SHAPES`` twice on 416x416 images; val one box of 50x25 on an image of 416x208."""
    folder = tmp_path_factory.mktemp("shaped set")  # a folder that a shell takes for two words
    Image.fromarray(np.zeros((416, 416, 3), np.uint8)).save(folder / "square.png")
    Image.fromarray(np.zeros((208, 416, 3), np.uint8)).save(folder / "wide.png")

    def record(name: str, height: int, shapes: list[tuple[int, int]]) -> Record:
        count, no = len(shapes), [False] * len(shapes)
        boxes = [(1.0, 2.0, 1.0 + wide, 2.0 + high) for wide, high in shapes]
        return Record(folder / name, 416, height, boxes, [0] * count, no, no, source=name)

    splits = {
        "train": [record("square.png", 416, SHAPES[n % 3 :: 3]) for n in range(6)],
        "val": [record("wide.png", 208, [(50, 25)])],
        "none": [record("wide.png", 208, [])],
    }
    pack(Source("shaped", ("thing",), splits, []), folder / "set")
    return folder / "set"


def report(capsys: pytest.CaptureFixture[str], root: Path, *arguments: str) -> dict[str, Any]:
    assert main(["anchors", str(root), *arguments, "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def best(anchors: Any) -> torch.Tensor:
    """IoU of each of ``SHAPES`` with its best anchor, by torchvision."""
    sizes, anchors = torch.tensor(SHAPES, dtype=torch.float64), torch.tensor(anchors, dtype=torch.float64)
    return box_iou(*(torch.cat((torch.zeros_like(one), one), dim=1) for one in (sizes, anchors))).amax(dim=1)


@pytest.mark.parametrize("wrong", [("--out", "recipe"), ("--out", ""), ("--plot", "plot.txt"), ("--plot", "")])
def test_files_are_named_for_what_they_hold(
    wrong: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Told before anything is read or fitted."""
    option, name = wrong
    assert main(["anchors", "nowhere", option, str(tmp_path / name)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"give a file that ends in .{'yaml' if option == '--out' else 'png'}" in line


def test_the_report_tells_what_was_there_and_what_is_better(capsys: pytest.CaptureFixture[str], shaped: Path) -> None:
    found = report(capsys, shaped)
    assert (found["split"], found["size"], found["num_images"], found["num_boxes"]) == ("train", [416, 416], 6, 18)
    assert found["fitted"] == {
        "anchors": [list(shape) for shape in SHAPES],
        "average_iou": 1.0,
        "best_possible_recall": 1.0,
    }
    first = found["defaults"][0]
    assert first["detectors"] == ["yolov3", "yolov3_spp"]
    assert first["anchors"] == [list(prior) for prior in YOLOV3]
    assert first["average_iou"] == pytest.approx(float(best(YOLOV3).mean()))
    assert first["best_possible_recall"] == pytest.approx(float((best(YOLOV3) >= 0.5).double().mean()))
    assert [one["detectors"] for one in found["defaults"][1:]] == [["yolov4"]]
    assert found["detector"] == "yolov3"


@pytest.mark.parametrize(
    ("arguments", "k", "size"),
    [
        (["--detector", "yolov3_tiny"], 6, [416, 416]),
        pytest.param(["--detector", "yolov4"], 9, [608, 608], marks=pytest.mark.slow),
        (["--detector", "yolov2_tiny_voc"], 5, [416, 416]),
        pytest.param(["--detector", "yolov4_tiny", "--size", "320x640"], 6, [320, 640], marks=pytest.mark.slow),
        (["--detector", "yolov3", "-k", "7", "--size", "96"], 7, [96, 96]),
        pytest.param(["--detector", "yolov2", "-k", "3"], 3, [416, 416], marks=pytest.mark.slow),
    ],
)
def test_the_overrides_build_a_detector_with_these_priors(
    capsys: pytest.CaptureFixture[str], shaped: Path, arguments: list[str], k: int, size: list[int]
) -> None:
    found = report(capsys, shaped, *arguments)
    assert found["size"] == size
    node = compose("train", [*found["overrides"], "detector.width=0.125", f"data.root={shaped}"])["detector"]
    detector = build(node)
    assert detector.input_size == size
    assert detector.priors.shape == (k, 2)
    anchors = torch.tensor(found["fitted"]["anchors"])
    torch.testing.assert_close(detector.priors, anchors, rtol=0, atol=0.006)  # told to a hundredth
    assert sorted(number for mask in detector.masks for number in mask) == list(range(k))
    height, width = size
    images = torch.rand(1, 3, height, width)
    assert detector(images).boxes.shape[1] == sum(
        len(mask) * (height // stride) * (width // stride)
        for mask, stride in zip(detector.masks, detector.strides, strict=True)
    )


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_the_printed_line_survives_a_shell(capsys: pytest.CaptureFixture[str], shaped: Path, shell: str) -> None:
    """Brackets and commas are a shell's own, and so is the space in the folder's name."""
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    assert main(["anchors", str(shaped), "--detector", "yolov4_tiny"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    said = subprocess.run(
        [shell, "-c", f'onestage() {{ printf "%s\\n" "$@"; }}\n{line}'],
        capture_output=True,
        text=True,
        check=True,
        timeout=20,
    ).stdout.splitlines()
    assert said == shlex.split(line)[1:]
    assert said[0] == "train"
    config = compose("train", said[1:])
    assert config["data"]["root"] == str(shaped)
    assert config["detector"]["masks"] == [[0, 1, 2], [3, 4, 5]]
    assert config["detector"]["num_classes"] == 1


def test_images_come_to_the_size_with_their_aspect_or_without(capsys: pytest.CaptureFixture[str], shaped: Path) -> None:
    """50x25 of 416x208: on 832x832 twice as large, or stretched four times as high."""
    common = ("--split", "val", "--size", "832", "-k", "1", "--detector", "yolov2")
    assert report(capsys, shaped, *common)["fitted"]["anchors"] == [[100.0, 49.98]]  # 3.125 and 1.562 cells of 32
    stretched = report(capsys, shaped, *common, "--fit", "stretch")
    assert stretched["fitted"]["anchors"] == [[100.0, 100.0]]
    assert compose("train", stretched["overrides"])["data"]["fit"] == "stretch"


def test_the_table_shows_it_to_people(capsys: pytest.CaptureFixture[str], shaped: Path) -> None:
    assert main(["anchors", str(shaped), "--detector", "yolov3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "18 boxes of 6 images in train, letterboxed to 416x416"
    (row,) = [line for line in lines if "fitted" in line]
    assert "1.000" in row and "100.0%" in row and "12x20" in row
    (row,) = [line for line in lines if "yolov3 " in line and "│" in line]
    assert f"{float(best(YOLOV3).mean()):.3f}" in row
    priors = ",".join(f"[{wide},{high}]" for wide, high in SHAPES)
    assert lines[-1].endswith(f" detector=yolov3 'detector.priors=[{priors}]'")


def test_a_recipe_is_written_that_train_takes_by_name(
    capsys: pytest.CaptureFixture[str], shaped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conf = shutil.copytree(CONF, tmp_path / "conf")
    out = conf / "experiment" / "shapes.yaml"
    found = report(capsys, shaped, "--detector", "yolov4_tiny", "--size", "320", "--out", str(out))
    for module in ("compose", "folder"):
        monkeypatch.setattr(sys.modules[f"onestage.config.{module}"], "CONF", conf)
    by_name = compose("train", ["experiment=shapes", f"data.root={shaped}"])
    by_overrides = compose("train", [*found["overrides"], f"data.root={shaped}"])
    assert by_name["detector"] == by_overrides["detector"]
    assert by_name["data"] == by_overrides["data"]


def test_a_picture_shows_boxes_and_anchors(capsys: pytest.CaptureFixture[str], shaped: Path, tmp_path: Path) -> None:
    file = tmp_path / "new" / "anchors.png"
    report(capsys, shaped, "--detector", "yolov3", "--plot", str(file))
    pixels = np.asarray(Image.open(file).convert("RGB")).reshape(-1, 3)
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):
        assert (pixels == colour).all(axis=1).sum() > 100


def test_the_same_seed_gives_the_same(capsys: pytest.CaptureFixture[str], shaped: Path) -> None:
    arguments = ("-k", "4", "--detector", "yolov3", "--seed", "5")
    assert report(capsys, shaped, *arguments) == report(capsys, shaped, *arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--detector", "ssd300"],
            "ssd300 has no priors to fit; there are: yolov2, yolov2_tiny_voc, yolov2_voc, yolov3",
        ),
        (["--detector", "yolov9"], "no detector 'yolov9'; there are: "),
        (["--detector", "yolov3", "-k", "2"], "the detector has 3 levels, which need a prior each"),
        (["--detector", "yolov3", "-k", "10"], "10 anchors need as many boxes of different sizes; train of "),
        (["--detector", "yolov3", "--size", "100"], "multiples of 32, got 100x100"),
        (["--detector", "yolov3", "--split", "test"], "has no split 'test': choose one of train, val, none"),
        (["--detector", "yolov3", "--split", "none"], "has no box to fit anchors to: name another split or dataset"),
    ],
)
def test_what_cannot_be_fitted_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], shaped: Path, arguments: list[str], said: str
) -> None:
    assert main(["anchors", str(shaped), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err
    assert captured.err.count("\n") == 1, captured.err


def test_a_folder_that_is_no_dataset_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["anchors", str(tmp_path), "--detector", "yolov3"]) == 2
    assert "is no dataset folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-k", "0"], "'0' is no whole number from 1 on"),
        (["-k", "many"], "'many' is no whole number from 1 on"),
        (["--size", "416x"], "'416x' is neither a side, as 416, nor height and width, as 320x640"),
        (["--size", "0"], "'0' is neither a side"),
    ],
)
def test_values_that_are_none_are_refused_at_once(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["anchors", "no-such-folder", *arguments])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom onestage.cli import main\n"
        "try:\n    main(['anchors', '--help'])\nexcept SystemExit:\n    pass\n"
        "print([name for name in ('torch', 'numpy', 'hydra', 'matplotlib', 'cv2') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout.splitlines()[-1] == "[]"
