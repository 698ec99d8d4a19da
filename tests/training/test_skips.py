"""Whoever watches hears of each image once; the file has them all."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from onestage.training.module import DetectionModule
from onestage.training.skips import Skips
from onestage.types import Skipped


@pytest.fixture
def module() -> DetectionModule:
    one = DetectionModule.__new__(DetectionModule)
    one.__dict__["skipped"] = []
    return one


def test_every_image_is_written_and_told_once(module: DetectionModule, tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    skips = Skips(tmp_path / "skipped.txt", sink=told.append)
    trainer: Any = SimpleNamespace()
    skips.on_train_batch_end(trainer, module)
    assert told == [] and not skips.file.exists()
    module.skipped = [Skipped("000001", "cut short"), Skipped("000002", "is missing")]
    skips.on_train_batch_end(trainer, module)
    skips.on_validation_end(trainer, module)
    module.skipped = [Skipped("000001", "cut short"), Skipped("000003", "is corrupt")]
    skips.on_exception(trainer, module, RuntimeError())
    assert [message["skipped"] for message in told] == [
        ["000001: cut short", "000002: is missing"],
        ["000003: is corrupt"],
    ]
    assert {message["file"] for message in told} == {str(skips.file)}
    lines = skips.file.read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == [
        "000001: cut short",
        "000002: is missing",
        "000001: cut short",
        "000003: is corrupt",
    ]
    assert module.skipped == []
