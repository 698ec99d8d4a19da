import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from onestage.data.colour import recoloured_batch
from onestage.data.datamodule import DetectionData
from onestage.data.input_sizes import InputSizes
from onestage.data.manifest import Manifest, Shard, Split
from onestage.data.mixup import MixUp
from onestage.data.samples import EvaluationBatch, RawShare, TrainingBatch, decode
from onestage.data.transforms import Augment, HorizontalFlip, HSVJitter, pixels_of
from onestage.types import Batch, Placement, Skipped

DataOf = Callable[..., DetectionData]


def write_dataset(root: Path, *, image: bytes, **truth: object) -> Path:
    """A dataset of one image, made by hand."""
    fields = {"image_id": 0, "source": "photo.jpg", "boxes": [], "labels": [], "difficult": [], "crowd": []} | truth
    root.mkdir()
    with tarfile.open(root / "train-000000.tar", "w") as tar:
        for name, content in (("000000.jpg", image), ("000000.json", json.dumps(fields).encode())):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    shard = Shard("train-000000.tar", 1, (root / "train-000000.tar").stat().st_size, "", 0)
    Manifest(name="one", classes=("cat", "dog"), splits={"train": Split((shard,))}).save(root)
    return root


def encoded(kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").save(buffer, kind)
    return buffer.getvalue()


def only_batch(data: DetectionData) -> Batch:
    (batch,) = data.train_dataloader()
    return batch


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("image", [b"", b"text", encoded()[:-100], encoded("PNG")[:200], encoded("BMP")])
def test_corrupt_image_is_skipped_with_the_reason_in_one_line(
    data_of: DataOf, tmp_path: Path, num_workers: int, image: bytes
) -> None:
    root = write_dataset(tmp_path / "dataset", image=image)
    batch = only_batch(data_of(root, num_workers=num_workers))
    assert (len(batch), batch.images.shape, batch.global_images) == (0, (0, 3, 32, 48), 1)
    assert batch.skipped == (
        Skipped(
            "000000",
            "sample 000000 in train-000000.tar (from photo.jpg) has an image that is corrupt or cut short: replace it "
            "and make the dataset again",
        ),
    )


@pytest.mark.parametrize(
    ("truth", "message"),
    [
        (
            {"labels": [2], "boxes": [[0, 0, 9, 9]], "crowd": [False], "difficult": [False]},
            "has label 2 where labels run",
        ),
        ({"labels": [-1], "boxes": [[0, 0, 9, 9]], "crowd": [False], "difficult": [False]}, "has label -1 where"),
        ({"labels": [0]}, "has 0 boxes but 1 labels"),
        ({"boxes": [[0, 0, 9]]}, "has no annotation that can be read"),
        ({"boxes": "many"}, "has no annotation that can be read"),
        ({"boxes": [[0, 0, float("nan"), 9]], "labels": [0], "crowd": [0], "difficult": [0]}, "has no annotation that"),
        ({"orientation": 9}, "has no annotation that can be read"),
        ({"orientation": None}, "has no annotation that can be read"),
        ({"image_id": float("inf")}, "has no annotation that can be read"),
    ],
)
def test_annotation_that_does_not_fit_is_skipped_with_the_reason(
    data_of: DataOf, tmp_path: Path, truth: dict[str, object], message: str
) -> None:
    root = write_dataset(tmp_path / "dataset", image=encoded(), **truth)
    ((key, why),) = only_batch(data_of(root)).skipped
    assert key == "000000"
    assert why.startswith(f"sample 000000 in train-000000.tar (from photo.jpg) {message}")


def raw_of(image: bytes, *, key: str = "000000", **truth: object) -> dict[str, Any]:
    fields = {"image_id": int(key), "source": "photo.jpg", "boxes": [], "labels": [], "difficult": [], "crowd": []}
    return {"__key__": key, "__url__": "train-000000.tar", "jpg": image, "json": json.dumps(fields | truth).encode()}


def photo(level: int = 90, *, width: int = 64, height: int = 48, orientation: int = 1) -> bytes:
    """A JPEG of one level with a white top left corner of 16 x 8."""
    pixels = np.full((height, width, 3), level, np.uint8)
    pixels[:8, :16] = 255
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, exif=exif)
    return buffer.getvalue()


@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
def test_a_decoded_picture_is_upright_and_its_boxes_are_too(orientation: int | None) -> None:
    """As Pillow turns it; without a word about it in the shard it is taken as it is stored."""
    content = photo(orientation=orientation or 1)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))))
    rows, columns = np.nonzero(upright.min(axis=-1) > 200)
    box = [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]
    said = {} if orientation is None else {"orientation": orientation}
    raw = raw_of(content, boxes=[box], labels=[1], difficult=[False], crowd=[False], **said)
    sample = decode(raw, num_classes=2)
    assert np.abs(pixels_of(sample["image"]).astype(int) - upright).max() <= 2
    assert sample["boxes"].canvas_size == upright.shape[:2]  # type: ignore[attr-defined]
    left, top, right, bottom = sample["boxes"][0].int().tolist()
    assert pixels_of(sample["image"])[top:bottom, left:right].mean() > 240
    turned = decode(raw_of(content), num_classes=2)
    assert turned["image"].shape == (3, 48, 64)


def test_a_batch_goes_on_without_what_it_skips() -> None:
    """The others, in order, are what they would be in a batch of their own."""
    good = [raw_of(photo(level), key=f"{level:06d}") for level in (40, 120, 200)]
    raws = [good[0], raw_of(b"broken", key="000001"), good[1], raw_of(photo(), key="000002", labels=[9]), good[2]]
    skipped_before = Skipped("000009", "its shard is missing")
    augment = Augment(transforms=[HorizontalFlip(), HSVJitter()])
    prepares = [
        TrainingBatch(augment=augment, input_sizes=InputSizes(size=[48, 64]), num_classes=2, seed=3),
        EvaluationBatch(size=[48, 64], num_classes=2),
    ]
    for prepare in prepares:
        whole = prepare(RawShare(good, 0, 3), epoch=1)
        rest = prepare(RawShare(raws, 0, 6, [skipped_before]), epoch=1)
        assert rest.keys == whole.keys == ["000040", "000120", "000200"]
        assert torch.equal(rest.images, whole.images)
        assert [target.image_id for target in rest.targets] == [40, 120, 200]
        assert rest.global_images == 6
        assert [key for key, _ in rest.skipped] == ["000009", "000001", "000002"]
        assert rest.images.is_contiguous(memory_format=torch.channels_last)


def test_what_is_mixed_knows_only_what_could_be_decoded() -> None:
    raws = [raw_of(photo(200), key="000000"), raw_of(b"broken", key="000001"), raw_of(photo(100), key="000002")]
    augment = Augment(transforms=[MixUp(size=[48, 64], probability=1.0)])
    batch = TrainingBatch(augment=augment, input_sizes=InputSizes(size=[48, 64]), num_classes=2, seed=3)
    images = batch(RawShare(raws, 0, 3), epoch=0).images
    assert len(images) == 2
    assert (images[:, :, 40, 40] > 105).all() and (images[:, :, 40, 40] < 195).all()


@pytest.mark.parametrize(
    ("fit", "placement"),
    [("letterbox", Placement((0.5, 0.5), (0.0, 4.0))), ("stretch", Placement((0.5, 2 / 3)))],
)
def test_images_fit_the_input_as_asked(fit: str, placement: Placement) -> None:
    """64x48 on 32x32: 32x24 between two bars of 4, or stretched."""
    raw = raw_of(photo(), boxes=[[0, 0, 16, 8]], labels=[0], difficult=[False], crowd=[False])
    sizes = InputSizes(size=[32, 32])
    batches = [
        EvaluationBatch(size=[32, 32], num_classes=1, fit=fit)(RawShare([raw], 0, 1), epoch=0),
        TrainingBatch(augment=Augment(transforms=[]), input_sizes=sizes, num_classes=1, seed=0, fit=fit)(
            RawShare([raw], 0, 1), epoch=0
        ),
    ]
    assert torch.equal(batches[0].images, batches[1].images)
    assert batches[0].targets[0].placement == placement
    for batch in batches:
        (scale_x, scale_y), (left, top) = placement
        expected = [left, top, left + 16 * scale_x, top + 8 * scale_y]
        assert batch.targets[0].boxes[0].tolist() == pytest.approx(expected, abs=1e-4)
        assert (batch.images[0, :, 0, 20] == 128).all() == (fit == "letterbox")
    with pytest.raises(ValueError, match=r"need data.fit to be one of letterbox, stretch, got 'pad'"):
        EvaluationBatch(size=[32, 32], num_classes=1, fit="pad")


def test_colours_are_the_same_on_the_device_as_in_the_loader() -> None:
    """The batch carries what the loader would have done, up to the rounding of 8-bit colours."""
    raws = [raw_of(photo(level), key=f"{level:06d}") for level in (40, 120, 200)]

    def batch(*, on_device: bool) -> Batch:
        augment = Augment(transforms=[HorizontalFlip(), HSVJitter(saturation=1.0, on_device=on_device)])
        sizes = InputSizes(size=[48, 64])
        return TrainingBatch(augment=augment, input_sizes=sizes, num_classes=2, seed=3)(RawShare(raws, 0, 3), epoch=0)

    here, there = batch(on_device=False), batch(on_device=True)
    assert here.colour is None
    assert there.colour is not None and there.colour.shape == (3, 3)
    assert len(torch.unique(there.colour[:, 2])) == 3
    assert (there.images.int() - here.images.int()).abs().max() > 20
    apart = (recoloured_batch(there.images, there.colour).int() - here.images.int()).abs()
    assert apart.max() <= 4
    assert EvaluationBatch(size=[48, 64], num_classes=2)(RawShare(raws, 0, 3), epoch=0).colour is None


def test_batches_are_bitwise_the_same_for_any_number_of_workers(data_of: DataOf, dataset: Path) -> None:
    def batches(num_workers: int) -> list[Batch]:
        data = data_of(dataset, num_workers=num_workers)
        data.augment = Augment(transforms=[HorizontalFlip(), HSVJitter(on_device=True)])
        return list(data.train_dataloader())

    for one, other in zip(batches(0), batches(2), strict=True):
        assert one.keys == other.keys
        assert torch.equal(one.images, other.images)
        assert one.images.stride() == other.images.stride()
        assert one.colour is not None and other.colour is not None
        assert torch.equal(one.colour, other.colour)
