"""Where a training stands, as another thread sees it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn

from onestage.training.module import DetectionModule
from onestage.training.pulse import Now, Pulse, Start
from onestage.types import XYXY, Batch, Detections, Target


class OneWeight(nn.Module):
    """Loss: the mean of the image times a weight; finds nothing."""

    loss_parts = ("box",)

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        return images * self.weight

    def losses(self, output: Tensor, targets: Any) -> dict[str, Tensor]:
        return {"box": output.mean()}

    def detect(self, output: Tensor) -> list[Detections]:
        none = torch.zeros(0)
        return [Detections(XYXY(torch.zeros(0, 4)), none, none.long()) for _ in output]


class Loader:
    """``length`` batches of two grey images; ``seen`` is asked where the training stands when the next is wanted."""

    def __init__(self, length: int, seen: Callable[[], object] = lambda: None) -> None:
        self.length = length
        self.seen = seen

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Any:
        for _ in range(self.length):
            self.seen()
            targets = [Target(XYXY(torch.zeros(0, 4)), torch.zeros(0, dtype=torch.int64), image_id=n) for n in range(2)]
            yield Batch(torch.full((2, 3, 8, 8), 0.5), targets, ["a", "b"])


class Asker(Callback):
    """Asks the pulse within the training's own hooks; comes behind it in the list of callbacks."""

    def __init__(self, seen: Callable[[], object]) -> None:
        self.seen = seen

    def on_train_batch_start(self, *_: Any) -> None:
        self.seen()

    def on_before_backward(self, *_: Any) -> None:
        self.seen()

    def on_after_backward(self, *_: Any) -> None:
        self.seen()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen()

    def on_validation_batch_start(self, *_: Any) -> None:
        self.seen()

    def on_validation_end(self, *_: Any) -> None:
        self.seen()


def trained(
    folder: Path, *callbacks: Callback, loader: Loader, val: Loader | None = None, resume: Path | None = None,
    max_epochs: int = 1,
) -> pl.Trainer:  # fmt: skip
    module = DetectionModule(
        detector=OneWeight(),
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1),
        schedule=lambda epoch, num_epochs: 1.0,
        metric=lambda found: {},
        seed=0,
        card={},
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=max_epochs,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )
    trainer.fit(module, loader, val, ckpt_path=resume, weights_only=True)
    return trainer


@pytest.fixture
def seen() -> list[Now]:
    return []


class TestPulse:
    def test_each_part_of_a_step_has_its_name(self, seen: list[Now], tmp_path: Path) -> None:
        pulse = Pulse()
        assert pulse.now()["doing"] == "setting up"
        trained(tmp_path, pulse, Asker(lambda: seen.append(pulse.now())), loader=Loader(2))
        assert [now["doing"] for now in seen] == [
            "forward of step 1",
            "all-reduce/backward of step 1",
            "update of step 1",
            "waiting for data of step 2",
            "forward of step 2",
            "all-reduce/backward of step 2",
            "update of step 2",
            "waiting for data of step 3",
        ]
        assert [now["step"] for now in seen] == [0, 0, 0, 1, 1, 1, 1, 2]
        assert [now["warm"] for now in seen] == [False] * 3 + [True] * 5
        marks = [now["marks"] for now in seen]
        assert marks == list(range(marks[0], marks[0] + 8))
        assert [now["since"] for now in seen] == sorted(now["since"] for now in seen)

    def test_a_loader_is_asked_while_its_step_waits(self, seen: list[Now], tmp_path: Path) -> None:
        pulse = Pulse()
        trained(tmp_path, pulse, loader=Loader(3, lambda: seen.append(pulse.now())))
        assert [now["doing"] for now in seen][1:] == ["waiting for data of step 2", "waiting for data of step 3"]

    def test_places_grow_and_batches_of_a_validation_do_not_count(self, seen: list[Now], tmp_path: Path) -> None:
        """A rank with three batches to validate stands at the end where one with a single batch does."""
        ends = []
        for length in (1, 3):
            seen.clear()
            pulse = Pulse()
            asker = Asker(lambda pulse=pulse: seen.append(pulse.now()))  # type: ignore[misc]
            trained(tmp_path, pulse, asker, loader=Loader(2), val=Loader(length))
            places = [now["place"] for now in seen]
            assert places == sorted(places)
            assert f"validation, batch {length}" in [now["doing"] for now in seen]
            ends.append((seen[-1]["doing"], seen[-1]["place"]))
            assert len({now["marks"] for now in seen}) == len(seen)
        assert ends[0] == ends[1]
        assert ends[0][0] == "end of the validation"

    def test_the_training_is_the_same(self, tmp_path: Path) -> None:
        with_pulse = trained(tmp_path, Pulse(), loader=Loader(3))
        without = trained(tmp_path, loader=Loader(3))
        weights = [dict(one.lightning_module.named_parameters())["detector.weight"] for one in (with_pulse, without)]
        assert weights[0] == weights[1] != 1.0


class TestStart:
    def test_a_rank_says_where_it_starts(self, tmp_path: Path) -> None:
        told: list[dict[str, Any]] = []
        start = Start(told.append, host="a", batch_size=2, global_batch=None)
        trainer = trained(tmp_path, start, loader=Loader(3))
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        start = Start(told.append, host="a", batch_size=2, global_batch=16)
        trained(tmp_path, start, loader=Loader(3), resume=tmp_path / "last.ckpt", max_epochs=2)
        first, second = (one["started"] for one in told)
        assert (first["rank"], first["host"], first["world_size"], first["step"], first["images"]) == (0, "a", 1, 0, 0)
        assert (second["step"], second["images"]) == (3, 6)
        assert (first["global_batch"], second["global_batch"]) == (2, 16)
