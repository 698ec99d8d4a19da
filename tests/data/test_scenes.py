from pathlib import Path

import cv2
import numpy as np
import pytest
from sklearn.datasets import load_digits

from onestage.data import scenes
from onestage.data.manifest import Manifest
from onestage.data.samples import decode
from onestage.data.shards import ShardReader


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scenes") / "digits"
    scenes.draw(out, seed=5, num_train=40, num_val=8, num_test=6, size=192)
    return out


def test_counts_and_classes(drawn: Path) -> None:
    manifest = Manifest.load(drawn)
    assert manifest.classes == tuple(str(digit) for digit in range(10))
    assert {name: split.num_samples for name, split in manifest.splits.items()} == {"train": 40, "val": 8, "test": 6}


def test_equal_seeds_give_equal_content(drawn: Path, tmp_path: Path) -> None:
    counts = {"num_train": 40, "num_val": 8, "num_test": 6}
    assert scenes.draw(tmp_path / "a", seed=5, **counts).content_hash == Manifest.load(drawn).content_hash
    assert scenes.draw(tmp_path / "b", seed=6, **counts).content_hash != Manifest.load(drawn).content_hash


def test_scenes_are_within_bounds_and_overlap_little(drawn: Path) -> None:
    reader = ShardReader(drawn, "train", manifest=Manifest.load(drawn))
    labels: set[int] = set()
    for key in [f"{number:06d}" for number in range(40)]:
        sample = decode(reader.read(key), num_classes=10)
        assert sample["image"].shape == (3, 192, 192)
        boxes = sample["boxes"].numpy()
        assert 1 <= len(boxes) <= scenes.MAX_DIGITS
        assert (boxes >= 0).all()
        assert (boxes <= 192).all()
        sides = boxes[:, 2:] - boxes[:, :2]
        assert (sides >= 5).all()
        assert (sides <= 1.4 * 72).all()
        labels |= set(sample["labels"].tolist())
    assert len(labels) == 10


def test_box_is_tight_around_the_ink() -> None:
    """Every edge of the cut-out, which becomes the box, touches the stroke."""
    digits = load_digits()
    for index in range(20):
        ink = scenes._ink(np.random.default_rng(index), digits.images[index].astype(np.float32) / 16, side=48)
        assert ink.min() >= 0
        assert ink.max() <= 1
        for edge in (ink[0], ink[-1], ink[:, 0], ink[:, -1]):
            assert edge.max() > 0.5
        assert 48 * 0.6 <= len(ink) <= 48 * 1.2


def test_splits_share_no_digit() -> None:
    parts = scenes._split_digits(0)
    assert [len(labels) for _, labels in parts.values()] == [1258, 270, 269]
    originals = [image.tobytes() for image in load_digits().images.astype(np.float32) / 16]
    drawn = [image.tobytes() for images, _ in parts.values() for image in images]
    assert sorted(drawn) == sorted(originals)


def test_digits_can_be_told_apart_from_their_boxes(drawn: Path) -> None:
    """A nearest neighbour among the handwritten digits reads most crops, so boxes and labels belong together."""
    manifest = Manifest.load(drawn)
    digits = load_digits()
    right = total = 0
    reader = ShardReader(drawn, "val", manifest=manifest)
    templates = np.stack([_normalised(image) for image in digits.images])
    for key in [f"{number:06d}" for number in range(40, 48)]:
        sample = decode(reader.read(key), num_classes=10)
        grey = sample["image"].float().mean(dim=0).numpy()
        for (left, top, right_edge, bottom), label in zip(
            sample["boxes"].int().tolist(), sample["labels"].tolist(), strict=True
        ):
            crop = grey[top:bottom, left:right_edge]
            scores = np.abs(templates @ _normalised(crop))
            right += int(digits.target[scores.argmax()] == label)
            total += 1
    assert right / total > 0.6


def _normalised(image: np.ndarray) -> np.ndarray:
    small = cv2.resize(np.asarray(image, np.float32), (8, 8), interpolation=cv2.INTER_AREA).ravel()
    small = small - small.mean()
    return small / np.linalg.norm(small)
