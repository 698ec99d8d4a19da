import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import asdict, replace
from itertools import chain, product
from pathlib import Path

import pytest
from PIL import Image

from onestage.data import pack as pack_module
from onestage.data.formats.record import Record, Source
from onestage.data.manifest import Manifest
from onestage.data.pack import pack
from onestage.errors import InputError


def test_shards_hold_the_images_as_they_came(source: Source, tmp_path: Path) -> None:
    out = tmp_path / "dataset"
    manifest = pack(source, out, samples_per_shard=4)
    names = [f"train-00000{n}.tar" for n in range(5)] + ["val-000000.tar", "val-000001.tar", "test-000000.tar"]
    assert sorted(path.name for path in out.iterdir()) == sorted([*names, "dataset.json"])
    assert Manifest.load(out) == manifest
    images = [record.path.read_bytes() for records in source.splits.values() for record in records]
    seen = 0
    for shard in (shard for split in manifest.splits.values() for shard in split.shards):
        content = (out / shard.name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (shard.num_bytes, shard.sha256)
        with tarfile.open(out / shard.name) as tar:
            members = tar.getnames()
            assert members == [f"{key}.{kind}" for key, kind in product(shard.keys(), ("png", "json"))]
            for name in members[::2]:
                assert tar.extractfile(name).read() == images[seen]  # type: ignore[union-attr]
                seen += 1
    assert seen == 27


def test_annotation_of_a_sample(source: Source, tmp_path: Path) -> None:
    pack(source, tmp_path / "dataset")
    with tarfile.open(tmp_path / "dataset" / "train-000000.tar") as tar:
        fields = json.load(tar.extractfile("000005.json"))  # type: ignore[arg-type]
    assert fields == {
        "image_id": 5,
        "source": "image5.png",
        "width": 40,
        "height": 30,
        "orientation": 1,
        "boxes": [[4.0, 3.0, 20.0, 15.0], [10.0, 10.0, 40.0, 30.0]],
        "labels": [0, 1],
        "difficult": [False, True],
        "crowd": [False, False],
    }


def test_equal_sources_give_equal_bytes(source: Source, tmp_path: Path) -> None:
    one, other = pack(source, tmp_path / "one"), pack(replace(source, name="other"), tmp_path / "other")
    assert one.content_hash == other.content_hash
    assert one.splits == other.splits


def test_large_images_make_shards_of_fewer(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = source.splits["train"][0].path.stat().st_size
    monkeypatch.setattr(pack_module, "MAX_SHARD_BYTES", int(2.5 * size))
    manifest = pack(source, tmp_path / "dataset")
    assert [shard.num_samples for shard in manifest.split("val").shards] == [2, 2, 1]


def test_same_dataset_is_left(source: Source, tmp_path: Path) -> None:
    pack(source, tmp_path / "dataset")
    before = (tmp_path / "dataset" / "dataset.json").stat().st_mtime_ns
    assert pack(replace(source, name="new name"), tmp_path / "dataset").name == "greys"
    assert (tmp_path / "dataset" / "dataset.json").stat().st_mtime_ns == before


def test_other_dataset_is_replaced_only_when_asked(source: Source, tmp_path: Path) -> None:
    out = tmp_path / "dataset"
    pack(source, out)
    other = replace(source, classes=("cat", "dog", "owl"))
    with pytest.raises(InputError, match=r"dataset holds another dataset, 'greys': choose another place or overwrite"):
        pack(other, out)
    assert Manifest.load(out).classes == ("cat", "dog")
    pack(other, out, overwrite=True)
    assert Manifest.load(out).classes == ("cat", "dog", "owl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dataset", "images"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_folder_of_another_kind_is_never_replaced(source: Source, tmp_path: Path, overwrite: bool) -> None:
    with pytest.raises(InputError, match="exists and is no dataset folder"):
        pack(source, tmp_path / "images", overwrite=overwrite)
    assert source.splits["train"][0].path.exists()


def test_the_root_of_the_disk_is_no_place(source: Source) -> None:
    with pytest.raises(InputError, match=r"^/ is no place for a dataset folder: choose a folder below it$"):
        pack(source, "/")


def test_a_roundabout_path_is_the_folder_that_it_leads_to(source: Source, tmp_path: Path) -> None:
    manifest = pack(source, tmp_path / "dataset" / "x" / "..")
    assert Manifest.load(tmp_path / "dataset") == manifest
    other = replace(source, classes=("cat", "dog", "owl"))
    assert pack(other, tmp_path / "dataset" / "x" / "..", overwrite=True) == Manifest.load(tmp_path / "dataset")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dataset", "images"]


def test_empty_folder_is_filled(source: Source, tmp_path: Path) -> None:
    (tmp_path / "dataset").mkdir()
    pack(source, tmp_path / "dataset")
    assert Manifest.load(tmp_path / "dataset").name == "greys"


def test_progress_counts_images(source: Source, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    pack(source, tmp_path / "dataset", samples_per_shard=4, progress=lambda *counts: told.append(counts))
    assert told[0] == (0, 27) and told[-1] == (27, 27)
    assert told == sorted(told)


def test_a_turned_image_says_so(source: Source, tmp_path: Path) -> None:
    turned = replace(source.splits["train"][0], orientation=6)
    pack(replace(source, splits={"train": [turned]}), tmp_path / "dataset")
    with tarfile.open(tmp_path / "dataset" / "train-000000.tar") as tar:
        assert json.load(tar.extractfile("000000.json"))["orientation"] == 6  # type: ignore[arg-type]


def test_a_member_is_named_by_what_it_is(source: Source, tmp_path: Path) -> None:
    record = source.splits["train"][0]
    misnamed = record.path.rename(tmp_path / "image.jpg")
    neither = tmp_path / "other.png"
    neither.write_bytes(b"GIF89a")
    pack(replace(source, splits={"train": [replace(record, path=misnamed)]}), tmp_path / "dataset")
    with tarfile.open(tmp_path / "dataset" / "train-000000.tar") as tar:
        assert tar.getnames() == ["000000.png", "000000.json"]
    with pytest.raises(InputError, match=r"other\.png is no JPEG or PNG"):
        pack(replace(source, splits={"train": [replace(record, path=neither)]}), tmp_path / "second")


def test_any_number_of_workers_gives_equal_bytes(source: Source, tmp_path: Path) -> None:
    folders = [tmp_path / str(workers) for workers in (1, 2, 7)]
    for folder, workers in zip(folders, (1, 2, 7), strict=True):
        pack(source, folder, samples_per_shard=2, num_workers=workers)
    assert contents(folders[0]) == contents(folders[1]) == contents(folders[2])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def identities(folder: Path) -> dict[str, tuple[int, int]]:
    """A file that is written again has another inode or another time."""
    return {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir() if path.suffix == ".tar"
    }


KILLED = """
import json, sys, threading
from pathlib import Path
from onestage.data import pack as module
from onestage.data.formats.record import Record, Source

read = module._content
def stuck_at_image_13(item):
    if item.record.source == "image13.png":
        print("stuck", flush=True)
        threading.Event().wait(60)
    return read(item)
module._content = stuck_at_image_13
fields = json.loads(Path(sys.argv[1]).read_text())
splits = {
    split: [Record(**{**record, "path": Path(record["path"])}) for record in records]
    for split, records in fields["splits"].items()
}
source = Source(fields["name"], tuple(fields["classes"]), splits, [])
module.pack(source, sys.argv[2], samples_per_shard=4, num_workers=1)
"""


def source_in(folder: Path) -> Source:
    """27 images, in splits of 19, 5 and 3."""
    records = [
        Record(
            path=folder / "images" / f"image{number}.png",
            width=40 + number,
            height=30,
            boxes=[(4.0, 3.0, 20.0, 15.0)],
            labels=[number % 2],
            difficult=[False],
            crowd=[False],
            source=f"image{number}.png",
        )
        for number in range(27)
    ]
    return Source("greys", ("cat", "dog"), {"train": records[:19], "val": records[19:24], "test": records[24:]}, [])


@pytest.fixture(scope="module")
def killed_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a process was killed (SIGKILL) that packed ``images`` into ``dataset``, in its fourth shard."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "images").mkdir()
    source = source_in(folder)
    for number, record in enumerate(chain.from_iterable(source.splits.values())):
        Image.new("L", (40 + number, 30)).save(record.path)
    (folder / "source.json").write_text(json.dumps(asdict(source), default=str))
    command = [sys.executable, "-c", KILLED, str(folder / "source.json"), str(folder / "work" / "dataset")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "stuck\n"
        journal = folder / "work" / ".dataset.partial" / "journal.jsonl"
        deadline = time.monotonic() + 30
        while journal.read_text().count("\n") < 4 and time.monotonic() < deadline:  # its head and three shards
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=30) == -signal.SIGKILL
    return folder


@pytest.fixture
def killed(killed_once: Path, tmp_path: Path) -> Source:
    """What was packed into ``tmp_path / "dataset"`` until the kill."""
    shutil.copytree(killed_once / "work", tmp_path, dirs_exist_ok=True)
    return source_in(killed_once)


def test_a_killed_import_leaves_nothing_that_looks_whole(killed: Source, tmp_path: Path) -> None:
    assert sorted(path.name for path in tmp_path.iterdir()) == [".dataset.lock", ".dataset.partial"]
    assert list(tmp_path.rglob("dataset.json")) == []
    with pytest.raises(InputError, match="no dataset folder"):
        Manifest.load(tmp_path / "dataset")


def packed_from(source: Source, tmp_path: Path) -> int:
    """Packs to the end as an uninterrupted import would have, and says how many images were there already."""
    told: list[tuple[int, int]] = []
    pack(source, tmp_path / "dataset", samples_per_shard=4, progress=lambda *counts: told.append(counts))
    pack(source, tmp_path / "whole", samples_per_shard=4)
    assert contents(tmp_path / "dataset") == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dataset", "whole"]
    assert told[-1] == (27, 27)
    return told[0][0]


def test_a_killed_import_goes_on_behind_the_last_shard(killed: Source, tmp_path: Path) -> None:
    before = identities(tmp_path / ".dataset.partial" / "dataset")
    assert sorted(before) == [".train-000003.tar", *(f"train-00000{n}.tar" for n in range(3))]
    assert packed_from(killed, tmp_path) == 12
    after = identities(tmp_path / "dataset")
    assert all(after[f"train-00000{n}.tar"] == before[f"train-00000{n}.tar"] for n in range(3))


def test_a_journal_cut_within_a_line_holds_up_to_it(killed: Source, tmp_path: Path) -> None:
    journal = tmp_path / ".dataset.partial" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-30])
    assert packed_from(killed, tmp_path) == 8


def test_a_shard_of_another_size_than_noted_is_written_again(killed: Source, tmp_path: Path) -> None:
    shard = tmp_path / ".dataset.partial" / "dataset" / "train-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    assert packed_from(killed, tmp_path) == 8


def test_what_lies_about_is_not_packed(killed: Source, tmp_path: Path) -> None:
    """A manifest that was being written when the import was cut, or a shard that was not noted any more."""
    for name in (".dataset.json.123", "train-000003.tar"):
        (tmp_path / ".dataset.partial" / "dataset" / name).write_bytes(b"cut")
    assert packed_from(killed, tmp_path) == 12


@pytest.mark.parametrize("change", ["shards", "classes", "boxes", "image"])
def test_another_plan_starts_afresh(killed: Source, tmp_path: Path, change: str) -> None:
    samples_per_shard = 5 if change == "shards" else 4
    last = killed.splits["test"][-1]
    if change == "classes":
        killed = replace(killed, classes=("dog", "cat"))
    elif change == "boxes":
        killed.splits["test"][-1] = replace(last, difficult=[not one for one in last.difficult])
    elif change == "image":
        os.utime(last.path, ns=(1, 1 + last.path.stat().st_mtime_ns))
    told: list[int] = []
    manifest = pack(
        killed,
        tmp_path / "dataset",
        samples_per_shard=samples_per_shard,
        progress=lambda done, _: told.append(done),
    )
    assert told[0] == 0
    assert manifest == pack(killed, tmp_path / "whole", samples_per_shard=samples_per_shard)
    if change == "image":
        os.utime(last.path, ns=(1, last.path.stat().st_mtime_ns - 1))


def test_a_dataset_is_put_back_that_a_kill_left_aside(source: Source, tmp_path: Path) -> None:
    """Between the two renames of a replacement the old dataset is the only whole one."""
    out = tmp_path / "dataset"
    before = pack(source, out)
    out.rename(tmp_path / ".dataset.old")
    with pytest.raises(InputError, match="holds another dataset"):
        pack(replace(source, classes=("owl",)), out)
    assert Manifest.load(out) == before


def test_what_an_interrupt_leaves_is_gone_on_with(source: Source, tmp_path: Path) -> None:
    def interrupt(done: int, num_images: int) -> None:
        if done >= 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(source, tmp_path / "dataset", samples_per_shard=4, num_workers=1, progress=interrupt)
    assert not (tmp_path / "dataset").exists()
    assert not (tmp_path / ".dataset.lock").exists()
    told: list[int] = []
    pack(source, tmp_path / "dataset", samples_per_shard=4, progress=lambda done, _: told.append(done))
    assert told[0] >= 4  # the fifth image is packed when the first shard has been noted
    assert told[-1] == 27


def test_two_imports_to_one_place_do_not_mix(source: Source, tmp_path: Path) -> None:
    second: list[str] = []

    def import_as_well(done: int, num_images: int) -> None:
        if not second:
            with pytest.raises(InputError, match="another import is writing") as raised:
                pack(source, tmp_path / "dataset")
            second.append(str(raised.value))

    first = pack(source, tmp_path / "dataset", progress=import_as_well)
    assert second == [f"another import is writing {tmp_path / 'dataset'}: wait for it or choose another place"]
    assert Manifest.load(tmp_path / "dataset") == first


@pytest.mark.parametrize("change", ["content", "time", "vanishes"])
def test_an_image_that_changes_meanwhile_is_named(source: Source, tmp_path: Path, change: str) -> None:
    path = source.splits["test"][-1].path

    def meddle(done: int, num_images: int) -> None:
        if done == 0:  # planned, and not a byte read yet
            if change == "vanishes":
                path.unlink(missing_ok=True)
            elif change == "time":
                os.utime(path, ns=(1, 1))
            else:
                status = path.stat()
                path.write_bytes(path.read_bytes() + b"more")
                os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    what = "has vanished" if change == "vanishes" else "was changed while it was packed"
    with pytest.raises(InputError, match=f"image26.png {what}"):
        pack(source, tmp_path / "dataset", progress=meddle)
    assert not (tmp_path / "dataset").exists()


def test_a_missing_image_is_named_before_anything_is_written(source: Source, tmp_path: Path) -> None:
    source.splits["val"][2].path.unlink()
    with pytest.raises(InputError, match=r"image21\.png has vanished: put it right"):
        pack(source, tmp_path / "dataset")
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_a_full_disk_is_one_line_and_keeps_what_is_done(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = os.fsync
    synced: list[int] = []

    def full(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(pack_module.os, "fsync", full)
    with pytest.raises(InputError, match=r"can't write .*: the disk is full: free some space, and the same import"):
        pack(source, tmp_path / "dataset", samples_per_shard=4, num_workers=1)
    monkeypatch.undo()
    told: list[int] = []
    pack(source, tmp_path / "dataset", samples_per_shard=4, progress=lambda done, _: told.append(done))
    assert told[0] == 8  # a sync of the journal's head, then two for each shard


def test_a_place_that_cannot_be_written_is_one_line(source: Source, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"can't write .*file/dataset: a part of this path is a file: choose another"):
        pack(source, tmp_path / "file" / "dataset")


@pytest.mark.parametrize(("setting", "value"), [("samples_per_shard", 0), ("num_workers", 0)])
def test_refuses_less_than_one(source: Source, tmp_path: Path, setting: str, value: int) -> None:
    with pytest.raises(InputError, match="need at least one"):
        pack(source, tmp_path / "dataset", **{setting: value})  # type: ignore[arg-type]


def test_another_dataset_is_refused_before_anything_is_packed(source: Source, tmp_path: Path) -> None:
    pack(source, tmp_path / "dataset")
    told: list[int] = []
    less = replace(source, splits={**source.splits, "test": []})
    with pytest.raises(InputError, match="holds another dataset"):
        pack(less, tmp_path / "dataset", progress=lambda done, _: told.append(done))
    assert told == []


def test_equal_counts_but_other_boxes_are_another_dataset(source: Source, tmp_path: Path) -> None:
    pack(source, tmp_path / "dataset")
    source.splits["val"][0] = replace(source.splits["val"][0], source="renamed.png")
    with pytest.raises(InputError, match="holds another dataset"):
        pack(source, tmp_path / "dataset")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dataset", "images"]


def test_webdataset_reads_it(source: Source, tmp_path: Path) -> None:
    """The library whose format this is, with its own decoders."""
    webdataset = pytest.importorskip("webdataset")
    pack(source, tmp_path / "dataset", samples_per_shard=19)
    shard = tmp_path / "dataset" / "train-000000.tar"
    samples = list(webdataset.WebDataset(str(shard), shardshuffle=False).decode("rgb8"))
    assert [sample["__key__"] for sample in samples] == [f"{number:06d}" for number in range(19)]
    assert [sample["png"][0, 0].tolist() for sample in samples] == [[8 * number] * 3 for number in range(19)]
    assert [len(sample["json"]["boxes"]) for sample in samples] == [number % 3 for number in range(19)]
