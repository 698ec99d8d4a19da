"""A batch that diverged, replayed: which image, or the weights themselves."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from onestage.cli import main
from onestage.config import build, compose
from onestage.training.divergence import BadBatch
from onestage.types import XYXY, Batch, Target

SIDE = 64
HUGE = 1e25  # px: the area of such a box is infinite in float32, and so is YOLOv3's weight for it


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """The file of a step of yolov3_tiny with one image a box; ``poison`` acts on its weights."""

    def save(*boxes: list[float], poison: Callable[[dict[str, Any]], None] = lambda weights: None) -> Path:
        overrides = ["detector=yolov3_tiny", "detector.width=0.125", "detector.num_classes=2"]
        node = compose("train", [*overrides, f"detector.input_size=[{SIDE},{SIDE}]"])["detector"]
        torch.manual_seed(0)
        weights = build(node).state_dict()
        poison(weights)
        targets = [Target(XYXY(torch.tensor([one])), torch.tensor([1]), 70 + n) for n, one in enumerate(boxes)]
        images = torch.randint(0, 256, (len(boxes), 3, SIDE, SIDE), dtype=torch.uint8)
        batch = Batch(images, targets, [f"image-{n}" for n in range(len(boxes))])
        return BadBatch(
            batch=batch, weights=weights, card={"detector": node}, step=12, rank=1, seed=0, precision="32-true"
        ).save(tmp_path)

    return save


GOOD = [4.0, 4, 40, 50]


def refused(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def replayed(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], str]:
    assert main(["replay", str(path), "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out, parse_constant=refused)
    assert main(["replay", str(path)]) == 0
    return result, capsys.readouterr().out


def test_names_the_one_image_whose_box_makes_the_loss_infinite(
    saved: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    result, said = replayed(saved(GOOD, [0.0, 0, HUGE, HUGE], GOOD), capsys)
    assert [image["finite"] for image in result["images"]] == [True, False, True]
    assert not result["batch"]["finite"]
    assert result["weights"] == []
    assert (result["step"], result["rank"], result["detector"]) == (12, 1, "YOLOv3")
    assert [image["image_id"] for image in result["images"]] == [70, 71, 72]
    assert said.splitlines()[-1] == "not finite alone: image-1"
    bad = result["images"][1]
    assert {"nan", "inf"} & {*bad["parts"].values(), bad["grad_norm"]}


def test_the_only_image_of_a_share_is_not_said_to_be_every_image(
    saved: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, said = replayed(saved([0.0, 0, HUGE, HUGE]), capsys)
    assert said.splitlines()[-1] == "not finite: image-0, the only image there: see its boxes, or lower optimizer.lr"


def test_blames_the_weights_where_they_were_not_finite(
    saved: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def poison(weights: dict[str, Any]) -> None:
        weights["head.out.0.bias"][0] = float("nan")

    result, said = replayed(saved(GOOD, GOOD, poison=poison), capsys)
    assert result["weights"] == ["head.out.0.bias"]
    assert "the weights were not finite before this step (head.out.0.bias)" in said


def test_statistics_that_the_bad_batch_itself_left_blame_nobody(
    saved: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def poison(weights: dict[str, Any]) -> None:
        weights[next(name for name in weights if name.endswith("running_mean"))][:] = float("nan")

    result, said = replayed(saved(GOOD, GOOD, poison=poison), capsys)
    assert result["weights"] == []
    assert result["batch"]["finite"]
    assert "finite on this machine" in said


def test_another_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(tmp_path / "no-such")]) == 2
    said = capsys.readouterr().err
    assert "no-such holds no batch of a diverged training" in said
    assert said.count("\n") == 1
