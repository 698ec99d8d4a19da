import hashlib
import json
from pathlib import Path

import pytest

from onestage.data.manifest import Manifest, Shard, Split
from onestage.errors import InputError

AA, BB, CC = "aa" * 32, "bb" * 32, "cc" * 32
MANIFEST = Manifest(
    name="greys",
    classes=("cat", "dog"),
    splits={
        "train": Split((Shard("train-000000.tar", 2, 10, AA, 0), Shard("train-000001.tar", 1, 20, BB, 2))),
        "val": Split((Shard("val-000000.tar", 1, 30, CC, 3),)),
    },
)


def shard(**changed: object) -> dict[str, object]:
    return {"name": "a.tar", "samples": 1, "bytes": 1, "sha256": AA, "first": 0} | changed


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    MANIFEST.save(tmp_path)
    assert Manifest.load(tmp_path) == MANIFEST
    assert [path.name for path in tmp_path.iterdir()] == ["dataset.json"]


def test_fields_on_disk(tmp_path: Path) -> None:
    MANIFEST.save(tmp_path)
    fields = json.loads((tmp_path / "dataset.json").read_text())
    assert fields["version"] == 1
    assert fields["classes"] == ["cat", "dog"]
    shard = {"name": "train-000001.tar", "samples": 1, "bytes": 20, "sha256": BB, "first": 2}
    assert fields["splits"]["train"]["shards"][1] == shard
    by_hand = f'{{"classes":["cat","dog"],"splits":{{"train":["{AA}","{BB}"],"val":["{CC}"]}}}}'
    assert fields["content_hash"] == hashlib.sha256(by_hand.encode()).hexdigest()


def test_keys_are_numbered_over_all_splits() -> None:
    assert MANIFEST.split("train").keys() == ["000000", "000001", "000002"]
    assert MANIFEST.split("val").keys() == ["000003"]
    assert MANIFEST.split("train").num_samples == 3


def test_unknown_split_lists_the_splits() -> None:
    with pytest.raises(InputError, match=r"'greys' has no split 'test': choose one of train, val"):
        MANIFEST.split("test")


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no dataset folder at .*nowhere: check the path"):
        Manifest.load(tmp_path / "nowhere")


def test_folder_without_manifest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is no dataset folder .* make one with `onestage data import"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2, "splits": "something new"}, "has format 2, newer than 1: upgrade onestage"),
        ({"classes": ["cat"]}, "content hash does not match"),
        ({"splits": {"train": {}}}, "no field 'shards'"),
        ({"splits": []}, "is broken"),
        ({"version": None}, "is broken"),
        ({"splits": {"train": {"shards": [shard(name="../x.tar")]}}}, "not a plain file name"),
        ({"splits": {"train": {"shards": [shard(name="x\n.tar")]}}}, "not a plain file name"),
        ({"splits": {"train": {"shards": [shard(name="..")]}}}, "'..' is not a plain file name"),
        ({"splits": {"train": {"shards": [shard(name="")]}}}, "'' is not a plain file name"),
        ({"splits": {"train": {"shards": [shard(bytes=float("inf"))]}}}, "is broken"),
        ({"splits": {"train": {"shards": [shard(sha256="../../x")]}}}, "a.tar has sha256 '../../x'"),
        ({"splits": {"train": {"shards": [shard(samples=-1)]}}}, "a.tar has a number below 0"),
        ({"splits": {"train": {"shards": [shard(samples=3), shard(first=2)]}}}, "starts at 2, within a.tar"),
    ],
)
def test_manifest_that_cannot_be_used(tmp_path: Path, change: dict[str, object], message: str) -> None:
    MANIFEST.save(tmp_path)
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message) as raised:
        Manifest.load(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", ["", "{", "[]", '"text"', b"\xff\xfe\x00", "[" * 100_000])
def test_manifest_that_is_no_json_object(tmp_path: Path, content: str | bytes) -> None:
    (tmp_path / "dataset.json").write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InputError, match=r"is broken .* make it again"):
        Manifest.load(tmp_path)
