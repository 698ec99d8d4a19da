import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from onestage.errors import InputError
from onestage.evaluation.stored import FILE_NAME, Stored, read, write
from onestage.metrics.mean_ap import MeanAP


@pytest.fixture
def stored(scenes: ModuleType) -> Stored:
    found = scenes.scene(1, whole=True)
    found.append(scenes.one([([0, 0, 40, 40], 0)], [], crowd=[True], image_id=77))
    return Stored("a run", "test", "0" * 64, ["a", "b", "c"], 0.25, found)


def test_what_is_read_is_what_was_written(stored: Stored, tmp_path: Path) -> None:
    back = read(write(stored, tmp_path))
    assert back[:-1] == stored[:-1]
    assert [one.image_id for one in back.found] == [one.image_id for one in stored.found]
    for one, before in zip(back.found, stored.found, strict=True):
        assert torch.equal(one.target.boxes, before.target.boxes.float())
        assert torch.equal(one.detections.labels, before.detections.labels)
        assert torch.allclose(one.detections.scores, before.detections.scores.float(), atol=1e-5)
        for mark in ("crowd", "difficult"):
            was = getattr(before.target, mark)
            assert getattr(one.target, mark).tolist() == (
                [False] * len(one.target.labels) if was is None else was.tolist()
            )


def test_the_scores_are_the_same_afterwards(stored: Stored, tmp_path: Path) -> None:
    metric = MeanAP(classes=stored.classes)
    assert metric(read(write(stored, tmp_path)).found) == pytest.approx(metric(stored.found), abs=1e-6)


def test_cocos_own_programs_read_it(stored: Stored, tmp_path: Path) -> None:
    from faster_coco_eval import COCO, COCOeval_faster

    file = write(stored, tmp_path)
    truth = COCO(str(file))
    results = truth.loadRes(json.loads(file.read_text())["detections"])
    evaluator = COCOeval_faster(truth, results, "bbox", print_function=lambda *_: None)
    evaluator.run()
    assert evaluator.stats[1] == pytest.approx(MeanAP(classes=stored.classes)(stored.found)["map_50"], abs=0.01)
    assert truth.imgs[77]["file_name"] == "000077"


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "is no detections.json"), ("{}", "is no detections.json"), ("[]", "is no detections.json"),
     ('{"info": {"format": 9}}', "has format 9, not 1")],
)  # fmt: skip
def test_another_file_is_said_to_be_one(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text(text)
    with pytest.raises(InputError, match=said):
        read(tmp_path / FILE_NAME)
    with pytest.raises(InputError, match="evaluate the run again"):
        read(tmp_path / "missing.json")
