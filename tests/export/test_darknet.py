"""A trained detector as a .weights file that gives the same answers when it is read back."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from onestage.cli import main
from onestage.config import build, compose, options
from onestage.export.darknet import CFGS, cfg_of


def trained(folder: Path, name: str, *overrides: str) -> tuple[Path, Any]:
    """A checkpoint as a training leaves it, and its detector; statistics and biases unlike those at birth."""
    all_overrides = [f"detector={name}", "detector.num_classes=2", *overrides]
    config = compose("train", all_overrides)
    torch.manual_seed(1)
    detector = build(config["detector"])
    for module in detector.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    if hasattr(detector, "seen"):
        detector.seen.fill_(640)
    card = {"detector": config["detector"], "data": config["data"], "overrides": all_overrides}
    checkpoint = {
        "state_dict": {f"detector.{key}": value for key, value in detector.state_dict().items()},
        "onestage": card | {"classes": ["cat", "dog"], "threshold": 0.25},
    }
    torch.save(checkpoint, folder / "last.ckpt")
    return folder / "last.ckpt", detector.eval()


@pytest.fixture
def exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    def export(*arguments: str) -> dict[str, Any]:
        assert main(["export", *arguments, "--format", "darknet", "--json", "tracking=none"]) == 0
        result: dict[str, Any] = json.loads(capsys.readouterr().out)
        return result

    return export


NARROW = ("detector.width=0.125", "detector.input_size=[96,96]")


@pytest.mark.parametrize("name", ["yolov1_darknet", "yolov2_tiny_voc", "yolov3_tiny", "yolov4_tiny"])
def test_reading_it_back_gives_the_same_raw_maps(
    exported: Callable[..., dict[str, Any]], tmp_path: Path, name: str
) -> None:
    small = ("detector.width=0.125", "detector.input_size=[128,128]")
    checkpoint, detector = trained(tmp_path, name, *small)
    result = exported(str(checkpoint))
    assert result["out"] == str(tmp_path / "last.weights")
    overrides = [f"detector={name}", "detector.num_classes=2", *small, f"detector.weights={result['out']}"]
    back = build(compose("train", overrides)["detector"]).eval()
    images = torch.rand(2, 3, 128, 128)
    with torch.no_grad():
        for one, other in zip(back.raw_maps(images), detector.raw_maps(images), strict=True):
            assert torch.equal(one, other)
    assert int(back.seen) == 640


def test_says_what_was_written(
    exported: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, detector = trained(tmp_path, "yolov3_tiny", *NARROW)
    result = exported(str(checkpoint), "--out", str(tmp_path / "out" / "mine.weights"))
    tensors = [value for name, value in detector.state_dict().items() if name.rpartition(".")[2] in KEPT]
    assert result["floats"] == sum(value.numel() for value in tensors)
    assert result["bytes"] == (tmp_path / "out" / "mine.weights").stat().st_size == 20 + 4 * result["floats"]
    assert result["classes"] == ["cat", "dog"]
    assert result["cfg"] is None, "narrower than any cfg of Darknet"

    assert main(["export", str(checkpoint), "--format", "darknet", "tracking=none"]) == 0
    said = capsys.readouterr().out
    assert f"{result['floats']:,} floats" in said
    assert "classes=2 (cat, dog)" in said
    assert "no cfg of Darknet" in said


KEPT = ("weight", "bias", "running_mean", "running_var")


def test_at_full_width_it_names_the_cfg(exported: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    checkpoint, _ = trained(tmp_path, "yolov3_tiny")
    result = exported(str(checkpoint))
    assert result["cfg"] == "yolov3-tiny.cfg"
    # yolov3-tiny.cfg has 8,858,734 floats with 80 classes; each class costs 3 outputs a scale of 512 and 256 + 1.
    assert result["floats"] == 8_858_734 - (80 - 2) * 3 * (512 + 1 + 256 + 1)


@pytest.mark.parametrize(
    ("overrides", "cfg"),
    [
        (("detector=yolov2_voc",), "yolov2-voc.cfg"),
        (("detector=yolov2",), "yolov2.cfg"),
        (("experiment=yolov4_tiny_paper",), "yolov4-tiny.cfg"),
        (("detector=yolov4_tiny", "detector.input_size=[320,320]", "detector.nms_iou=0.6"), "yolov4-tiny.cfg"),
        (("detector=yolov3", "detector=yolov3_tiny"), "yolov3-tiny.cfg"),
        (("detector=yolov3", "detector.neck.spp=true"), "yolov3-spp.cfg"),
        (("detector=yolov3_tiny", "detector.backbone.width=0.5"), None),
        (("detector=yolov4_tiny", "detector.masks=[[0,1,2],[3,4,5]]"), None),
        (("detector=yolov1",), None),
    ],
)
def test_the_cfg_is_that_of_the_network_however_it_was_chosen(overrides: tuple[str, ...], cfg: str | None) -> None:
    assert cfg_of(compose("train", list(overrides))["detector"]) == cfg


def test_every_cfg_is_that_of_a_detector() -> None:
    assert set(CFGS) <= set(options("detector"))


def test_a_detector_that_darknet_does_not_have_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, _ = trained(tmp_path, "ssd300", "detector.width=0.125")
    assert main(["export", str(checkpoint), "--format", "darknet", "tracking=none"]) == 2
    said = capsys.readouterr().err
    assert "last.ckpt holds SSD, which Darknet does not have" in said
    assert "--format darknet is for yolov1_darknet, " in said
    assert said.count("\n") == 1
    assert not (tmp_path / "last.weights").exists()


def test_a_file_that_is_no_checkpoint_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "some.weights").write_bytes(b"\0" * 40)
    assert main(["export", str(tmp_path / "some.weights"), "--format", "darknet", "tracking=none"]) == 2
    said = capsys.readouterr().err
    assert "some.weights is not a checkpoint of onestage" in said
    assert said.count("\n") == 1


def test_a_run_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "no-such-run", "--format", "darknet", "tracking=none"]) == 2
    said = capsys.readouterr().err
    assert "no run 'no-such-run'" in said
    assert said.count("\n") == 1
