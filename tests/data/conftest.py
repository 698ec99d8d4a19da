"""A dataset small enough to check by hand: 27 images of 40x30, numbered by their grey level."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import v2

from onestage.data import order
from onestage.data.datamodule import DetectionData
from onestage.data.formats.record import Record, Source
from onestage.data.pack import pack
from onestage.data.transforms import HSVJitter, RandomPlacement

SPLITS = {"train": 19, "val": 5, "test": 3}


def make_source(folder: Path) -> Source:
    """Image n is grey of 8 n, and has n % 3 boxes."""
    folder.mkdir(parents=True, exist_ok=True)
    splits: dict[str, list[Record]] = {}
    number = 0
    for split, count in SPLITS.items():
        splits[split] = []
        for _ in range(count):
            path = folder / f"image{number}.png"
            Image.fromarray(np.full((30, 40, 3), 8 * number, np.uint8)).save(path)
            boxes = [(4.0, 3.0, 20.0, 15.0), (10.0, 10.0, 40.0, 30.0)][: number % 3]
            splits[split].append(
                Record(
                    path=path,
                    width=40,
                    height=30,
                    boxes=boxes,
                    labels=[0, 1][: number % 3],
                    difficult=[False, True][: number % 3],
                    crowd=[False, False][: number % 3],
                    source=path.name,
                )
            )
            number += 1
    return Source(name="greys", classes=("cat", "dog"), splits=splits, findings=[])


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return make_source(tmp_path / "images")


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset folder that tests only read: five train shards of 4, 4, 4, 4 and 3 images."""
    folder = tmp_path_factory.mktemp("greys")
    pack(make_source(folder / "images"), folder / "dataset", samples_per_shard=4)
    return folder / "dataset"


def _data_of(root: Path, *, num_workers: int = 0, batch_size: int = 4, plain: bool = False) -> DetectionData:
    augment = {"placement": RandomPlacement(size=[32, 48]), "flip": v2.RandomHorizontalFlip(), "colour": HSVJitter()}
    return DetectionData(
        root=root,
        batch_size=batch_size,
        input_size=[32, 48],
        augment={} if plain else augment,
        seed=11,
        num_workers=num_workers,
    )


@pytest.fixture(scope="session")
def data_of() -> Callable[..., DetectionData]:
    """``data_of(root, num_workers=0, batch_size=4, plain=False)``: 32x48 inputs, seed 11; plain is not augmented."""
    return _data_of


@pytest.fixture(scope="session")
def expected_steps(dataset: Path) -> list[list[str]]:
    """The keys of each step of three epochs over ``dataset`` in batches of four, five steps an epoch."""
    epochs = [order.keys(dataset, "train", seed=11, epoch=epoch, rank=0, world_size=1) for epoch in range(3)]
    return [keys[start : start + 4] for keys in epochs for start in range(0, 19, 4)]
