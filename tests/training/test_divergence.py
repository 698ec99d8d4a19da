"""A training that diverges stops at that step, with its weights as they were and the batch to see why."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from safetensors.torch import save_file
from torch import Tensor

from onestage.errors import InputError
from onestage.training.divergence import BadBatch, check_weights
from onestage.training.endings import Diverged
from onestage.training.module import DetectionModule
from onestage.types import XYXY, Batch, Target

from .test_module import Loader, Scale, Seen, batch


class Root(Scale):
    """Finite at zero, with a gradient that is not: the square root."""

    loss_parts = ("box",)

    def losses(self, output: Tensor, targets: Any) -> dict[str, Tensor]:
        return {"box": (output - output.detach()).mean().sqrt()}


@pytest.fixture
def fit(tmp_path: Path) -> Callable[..., None]:
    """Trains a detector on batches, with a checkpoint in ``tmp_path`` after every step."""

    def run(detector: Scale, *batches: Batch, lr: float = 0.5, **options: Any) -> None:
        module = DetectionModule(
            detector=detector,
            optimizer=lambda groups: torch.optim.SGD(groups, lr=lr),
            schedule=lambda epoch, num_epochs: 1.0,
            metric=Seen(),
            seed=3,
            card={"detector": {"num_classes": 1}},
        )
        callback = pl.callbacks.ModelCheckpoint(dirpath=tmp_path, filename="last", every_n_train_steps=1)
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            devices=1,
            logger=False,
            callbacks=[callback],
            num_sanity_val_steps=0,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            **options,
        )
        trainer.fit(module, Loader([*batches]), Loader([batch(5.0)]))

    return run


NAN = float("nan")


def test_a_loss_that_is_not_finite_stops_with_step_parts_and_images(fit: Any, tmp_path: Path) -> None:
    with pytest.raises(Diverged) as stopped:
        fit(Scale(), batch(1.0), batch(1.0, NAN), batch(1.0))
    said = str(stopped.value)
    file = tmp_path / "bad_batch" / "step-1-rank-0.safetensors"
    assert said.startswith("step 1: the loss is nan; rank 0 (box nan, class nan), images 000000, 000001: ")
    assert f"`onestage replay {file}`" in said
    assert "\n" not in said
    assert file.is_file()


def test_weights_and_checkpoint_stay_those_of_the_last_good_step(fit: Any, tmp_path: Path) -> None:
    detector = Scale()
    with pytest.raises(Diverged):
        fit(detector, batch(1.0), batch(NAN))
    # The loss is three times the output, so one step of 0.5 takes 1.5 from the weight of 1.
    assert detector.weight.item() == pytest.approx(-0.5)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 1
    assert saved["state_dict"]["detector.weight"].item() == pytest.approx(-0.5)


def test_the_batch_comes_back_as_it_was(fit: Any, tmp_path: Path) -> None:
    bad = batch(2.0, float("inf"))
    with pytest.raises(Diverged):
        fit(Scale(), bad)
    back = BadBatch.load(tmp_path / "bad_batch" / "step-0-rank-0.safetensors")
    assert torch.equal(back.batch.images, bad.images)
    assert list(back.batch.keys) == ["000000", "000001"]
    for one, other in zip(back.batch.targets, bad.targets, strict=True):
        assert (one.boxes.tolist(), one.labels.tolist(), one.image_id) == (
            other.boxes.tolist(), other.labels.tolist(), other.image_id
        )  # fmt: skip
    assert back.weights["weight"].item() == 1.0
    assert (back.step, back.rank, back.precision) == (0, 0, "32-true")
    assert back.card == {"detector": {"num_classes": 1}}


def test_an_infinite_gradient_of_a_finite_loss_stops_too(fit: Any, tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"step 0: the gradient is not finite, the loss is 0; rank 0 \(box 0\)"):
        fit(Root(), batch(1.0))
    assert (tmp_path / "bad_batch" / "step-0-rank-0.safetensors").is_file()


class TestGradScaler:
    """With a scaler, an infinite gradient is how it finds its scale; a loss that is not finite is still an end."""

    @pytest.fixture
    def scaled(self, fit: Any) -> Callable[..., None]:
        from pytorch_lightning.plugins import MixedPrecision

        def run(detector: Scale, *batches: Batch) -> None:
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
            fit(detector, *batches, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])

        return run

    def test_skips_an_infinite_gradient(self, scaled: Any) -> None:
        detector = Root()
        scaled(detector, batch(1.0))
        assert detector.weight.item() == 1.0

    def test_stops_when_no_scale_helps(self, scaled: Any) -> None:
        """Each infinite gradient halves the scale: 2, 1, and below 1 it is no longer too large a scale."""
        detector = Root()
        with pytest.raises(Diverged, match=r"step 2: the gradient is not finite even with the loss scaled by 0\.5"):
            scaled(detector, *[batch(1.0)] * 4)
        assert detector.weight.item() == 1.0

    def test_goes_on_below_a_scale_of_one_while_gradients_are_finite(self, fit: Any) -> None:
        from pytorch_lightning.plugins import MixedPrecision

        detector = Scale()
        fit(detector, batch(1.0), plugins=[MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", 0.25))])
        assert detector.weight.item() == pytest.approx(-0.5)

    def test_stops_at_a_loss_that_is_not_finite(self, scaled: Any) -> None:
        with pytest.raises(Diverged, match="step 0: the loss is nan"):
            scaled(Scale(), batch(NAN))


def test_weights_that_a_step_ruined_are_not_saved(fit: Any, tmp_path: Path) -> None:
    with pytest.raises(
        Diverged, match=r"step 1: the optimizer's last step left weight not finite: lower optimizer\.lr"
    ):
        fit(Scale(), batch(1e15), lr=1e30)
    assert not (tmp_path / "last.ckpt").exists()


def test_finite_weights_pass() -> None:
    check_weights(Scale(), step=1)


def test_a_full_disk_hides_nothing(fit: Any, tmp_path: Path) -> None:
    (tmp_path / "bad_batch").write_text("in the way")
    with pytest.raises(Diverged, match=r"the loss is nan; rank 0 .*: not saved: .*File exists"):
        fit(Scale(), batch(NAN))


def test_neither_does_a_lack_of_memory(fit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(bad: BadBatch, folder: Path) -> Path:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB\nand more lines")

    monkeypatch.setattr(BadBatch, "save", save)
    with pytest.raises(Diverged, match=r"the loss is nan; .*: not saved: CUDA out of memory\. Tried 2 GiB$"):
        fit(Scale(), batch(NAN))


def test_the_images_seen_are_those_before_the_step(fit: Any, tmp_path: Path) -> None:
    detector = Scale()
    detector.register_buffer("seen", torch.tensor(100))
    with pytest.raises(Diverged):
        fit(detector, batch(1.0, 1.0, 1.0), batch(1.0, NAN))
    assert BadBatch.load(tmp_path / "bad_batch" / "step-1-rank-0.safetensors").weights["seen"].item() == 103


def test_an_image_without_boxes_is_saved_as_well(tmp_path: Path) -> None:
    nothing = Target(XYXY(torch.zeros(0, 4)), torch.zeros(0, dtype=torch.int64), 9)
    bad = BadBatch(
        batch=Batch(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), [nothing], ["k"]),
        weights={}, card={}, step=4, rank=1, seed=5, precision="bf16-mixed",
    )  # fmt: skip
    back = BadBatch.load(bad.save(tmp_path))
    assert back.batch.images.dtype == torch.uint8
    assert back.batch.targets[0].boxes.shape == (0, 4)


@pytest.mark.parametrize("content", ["", json.dumps({"no": "tensors"})])
def test_another_file_is_refused_in_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "file").write_text(content)
    with pytest.raises(InputError, match="holds no batch of a diverged training") as refused:
        BadBatch.load(tmp_path / "file")
    assert "\n" not in str(refused.value)
    with pytest.raises(InputError, match="no-such"):
        BadBatch.load(tmp_path / "no-such")


@pytest.mark.parametrize("metadata", [None, {"onestage": "{broken"}, {"onestage": "{}"}, {"onestage": "[]"}])
def test_other_safetensors_are_refused_in_one_line(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"images": torch.zeros(1)}, file, metadata=metadata)
    with pytest.raises(InputError) as refused:
        BadBatch.load(file)
    assert str(refused.value) == f"{file} holds no batch of a diverged training"


TWO_RANKS = """
import sys
from dataclasses import replace
from pathlib import Path
import pytorch_lightning as pl
import torch
sys.path[:0] = [{package!r}, {tests!r}]
from test_module import Loader, Scale, Seen, batch
from onestage.training.endings import Diverged
from onestage.training.module import DetectionModule

class ByRank(Loader):
    def __iter__(self):
        values = (1.0, float("nan") if torch.distributed.get_rank() == 1 else 1.0, 1.0)
        return iter([replace(batch(value), global_images=2) for value in values])

module = DetectionModule(
    detector=Scale(), optimizer=lambda groups: torch.optim.SGD(groups, lr=0.5), schedule=lambda *_: 1.0,
    metric=Seen(), seed=0, card={{}},
)
folder = Path({folder!r})
trainer = pl.Trainer(
    max_epochs=1, accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False,
    num_sanity_val_steps=0, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    use_distributed_sampler=False,
)
try:
    trainer.fit(module, ByRank([None] * 3), Loader([]))
except Diverged as error:
    (folder / f"rank-{{module.global_rank}}.txt").write_text(f"{{error}}\\n{{module.detector.weight.item()}}")
"""


@pytest.mark.slow
def test_every_rank_stops_with_the_same_words_when_one_diverges(tmp_path: Path) -> None:
    here = Path(__file__).parent
    script = tmp_path / "two_ranks.py"
    package = str(here.parents[1] / "platform")
    script.write_text(TWO_RANKS.format(package=package, tests=str(here), folder=str(tmp_path)))
    subprocess.run([sys.executable, str(script)], timeout=200, check=True)
    first, second = ((tmp_path / f"rank-{rank}.txt").read_text().splitlines() for rank in (0, 1))
    assert first == second
    said, weight = first
    file = tmp_path / "bad_batch" / "step-1-rank-1.safetensors"
    assert said.startswith("step 1: the loss is nan; rank 1 (box nan, class nan), images 000000: ")
    assert str(file) in said
    assert list(file.parent.iterdir()) == [file]
    assert float(weight) == pytest.approx(-0.5)
