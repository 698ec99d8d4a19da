"""One reading of a sample's json: what is taken as it was packed, and why the rest is refused."""

import json
from pathlib import Path

import pytest

from onestage.data.faults import Unreadable
from onestage.data.manifest import Manifest
from onestage.data.shards import ShardReader
from onestage.data.truth import BadTruth, Truth, truth_of

FIELDS = {
    "image_id": 3,
    "source": "photo.jpg",
    "width": 40,
    "height": 30,
    "orientation": 6,
    "boxes": [[1, 2.5, 9, 8]],
    "labels": [1],
    "difficult": [True],
    "crowd": [0],
}


def parsed(**changed: object) -> Truth:
    return Truth.parse(json.dumps(FIELDS | changed).encode(), num_classes=2)


def test_all_that_is_said_is_taken() -> None:
    assert parsed() == Truth(3, "photo.jpg", 40, 30, 6, [(1.0, 2.5, 9.0, 8.0)], [1], [True], [False])
    assert parsed().size == (40, 30)


def test_what_was_packed_is_read_back(dataset: Path) -> None:
    """Image n of the greys has n % 3 boxes, the second of them difficult."""
    reader = ShardReader(dataset, "train", manifest=Manifest.load(dataset))
    for number in range(19):
        truth = truth_of(reader.read(f"{number:06d}"), num_classes=2, sized=True)
        assert (truth.image_id, truth.source, truth.size) == (number, f"image{number}.png", (40, 30))
        assert truth.boxes == [(4.0, 3.0, 20.0, 15.0), (10.0, 10.0, 40.0, 30.0)][: number % 3]
        assert truth.difficult == [False, True][: number % 3]


def test_an_older_json_has_no_orientation_and_a_foreign_one_no_size() -> None:
    fields = {key: value for key, value in FIELDS.items() if key not in ("orientation", "width", "height")}
    truth = Truth.parse(json.dumps(fields).encode(), num_classes=2)
    assert truth.orientation == 1
    with pytest.raises(BadTruth, match=r"no annotation that can be read \(no width and height\)"):
        _ = truth.size


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"labels": [2]}, "^label 2 where labels run from 0 to 1$"),
        ({"labels": [-1]}, "^label -1 where"),
        ({"labels": [0, 1]}, "^1 boxes but 2 labels$"),
        ({"crowd": []}, "1 boxes but 1 and 0 marks of difficult and crowd"),
        ({"labels": ["1"]}, "^no annotation that can be read"),
        ({"labels": [1.5]}, "^no annotation that can be read"),
        ({"boxes": [[0, 0, float("nan"), 9]]}, "a box with the corners 0, 0, nan, 9"),
        ({"boxes": [["0", 0, 9, 9]]}, "^no annotation that can be read"),
        ({"boxes": [[0, 0, 9]]}, "^no annotation that can be read"),
        ({"boxes": None}, "^no annotation that can be read"),
        ({"orientation": 9}, "orientation 9 is none of EXIF's"),
        ({"image_id": float("inf")}, "^no annotation that can be read"),
    ],
)
def test_what_can_not_be_used_is_refused_with_the_reason(changed: dict[str, object], why: str) -> None:
    with pytest.raises(BadTruth, match=why) as refused:
        parsed(**changed)
    assert refused.value.source == "photo.jpg"


def test_a_sample_is_named_with_its_original_file_where_that_is_known() -> None:
    sample = {"__key__": "000003", "__url__": "train-000000.tar", "json": json.dumps(FIELDS | {"labels": [7]}).encode()}
    with pytest.raises(Unreadable, match=r"^sample 000003 in train-000000.tar \(from photo.jpg\) has label 7 where"):
        truth_of(sample, num_classes=2)
    with pytest.raises(Unreadable, match=r"^sample 000003 in train-000000.tar has no annotation that can be read"):
        truth_of({**sample, "json": b"[]"}, num_classes=2)
