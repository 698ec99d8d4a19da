"""Checkpoints are whole or not there, beside the training, and what goes wrong with one never ends it."""

import os
import shutil
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from onestage.errors import InputError
from onestage.training import checkpoints
from onestage.training.callbacks import Ema
from onestage.training.checkpoint_files import damage, newest, step_of
from onestage.training.checkpoints import Checkpoints, Snapshot, Writer
from onestage.training.module import DetectionModule

from .test_callbacks import Loader, Noisy


def state_of(step: int, *, numbers: int = 1000) -> dict[str, Any]:
    return {"global_step": step, "state_dict": {"weight": torch.full((numbers,), float(step))}}


def write(writer: Writer, step: int, *, best: bool = False, numbers: int = 1000) -> None:
    writer.save_checkpoint(state_of(step, numbers=numbers), writer.folder / "last.ckpt", storage_options={"best": best})
    assert writer.wait()


def weight_of(path: Path) -> Tensor:
    weight: Tensor = torch.load(path, weights_only=True)["state_dict"]["weight"]
    return weight


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class TestSnapshot:
    def test_holds_the_state_of_its_moment(self) -> None:
        weight, steps = torch.ones(3), [1, 2]
        snapshot = Snapshot()
        snapshot.take({"weight": weight, "steps": steps, "nested": {"moment": (weight,)}})
        weight.add_(1)
        steps.append(3)
        assert snapshot.state["steps"] == [1, 2]
        assert snapshot.state["weight"].tolist() == snapshot.state["nested"]["moment"][0].tolist() == [1, 1, 1]

    def test_uses_its_memory_again(self) -> None:
        snapshot = Snapshot()
        snapshot.take({"weight": torch.ones(3)})
        place = snapshot.state["weight"].data_ptr()
        snapshot.take({"weight": torch.zeros(3)})
        assert snapshot.state["weight"].data_ptr() == place
        assert snapshot.state["weight"].tolist() == [0, 0, 0]

    def test_keeps_kinds_strides_and_versions(self) -> None:
        layer = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        before = layer.state_dict()
        snapshot = Snapshot()
        snapshot.take({"state_dict": before})
        after = snapshot.state["state_dict"]
        assert type(after) is OrderedDict and after._metadata == before._metadata  # type: ignore[attr-defined]
        assert after["weight"].stride() == before["weight"].stride() == (12, 1, 6, 3)


class TestFiles:
    def test_the_last_k_are_kept_under_their_steps(self, tmp_path: Path) -> None:
        writer = Writer(tmp_path, keep=3)
        for step in (1, 2, 3, 4, 5):
            write(writer, step)
        assert names(tmp_path) == ["last-3.ckpt", "last-4.ckpt", "last.ckpt"]
        assert [step_of(tmp_path / name) for name in names(tmp_path)] == [3, 4, 5]
        assert writer.notes == []

    def test_one_means_the_last_alone(self, tmp_path: Path) -> None:
        writer = Writer(tmp_path, keep=1)
        write(writer, 1)
        write(writer, 2)
        assert names(tmp_path) == ["last.ckpt"]

    def test_a_new_process_keeps_what_the_one_before_wrote_last(self, tmp_path: Path) -> None:
        write(Writer(tmp_path, keep=2), 1)
        write(Writer(tmp_path, keep=2), 2)
        assert names(tmp_path) == ["last-1.ckpt", "last.ckpt"]

    def test_the_best_stays_when_the_last_goes_on(self, tmp_path: Path) -> None:
        writer = Writer(tmp_path, keep=1)
        write(writer, 1)
        write(writer, 2, best=True)
        write(writer, 3)
        assert step_of(tmp_path / "best.ckpt") == 2
        assert step_of(tmp_path / "last.ckpt") == 3
        write(writer, 4, best=True)
        assert step_of(tmp_path / "best.ckpt") == 4

    def test_a_file_system_without_links_gets_copies(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: Any) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
        writer = Writer(tmp_path, keep=2)
        write(writer, 1, best=True)
        write(writer, 2)
        assert names(tmp_path) == ["best.ckpt", "last-1.ckpt", "last.ckpt"]
        assert writer.notes == []

    def test_what_a_killed_process_left_is_cleared_away(self, tmp_path: Path) -> None:
        (tmp_path / ".abc.partial").write_bytes(b"half")
        write(Writer(tmp_path, keep=1), 1)
        assert names(tmp_path) == ["last.ckpt"]


class TestNewest:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        writer = Writer(tmp_path, keep=3)
        for step in (8, 9, 10):
            write(writer, step)
        return tmp_path

    def test_of_whole_ones_the_last(self, folder: Path) -> None:
        told: list[str] = []
        assert newest(folder, told.append) == folder / "last.ckpt"
        assert told == []

    def test_a_flipped_byte_of_a_weight_is_seen(self, folder: Path) -> None:
        """torch.load is content with it."""
        content = bytearray((folder / "last.ckpt").read_bytes())
        place = content.index(torch.full((4,), 10.0).numpy().tobytes())
        content[place] ^= 1
        (folder / "last.ckpt").write_bytes(content)
        assert weight_of(folder / "last.ckpt")[0] != 10
        told: list[str] = []
        assert newest(folder, told.append) == folder / "last-9.ckpt"
        (line,) = told
        assert "last.ckpt is damaged (the checksum of its record" in line

    @pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
    def test_truncated_ones_are_passed_over_and_named(self, folder: Path, share: float) -> None:
        for name in ("last.ckpt", "last-9.ckpt"):
            path = folder / name
            content = path.read_bytes()
            path.unlink()  # other names of the file keep it whole
            path.write_bytes(content[: int(len(content) * share)])
        told: list[str] = []
        found = newest(folder, told.append)
        assert found is not None and step_of(found) == 8
        assert [line.split()[1] for line in told] == [str(folder / "last.ckpt"), str(folder / "last-9.ckpt")]

    def test_steps_are_numbers(self, tmp_path: Path) -> None:
        for step in (9, 10):
            write(Writer(tmp_path, keep=1), step)
            (tmp_path / "last.ckpt").rename(tmp_path / f"last-{step}.ckpt")
        assert newest(tmp_path, print) == tmp_path / "last-10.ckpt"

    def test_a_zip_file_of_something_else_is_none(self, tmp_path: Path) -> None:
        shutil.make_archive(str(tmp_path / "last"), "zip", tmp_path)
        assert damage(tmp_path / "last.zip") == "it is no checkpoint"

    def test_no_folder_no_checkpoint(self, tmp_path: Path) -> None:
        assert newest(tmp_path / "none", print) is None

    def test_a_damaged_last_is_not_kept(self, folder: Path) -> None:
        (folder / "last.ckpt").unlink()
        (folder / "last.ckpt").write_bytes(b"half")
        write(Writer(folder, keep=3), 11)
        assert names(folder) == ["last-8.ckpt", "last-9.ckpt", "last.ckpt"]
        assert step_of(folder / "last.ckpt") == 11


KILLED = """
import sys, torch
from pathlib import Path
from onestage.training.checkpoints import Writer
writer = Writer(Path(sys.argv[1]), keep=2)
print("ready", flush=True)
for step in range(1, 10**6):
    state = {"global_step": step, "state_dict": {"weight": torch.full((4_000_000,), float(step))}}
    writer.save_checkpoint(state, None)
"""


@pytest.mark.slow
def test_kill_9_at_any_time_leaves_a_whole_last_checkpoint(tmp_path: Path) -> None:
    """Sixteen megabytes at a time without a pause: nearly every moment is one of writing."""
    half_written = 0
    for number in range(4):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        end = time.monotonic() + 60
        while not (tmp_path / "last.ckpt").is_file() and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(0.5 + 0.07 * number)
        process.kill()
        process.wait(10)
        half_written += any(path.suffix == ".partial" for path in tmp_path.iterdir())
        assert damage(tmp_path / "last.ckpt") is None
        step = step_of(tmp_path / "last.ckpt")
        assert (weight_of(tmp_path / "last.ckpt") == step).all()
    assert half_written > 0, "never met while it wrote"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of eight megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("needs the right to mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


class TestFullDisk:
    def test_it_is_told_the_last_one_stays_and_the_next_succeeds(self, small_disk: Path) -> None:
        writer = Writer(small_disk / "run", keep=1)
        write(writer, 1, numbers=400_000)
        filler = small_disk / "filler"
        filler.write_bytes(bytes(6_000_000))
        write(writer, 2, numbers=400_000)
        (note,) = writer.notes
        assert "checkpoint of step 2 not written" in note and "No space left on device" in note
        assert names(writer.folder) == ["last.ckpt"]
        assert (weight_of(writer.folder / "last.ckpt") == 1).all()
        filler.unlink()
        write(writer, 3, numbers=400_000)
        assert step_of(writer.folder / "last.ckpt") == 3
        assert len(writer.notes) == 1

    def test_at_the_end_the_same_is_tried_again_and_only_then_an_error(self, small_disk: Path) -> None:
        filler = small_disk / "filler"
        filler.write_bytes(bytes(7_000_000))
        writer = Writer(small_disk / "run", keep=1)
        write(writer, 2, numbers=400_000)
        with pytest.raises(InputError, match=r"last checkpoint could not be written .*No space left.*resume="):
            writer.finish()
        filler.unlink()
        writer.finish()
        assert step_of(writer.folder / "last.ckpt") == 2

    def test_a_training_goes_on(self, small_disk: Path) -> None:
        with suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as file:
            file.write(bytes(9_000_000))  # as much as there is room for
        told: list[str] = []
        writer = Writer(small_disk / "run", keep=2)

        class MakeRoom(pl.Callback):
            def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
                if trainer.current_epoch == 1:
                    writer.wait()
                    (small_disk / "filler").unlink(missing_ok=True)

        trainer = fit(writer, MakeRoom(), say=told.append)
        assert trainer.global_step == 9
        assert any("No space left on device" in line for line in told)
        assert step_of(writer.folder / "last.ckpt") == 9


class TestWritten:
    def test_it_is_said_once_the_file_has_its_name_and_is_sent(self, tmp_path: Path) -> None:
        told: list[tuple[str, int]] = []

        def send() -> None:
            told.append(("sent", step_of(tmp_path / "last.ckpt")))

        writer = Writer(tmp_path, keep=1, send=send, written=lambda step: told.append(("written", step)))
        write(writer, 1)
        write(writer, 2)
        assert told == [("sent", 1), ("written", 1), ("sent", 2), ("written", 2)]

    def test_nothing_is_said_of_what_is_not_there(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        told: list[int] = []
        writer = Writer(tmp_path, keep=1, written=told.append)
        monkeypatch.setattr(checkpoints, "damage", lambda path: "the checksum of its record x differs")
        write(writer, 1)
        assert told == [] and writer.notes


class TestRefusals:
    def test_what_was_written_wrong_never_gets_the_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        writer = Writer(tmp_path, keep=2)
        write(writer, 1)
        monkeypatch.setattr(checkpoints, "damage", lambda path: "the checksum of its record x differs")
        write(writer, 2)
        assert step_of(tmp_path / "last.ckpt") == 1
        assert "read back, the checksum" in writer.notes[0]

    def test_a_store_that_does_not_answer_holds_nothing_up(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(checkpoints, "WRITE_LIMIT_S", 0.2)
        release = threading.Event()
        writer = Writer(tmp_path, keep=1, send=lambda: bool(release.wait(30)) and None)
        writer.save_checkpoint(state_of(1), None)
        writer.save_checkpoint(state_of(2), None)
        assert "step 2 left out" in writer.notes[0] and "0.2 s" in writer.notes[0]
        with pytest.raises(InputError, match=r"no answer in 0\.2 s"):
            writer.finish()
        release.set()
        assert writer.wait()
        with pytest.raises(InputError, match=r"no answer in 0\.2 s"):  # step 2 was left out
            writer.finish()
        writer.save_checkpoint(state_of(3), None)
        writer.finish()


def fit(
    writer: Writer,
    *callbacks: pl.Callback,
    say: Any = print,
    every_steps: int | None = None,
    scores: list[float] | None = None,
    resume: Path | None = None,
    max_epochs: int = 3,
) -> pl.Trainer:
    """Three epochs of three steps; ``scores`` are those of the validations."""
    torch.manual_seed(0)
    left = list(scores or [])
    module = DetectionModule(
        detector=Noisy(),
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=0.1),
        schedule=lambda epoch, num_epochs: 1.0,
        metric=lambda found: {"map": left.pop(0)},
        seed=0,
        card={},
    )
    module.validation_step = lambda *_: None  # type: ignore[method-assign, assignment]
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=max_epochs,
        callbacks=[
            *callbacks,
            Ema(decay=0.9),
            Checkpoints(writer, every_steps=every_steps, every_minutes=None, say=say),
        ],
        plugins=[writer],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=writer.folder,
    )
    trainer.fit(module, Loader(), Loader() if scores else None, ckpt_path=resume, weights_only=True)
    return trainer


class TestCheckpoints:
    def test_what_is_written_is_the_state_of_its_step_to_the_bit(self, tmp_path: Path) -> None:
        """Each write begins only when the next step has changed the weights."""

        class Slow(Writer):
            def _write(self, step: int) -> None:
                time.sleep(0.3)
                super()._write(step)

        copies: dict[int, dict[str, Tensor]] = {}

        class Copy(pl.Callback):
            def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
                state = {"weight": pl_module.detector.weight}  # type: ignore[union-attr]
                moments = trainer.optimizers[0].state[pl_module.detector.weight]  # type: ignore[index, union-attr]
                copies[trainer.global_step] = {
                    name: value.detach().clone() for name, value in {**state, **moments}.items()
                }

        writer = Slow(tmp_path, keep=9)
        fit(writer, Copy(), every_steps=1)
        compared = 0
        for path in tmp_path.glob("last*.ckpt"):
            saved = torch.load(path, weights_only=True)
            expected = copies[saved["global_step"]]
            assert torch.equal(saved["current_model_state"]["detector.weight"], expected["weight"])
            (moments,) = saved["optimizer_states"][0]["state"].values()
            assert all(torch.equal(moments[name], expected[name]) for name in moments)
            compared += 1
        assert compared >= 3
        assert len({float(one["weight"].sum()) for one in copies.values()}) == 9, "every step changes the weights"

    def test_saves_every_so_many_steps_and_after_each_epoch(self, tmp_path: Path) -> None:
        class Wait(pl.Callback):
            def on_train_batch_start(self, *_: Any) -> None:
                writer.wait()

        writer = Writer(tmp_path, keep=99)
        fit(writer, Wait(), every_steps=2)
        assert {step_of(path) for path in tmp_path.glob("last*.ckpt")} == {2, 3, 5, 6, 8, 9}

    def test_within_an_epoch_none_begins_while_one_is_written(self, tmp_path: Path) -> None:
        class Slow(Writer):
            def _write(self, step: int) -> None:
                time.sleep(0.5)
                super()._write(step)

        fit(Slow(tmp_path, keep=99), every_steps=1, max_epochs=1)
        assert {step_of(path) for path in tmp_path.glob("last*.ckpt")} == {1, 3}

    def test_the_best_is_of_the_highest_score_and_a_resume_knows_it(self, tmp_path: Path) -> None:
        writer = Writer(tmp_path, keep=1)
        fit(writer, scores=[0.2, 0.5, 0.3])
        assert step_of(tmp_path / "best.ckpt") == 6
        fit(Writer(tmp_path, keep=1), scores=[0.4, 0.6], resume=tmp_path / "last.ckpt", max_epochs=4)
        assert step_of(tmp_path / "best.ckpt") == 6
        assert step_of(tmp_path / "last.ckpt") == 12

    def test_a_best_that_could_not_be_written_is_not_the_one_to_beat(self, tmp_path: Path) -> None:
        class Fails(Writer):
            def _write(self, step: int) -> None:
                if step == 3:
                    raise OSError(28, "No space left on device")
                super()._write(step)

        told: list[str] = []
        fit(Fails(tmp_path, keep=1), scores=[0.9, 0.5, 0.3], say=told.append)
        assert step_of(tmp_path / "best.ckpt") == 6
        assert len(told) == 1

    def test_the_end_waits_for_the_last_write(self, tmp_path: Path) -> None:
        class Slow(Writer):
            def _write(self, step: int) -> None:
                time.sleep(0.2)
                super()._write(step)

        writer = Slow(tmp_path, keep=1)
        fit(writer)
        assert not writer.busy and step_of(tmp_path / "last.ckpt") == 9
