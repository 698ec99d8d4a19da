"""A dataset small enough to check by hand: 27 images of 40x30, numbered by their grey level."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from onestage.data import order
from onestage.data.datamodule import DetectionData
from onestage.data.formats.record import Record, Source
from onestage.data.input_sizes import InputSizes
from onestage.data.mosaic import Mosaic
from onestage.data.pack import pack
from onestage.data.transforms import HSVJitter, RandomPlacement, Sample, Transform, boxes_of, image_of, pixels_of
from onestage.types import Placement

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
BOXES = [(10, 20, 50, 60), (60, 10, 110, 40), (80, 60, 120, 95)]
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


def _data_of(
    root: Path,
    *,
    num_workers: int = 0,
    batch_size: int = 4,
    plain: bool = False,
    mosaic: Mosaic | None = None,
    input_sizes: InputSizes | None = None,
) -> DetectionData:
    augment: dict[str, Transform | None] = {
        "mosaic": mosaic,
        "placement": RandomPlacement(size=[32, 48]),
        "flip": v2.RandomHorizontalFlip(),
        "colour": HSVJitter(),
    }
    return DetectionData(
        root=root,
        batch_size=batch_size,
        input_size=[32, 48],
        augment={} if plain else augment,
        seed=11,
        num_workers=num_workers,
        input_sizes=input_sizes,
    )


@pytest.fixture(scope="session")
def data_of() -> Callable[..., DetectionData]:
    """``data_of(root, num_workers=0, batch_size=4, plain=False, mosaic=None, input_sizes=None)``.

    32x48 inputs, seed 11; plain is not augmented.
    """
    return _data_of


@pytest.fixture(scope="session")
def expected_steps(dataset: Path) -> list[list[str]]:
    """The keys of each step of three epochs over ``dataset`` in batches of four, five steps an epoch."""
    epochs = [order.keys(dataset, "train", seed=11, epoch=epoch, rank=0, world_size=1) for epoch in range(3)]
    return [keys[start : start + 4] for keys in epochs for start in range(0, 19, 4)]


def _sample_of(width: int = 120, height: int = 100, *, times: int = 1) -> Sample:
    """Black, with one filled rectangle of its own colour per label, everything ``times`` as large."""
    pixels = np.zeros((height * times, width * times, 3), np.uint8)
    boxes = [[side * times for side in box] for box in BOXES]
    for (left, top, right, bottom), colour in zip(boxes, COLOURS, strict=True):
        pixels[top:bottom, left:right] = colour
    return {
        "key": "000001",
        "image_id": 1,
        "image": image_of(pixels),
        "boxes": boxes_of(torch.tensor(boxes, dtype=torch.float32), size=pixels.shape[:2]),
        "labels": torch.arange(3),
        "crowd": torch.tensor([False, False, True]),
        "difficult": torch.tensor([True, False, False]),
        "placement": Placement(),
    }


def _extent_of(sample: Sample, label: int) -> list[int]:
    """Left, top, right, bottom of the pixels that are more of the label's colour than black or grey."""
    pixels = pixels_of(sample["image"])
    rows, columns = np.nonzero((pixels[..., label] > 127) & (np.delete(pixels, label, axis=-1).max(axis=-1) < 64))
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def _assert_boxes_fit(sample: Sample, *, within_px: float = 1.0) -> None:
    for box, label in zip(sample["boxes"].tolist(), sample["labels"].tolist(), strict=True):
        assert np.abs(np.subtract(box, _extent_of(sample, label))).max() <= within_px


@pytest.fixture(scope="session")
def sample_of() -> Callable[..., Sample]:
    """``sample_of(width=120, height=100, times=1)``: three rectangles, red, green and blue for labels 0, 1 and 2."""
    return _sample_of


@pytest.fixture(scope="session")
def assert_boxes_fit() -> Callable[..., None]:
    """``assert_boxes_fit(sample, within_px=1.0)``: each box lies on the pixels of its label's colour."""
    return _assert_boxes_fit
