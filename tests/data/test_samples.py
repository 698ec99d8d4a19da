import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from onestage.data.datamodule import DetectionData
from onestage.data.manifest import Manifest, Shard, Split
from onestage.errors import InputError

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


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("image", [b"", b"text", encoded()[:-100], encoded("PNG")[:200], encoded("BMP")])
def test_corrupt_image_is_named_in_one_line(data_of: DataOf, tmp_path: Path, num_workers: int, image: bytes) -> None:
    root = write_dataset(tmp_path / "dataset", image=image)
    with pytest.raises(InputError) as raised:
        list(data_of(root, num_workers=num_workers).train_dataloader())
    expected = "sample 000000 in train-000000.tar (from photo.jpg) has an image that is corrupt or cut short"
    assert str(raised.value).startswith(expected)
    assert "\n" not in str(raised.value)


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
    ],
)
def test_annotation_that_does_not_fit_is_named(
    data_of: DataOf, tmp_path: Path, truth: dict[str, object], message: str
) -> None:
    root = write_dataset(tmp_path / "dataset", image=encoded(), **truth)
    with pytest.raises(InputError, match=rf"sample 000000 in train-000000.tar \(from photo.jpg\) {message}"):
        list(data_of(root).train_dataloader())
