"""Data that goes bad under a training: skipped, named and counted, and beyond a limit a clear end."""

import io
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from onestage.data.formats.record import Record, Source
from onestage.data.pack import pack

from .conftest import SETTINGS

Start = Callable[..., subprocess.Popen[str]]

WIDTH, HEIGHT = 96, 80


def photograph(seed: int, *, broken: bool) -> bytes:
    """A JPEG of coloured noise; a broken one has header and end, but little between."""
    small = np.random.default_rng(seed).integers(0, 255, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(small).resize((WIDTH, HEIGHT)).save(file, "JPEG", quality=95)
    content = file.getvalue()
    return content[: len(content) // 2] + content[-2:] if broken else content


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images to train on in three shards, the sixth of them broken before it was packed; four to validate."""
    folder = tmp_path_factory.mktemp("faults")
    splits: dict[str, list[Record]] = {"train": [], "val": []}
    for number in range(16):
        path = folder / f"{number}.jpg"
        path.write_bytes(photograph(number, broken=number == 5))
        record = Record(
            path=path,
            width=WIDTH,
            height=HEIGHT,
            boxes=[(10.0, 10.0, 60.0, 50.0)],
            labels=[0],
            difficult=[False],
            crowd=[False],
            source=path.name,
        )
        splits["train" if number < 12 else "val"].append(record)
    pack(Source("noise", ("thing",), splits, []), folder / "packed", samples_per_shard=4)
    return folder / "packed"


@pytest.mark.slow
class TestFaults:
    def test_a_broken_image_is_named_counted_and_left_out(self, onestage: Start, dataset: Path, tmp_path: Path) -> None:
        process = onestage(
            "train", "cluster=none", f"data.root={dataset}", "data.batch_size=4", "trainer.max_epochs=2", *SETTINGS
        )
        _, err = process.communicate(timeout=280)
        assert process.returncode == 0, err
        assert err.count("skipped 000005: ") == 1, "said once, though it is met in every epoch"

        from mlflow import MlflowClient

        client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
        (experiment,) = (one for one in client.search_experiments() if one.name != "Default")
        (run,) = client.search_runs([experiment.experiment_id])
        assert run.data.metrics["data/skipped"] == 1
        named = (tmp_path / "runs" / run.info.run_id / "skipped.txt").read_text().splitlines()
        assert len(named) == 2 and all("000005" in line and "5.jpg" in line for line in named)

    def test_a_missing_shard_on_two_workers_ends_with_one_line_and_is_not_tried_again(
        self, onestage: Start, dataset: Path, tmp_path: Path
    ) -> None:
        copy = tmp_path / "copy"
        copy.mkdir()
        for file in dataset.iterdir():
            if file.name != "train-000002.tar":
                (copy / file.name).write_bytes(file.read_bytes())
        settings = [
            "cluster=local",
            "cluster.num_workers=2",
            "data.batch_size=2",
            "data.max_skipped=2",
            "tracking=none",
        ]
        process = onestage("train", f"data.root={copy}", "trainer.max_epochs=2", *settings, *SETTINGS)
        _, err = process.communicate(timeout=280)
        assert process.returncode == 2, err
        assert "Traceback" not in err
        end = [line for line in err.splitlines() if "data.max_skipped=2" in line]
        assert len(end) == 1 and "mend the dataset" in end[0]
        assert "train-000002.tar is missing" in end[0]
