"""Sets in which every fault was planted by hand; images are noise, so that no two have the same bytes by chance."""

import hashlib
import io
import json
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from onestage.data import check as checks
from onestage.data import contents
from onestage.data.contents import Contents, open_set
from onestage.data.faults import Unreadable
from onestage.data.formats import findings as kinds
from onestage.data.formats.record import Record, Source
from onestage.data.manifest import Manifest, Split
from onestage.data.pack import pack
from onestage.data.samples import decode
from onestage.data.shards import ShardReader
from onestage.data.statistics import measure
from onestage.data.transforms import letterbox
from onestage.errors import InputError

Box = tuple[float, float, float, float]


def picture(
    path: Path, *, seed: int, size: tuple[int, int] = (100, 80), mode: str = "RGB", orientation: int = 1
) -> None:
    """Coarse noise, which JPEG keeps small, of its own bytes for each seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse).resize(size).convert(mode).save(path, **({} if orientation == 1 else {"exif": exif}))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONESTAGE_CACHE", str(tmp_path_factory.mktemp("cache")))


class Voc:
    """A Pascal VOC folder, written image by image; boxes are 0-based edges."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seed = 0

    def add(
        self,
        split: str,
        stem: str,
        boxes: Sequence[tuple[str, Box]],
        *,
        suffix: str = ".jpg",
        size: tuple[int, int] = (100, 80),
        **more: object,
    ) -> Path:
        self.seed += 1
        path = self.folder / "JPEGImages" / f"{stem}{suffix}"
        picture(path, seed=self.seed, size=size, **more)  # type: ignore[arg-type]
        objects = ""
        for name, (left, top, right, bottom) in boxes:
            corners = {"xmin": left + 1, "ymin": top + 1, "xmax": right, "ymax": bottom}
            bounds = "".join(f"<{side}>{value}</{side}>" for side, value in corners.items())
            objects += f"<object><name>{name}</name><bndbox>{bounds}</bndbox></object>"
        annotation = self.folder / "Annotations" / f"{stem}.xml"
        annotation.parent.mkdir(exist_ok=True)
        annotation.write_text(f"<annotation><filename>{stem}{suffix}</filename>{objects}</annotation>")
        lists = self.folder / "ImageSets" / "Main" / f"{split}.txt"
        lists.parent.mkdir(parents=True, exist_ok=True)
        with lists.open("a") as file:
            file.write(f"{stem}\n")
        return path


def flip_middle(path: Path) -> None:
    """What a bad disk does: the file keeps its length, its header and its end."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 40] = bytes(byte ^ 0xFF for byte in content[middle : middle + 40])
    path.write_bytes(content)


def look(place: Path, *, side: int = 416, stride: int = 8, **more: object) -> tuple[Contents, list[checks.Group]]:
    opened = open_set(place, **more)  # type: ignore[arg-type]
    return opened, checks.check(opened, measure(opened), input_size=[side, side], strides=[stride])


def counts(groups: list[checks.Group]) -> dict[str, int]:
    return {group.kind: len(group.findings) for group in groups}


def places(groups: list[checks.Group], kind: str) -> list[str]:
    return [finding.where for group in groups if group.kind == kind for finding in group.findings]


CAT, DOG = ("cat", (10.0, 10.0, 50.0, 60.0)), ("dog", (40.0, 20.0, 90.0, 70.0))


def whole(folder: Path) -> Voc:
    """Nothing is wrong with it: cats and dogs in train and val."""
    voc = Voc(folder)
    for number in range(3):
        voc.add("train", f"t{number}", [CAT, DOG])
        voc.add("val", f"v{number}", [CAT, DOG])
    return voc


def test_every_planted_fault_is_counted(tmp_path: Path) -> None:
    voc = whole(tmp_path)
    cut = voc.add("train", "cut", [CAT])
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    flip_middle(voc.add("train", "damaged", [CAT], size=(600, 400)))
    voc.add("train", "words", [CAT]).write_text("no image at all")
    voc.add("train", "grey", [CAT], mode="L")
    voc.add("val", "cmyk", [CAT], mode="CMYK")
    voc.add("train", "turned", [("cat", (5, 5, 40, 40))], orientation=6)
    voc.add("train", "flat", [CAT, ("cat", (30, 30, 30, 60)), ("cat", (30, 30, 60, 29))])
    voc.add("train", "beyond", [CAT, ("cat", (120, 10, 140, 40)), ("cat", (80, 60, 130, 90))])
    voc.add("train", "doubled", [CAT, CAT, CAT, DOG])
    shutil.copy(voc.folder / "JPEGImages" / "t0.jpg", voc.add("train", "t0_again", [CAT]))
    shutil.copy(voc.folder / "JPEGImages" / "t1.jpg", voc.add("val", "t1_again", [CAT]))
    voc.add("train", "icon", [("cat", (0, 0, 20, 20))], size=(31, 40))
    voc.add("train", "wide", [("cat", (0, 0, 7, 40)), ("cat", (0, 50, 8, 90))], size=(832, 416))
    opened, groups = look(tmp_path)
    assert counts(groups) == {
        kinds.CUT_SHORT: 1,
        kinds.UNREADABLE_IMAGE: 1,
        kinds.NOT_RGB: 2,
        kinds.ROTATED: 1,
        kinds.NO_AREA: 2,
        kinds.OUTSIDE: 1,
        kinds.CLIPPED: 1,
        kinds.TWICE: 2,
        checks.DAMAGED: 1,
        checks.TWICE_IN_SPLIT: 1,
        kinds.IN_TWO_SPLITS: 1,
        checks.SMALL_IMAGE: 1,
        checks.SMALL_BOX: 1,
    }
    assert places(groups, checks.DAMAGED) == ["JPEGImages/damaged.jpg"]
    assert places(groups, checks.TWICE_IN_SPLIT) == ["JPEGImages/t0_again.jpg"]
    assert places(groups, kinds.IN_TWO_SPLITS) == ["JPEGImages/t1.jpg"]
    assert places(groups, checks.SMALL_IMAGE) == ["JPEGImages/icon.jpg"]
    assert places(groups, checks.SMALL_BOX) == ["JPEGImages/wide.jpg"]
    total = measure(opened).total()
    # Six whole images with two boxes; then those that can be opened, in the order above.
    assert (total.images, total.boxes) == (6 + 11, 12 + sum([1, 1, 1, 1, 1, 2, 2, 1, 1, 1, 2]))
    assert all(group.remedy for group in groups)


def test_a_damaged_png_is_found(tmp_path: Path) -> None:
    flip_middle(whole(tmp_path).add("train", "damaged", [CAT], suffix=".png"))
    _, groups = look(tmp_path)
    # Of a PNG, reading its header may already tell.
    assert counts(groups) in ({checks.DAMAGED: 1}, {kinds.UNREADABLE_IMAGE: 1})


def test_images_listed_in_two_splits_are_told_once(tmp_path: Path) -> None:
    voc = whole(tmp_path)
    with (voc.folder / "ImageSets" / "Main" / "val.txt").open("a") as file:
        file.write("t0\n")
    _, groups = look(tmp_path)
    assert counts(groups) == {kinds.IN_TWO_SPLITS: 1}


def test_classes_that_are_not_to_be_imported(tmp_path: Path) -> None:
    whole(tmp_path)
    opened, groups = look(tmp_path, classes=["cat", "cow"])
    assert counts(groups) == {kinds.UNKNOWN_CLASS: 1, checks.NO_BOXES: 1}
    assert places(groups, checks.NO_BOXES) == ["cow"]
    assert measure(opened).total().by_class.tolist() == [6, 0]


@pytest.mark.parametrize(("num_cats", "rare"), [(20, 0), (21, 1)])
def test_a_class_is_rare_below_a_twentieth_of_the_most_frequent(tmp_path: Path, num_cats: int, rare: int) -> None:
    voc = Voc(tmp_path)
    voc.add("train", "one", [DOG])
    for number in range(num_cats):
        voc.add("train", f"cat{number}", [CAT])
    voc.add("val", "both", [CAT, DOG])
    _, groups = look(tmp_path)
    assert counts(groups) == ({checks.RARE_CLASS: rare} if rare else {})
    if rare:
        (group,) = groups
        assert group.findings[0].what == "boxes: 1, where cat has 21"


def test_classes_missing_from_a_split_and_splits_without_any(tmp_path: Path) -> None:
    voc = Voc(tmp_path)
    voc.add("train", "a", [CAT, DOG])
    voc.add("val", "b", [DOG])
    voc.add("test", "c", [])
    _, groups = look(tmp_path)
    assert counts(groups) == {checks.NOT_IN_SPLIT: 1, checks.EMPTY_SPLIT: 1}
    assert places(groups, checks.NOT_IN_SPLIT) == ["cat"]
    assert places(groups, checks.EMPTY_SPLIT) == ["test"]


@pytest.mark.parametrize(
    ("side", "stride", "small"), [(416, 8, 1), (416, 4, 0), (832, 8, 0), (416, 16, 2), (208, 8, 2)]
)
def test_small_boxes_depend_on_the_input_and_the_finest_stride(
    tmp_path: Path, side: int, stride: int, small: int
) -> None:
    """7 and 8 pixels wide on 832: 3.5 and 4 at 416, where half the stride of 8 is 4."""
    Voc(tmp_path).add("train", "a", [("cat", (0, 0, 7, 90)), ("cat", (0, 100, 8, 190))], size=(832, 416))
    _, groups = look(tmp_path, side=side, stride=stride)
    assert counts(groups) == ({checks.SMALL_BOX: small} if small else {})


@given(width=st.integers(1, 90), height=st.integers(1, 90), high=st.integers(1, 64), wide=st.integers(1, 64))
@settings(max_examples=50, deadline=None)
def test_boxes_are_measured_as_the_letterbox_shows_them(width: int, height: int, high: int, wide: int) -> None:
    entry = contents.Entry("train", "a", width, height, [(0.0, 0.0, width, height / 2)], [0], 1, bytes)
    statistics = measure(Contents("a", ("cat",), {"train": [entry]}, [], packed=False))
    _, placement = letterbox(np.zeros((height, width, 3), np.uint8), size=[high, wide])
    expected = np.multiply(placement.scale, (width, height / 2))
    np.testing.assert_allclose(statistics.letterboxed_sides([high, wide]), [expected])


@given(seed=st.integers(0, 2**32 - 1), num_images=st.integers(1, 4))
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_nothing_is_found_in_a_clean_set(tmp_path_factory: pytest.TempPathFactory, seed: int, num_images: int) -> None:
    folder = tmp_path_factory.mktemp("clean")
    generator = np.random.default_rng(seed)
    voc = Voc(folder / "voc")
    voc.seed = seed
    for split in ("train", "val", "test"):
        for number in range(num_images):
            width, height = generator.integers(64, 200, 2).tolist()
            boxes = []
            for name in ("cat", "dog"):
                # At least 20 pixels of at most 200: 41 of 416.
                left, top = generator.integers(0, (width - 20, height - 20)).tolist()
                right, bottom = generator.integers((left + 20, top + 20), (width + 1, height + 1)).tolist()
                boxes.append((name, (left, top, right, bottom)))
            suffix = [".jpg", ".png"][int(generator.integers(2))]
            voc.add(split, f"{split}{number}", boxes, size=(width, height), suffix=suffix)
    opened, groups = look(folder / "voc")
    assert groups == []
    records = {
        split: [
            Record(
                path=folder / "voc" / one.where,
                width=one.width,
                height=one.height,
                boxes=one.boxes,
                labels=one.labels,
                difficult=[False] * len(one.labels),
                crowd=[False] * len(one.labels),
                source=one.where,
            )
            for one in entries
        ]
        for split, entries in opened.splits.items()
    }
    pack(Source("clean", opened.classes, records, []), folder / "packed")
    packed, groups = look(folder / "packed", verify=True)
    assert groups == []
    assert packed.packed
    for split, entries in opened.splits.items():
        assert [one.boxes for one in packed.splits[split]] == [one.boxes for one in entries]
        assert [one.content() for one in packed.splits[split]] == [one.content() for one in entries]


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """Fourteen images of 100x80, each with a cat and a dog, in train shards of up to three and one val shard."""
    records = []
    for number in range(14):
        path = tmp_path / "images" / f"{number}.jpg"
        picture(path, seed=number)
        boxes = [CAT[1], DOG[1]]
        records.append(Record(path, 100, 80, boxes, [0, 1], [False, False], [False, False], path.name))
    source = Source("packed", ("cat", "dog"), {"train": records[:11], "val": records[11:]}, [])
    pack(source, tmp_path / "packed", samples_per_shard=3)
    return tmp_path / "packed"


def rewrite(root: Path, changes: dict[str, Callable[[bytes], bytes | None]]) -> None:
    """Members of the shards anew, or away; the manifest vouches for the result, as if another program had made it."""
    manifest = Manifest.load(root)
    splits = {}
    for name, split in manifest.splits.items():
        shards = []
        for shard in split.shards:
            path = root / shard.name
            with tarfile.open(path) as tar:
                members = {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]
            with tarfile.open(path, "w") as tar:
                for member, content in members.items():
                    changed = changes.get(member, lambda same: same)(content)
                    if changed is not None:
                        info = tarfile.TarInfo(member)
                        info.size = len(changed)
                        tar.addfile(info, io.BytesIO(changed))
            with path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            shards.append(replace(shard, num_bytes=path.stat().st_size, sha256=sha256))
        splits[name] = Split(tuple(shards))
    replace(manifest, splits=splits).save(root)


def fields(**changes: object) -> Callable[[bytes], bytes]:
    return lambda content: json.dumps({**json.loads(content), **changes}).encode()


def test_faults_of_packed_samples(packed: Path) -> None:
    wide = [[10, 10, 50, 60], [40, 20, 110, 70]]
    half = io.BytesIO()
    Image.new("L", (100, 80), 77).save(half, "JPEG")
    rewrite(
        packed,
        {
            "000000.json": lambda content: content[:-9],
            "000001.json": fields(labels=[0, 2]),
            "000002.json": fields(labels=[0]),
            "000003.json": lambda _: None,
            "000004.jpg": lambda _: None,
            "000005.jpg": lambda content: content[: len(content) // 2],
            "000006.json": fields(boxes=[[10, 10, 10, 60], [90, 20, 20, 70]]),
            "000007.json": fields(boxes=wide),
            "000008.json": fields(boxes=[[110, 10, 150, 60], [10.2, 10, 50, 60]], labels=[0, 0]),
            "000009.json": fields(boxes=[[10.2, 10, 50, 60], [10, 10, 50, 60]], labels=[1, 1]),
            "000010.json": fields(width=50, boxes=[[0, 0, 40, 40], [0, 0, 50, 40]]),
            "000011.jpg": lambda _: half.getvalue(),
            "000012.json": fields(boxes=[[10, 10, 50, 60], [float("nan"), 20, 90, 70]]),
            "000013.json": fields(orientation=9),
        },
    )
    _, groups = look(packed, verify=True)
    assert counts(groups) == {
        contents.BROKEN_SAMPLE: 7,
        kinds.NO_AREA: 2,
        kinds.CLIPPED: 1,
        kinds.OUTSIDE: 1,
        kinds.TWICE: 1,
        checks.DAMAGED: 1,
        kinds.SIZE_DIFFERS: 1,
        kinds.NOT_RGB: 1,
    }
    # What is said to be skipped is what training's own decoding refuses, and nothing else.
    manifest = Manifest.load(packed)
    refused = Counter()
    for split in manifest.splits:
        reader = ShardReader(packed, split, manifest=manifest)
        keys = manifest.split(split).keys()
        for key in keys:
            try:
                decode(reader.read(key), num_classes=2)
            except Unreadable:
                refused[key] += 1
    said = places(groups, contents.BROKEN_SAMPLE) + places(groups, checks.DAMAGED)
    assert sorted(where.split(", ")[1][:6] for where in said) == sorted(refused)


def test_a_crowd_where_an_object_is_is_no_double(tmp_path: Path) -> None:
    """An import keeps both, so that a check of what it packed must not tell of it."""
    picture(tmp_path / "a.jpg", seed=1)
    boxes = [(0, 0, 70, 70)] * 2
    record = Record(tmp_path / "a.jpg", 100, 80, boxes, [0, 0], [False] * 2, [True, False], "a.jpg")
    pack(Source("crowd", ("cat",), {"train": [record]}, []), tmp_path / "packed")
    assert look(tmp_path / "packed")[1] == []


def test_a_turned_image_in_a_packed_set(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg", seed=1, orientation=6)
    record = Record(tmp_path / "a.jpg", 80, 100, [(0, 0, 70, 90)], [0], [False], [False], "a.jpg", orientation=6)
    pack(Source("turned", ("cat",), {"train": [record]}, []), tmp_path / "packed")
    _, groups = look(tmp_path / "packed")
    assert counts(groups) == {kinds.ROTATED: 1}  # and no size that differs: it is 80x100 once it is upright


@pytest.mark.parametrize("how", ["gone", "cut", "noise"])
def test_a_lost_shard_is_one_finding(packed: Path, how: str) -> None:
    path = packed / "train-000001.tar"
    if how == "gone":
        path.unlink()
    else:
        size = path.stat().st_size
        path.write_bytes(bytes(700) if how == "cut" else b"\xaa" * size)
    opened, groups = look(packed)
    assert counts(groups) == {contents.BROKEN_SHARD: 1}
    (finding,) = groups[0].findings
    assert finding.where == "train-000001.tar"
    assert finding.what.endswith("(3 images)")
    assert [len(entries) for entries in opened.splits.values()] == [8, 3]


def test_a_changed_shard_is_lost(packed: Path) -> None:
    path = packed / "val-000000.tar"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # in the padding at the end
    path.write_bytes(content)
    _, groups = look(packed, verify=True)
    assert counts(groups) == {contents.BROKEN_SHARD: 1, checks.EMPTY_SPLIT: 1}


def test_a_shard_that_rots_is_found_by_its_hash_alone(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that rots changes no time of change: readers go on trusting what they verified before."""
    path = packed / "val-000000.tar"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    monkeypatch.setattr("onestage.data.cache.Checked.matches", lambda *_: True)
    assert counts(look(packed)[1]) == {}
    _, groups = look(packed, verify=True)
    assert counts(groups) == {contents.CHANGED_SHARD: 1}
    assert places(groups, contents.CHANGED_SHARD) == ["val-000000.tar"]


def test_an_image_that_vanishes_meanwhile_is_a_finding(tmp_path: Path) -> None:
    voc = whole(tmp_path)
    opened = open_set(tmp_path)
    (voc.folder / "JPEGImages" / "t2.jpg").unlink()
    groups = checks.check(opened, measure(opened), input_size=[416, 416], strides=[8])
    assert counts(groups) == {kinds.UNREADABLE_IMAGE: 1}


def test_progress_counts_every_image(tmp_path: Path) -> None:
    whole(tmp_path)
    told: list[tuple[int, int]] = []
    opened = open_set(tmp_path, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (6, 6)
    told.clear()
    checks.check(
        opened,
        measure(opened),
        input_size=[416, 416],
        strides=[8],
        progress=lambda done, total: told.append((done, total)),
    )
    assert told == [(done, 6) for done in range(1, 7)]


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    return folder


@pytest.mark.parametrize(
    ("files", "format"),
    [
        (["Annotations/a.xml", "notes.json"], "voc"),
        (["train/a.xml", "train/a.jpg"], "voc"),
        (["annotations/instances_val2017.json"], "coco"),
        (["train/_annotations.coco.json", "data.csv"], "coco"),
        (["labels.json", "images/a.jpg"], "coco"),
        (["data.yaml", "notes.json"], "yolo"),
        (["images/a.jpg", "labels/a.txt", "classes.txt", "notes.json"], "yolo"),
        (["annotations/a.xml", "images/a.png"], "voc"),
        (["images/a.jpg", "labels/a.txt", "classes.txt"], "yolo"),
        (["dataset.json", "Annotations/a.xml"], "packed"),
    ],
)
def test_the_format_is_recognised_by_its_files(tmp_path: Path, files: list[str], format: str) -> None:
    assert contents.recognise(touch(tmp_path, *files)) == format


@pytest.mark.parametrize(
    ("name", "format"), [("a.json", "coco"), ("my.yaml", "yolo"), ("my.yml", "yolo"), ("a.JSON", "coco")]
)
def test_a_file_tells_its_format(tmp_path: Path, name: str, format: str) -> None:
    assert contents.recognise(touch(tmp_path, name) / name) == format


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["a.jpg"], "is no dataset folder .* and neither VOC .* COCO .* nor YOLO"),
        (["Annotations/a.xml", "data.yaml"], "could be voc or yolo: say which with --format"),
    ],
)
def test_what_is_no_set_or_two_is_said(tmp_path: Path, files: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        contents.recognise(touch(tmp_path, *files))


def test_a_place_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is nothing at .*nowhere: check the path"):
        contents.recognise(tmp_path / "nowhere")


def test_a_packed_sets_classes_are_settled(packed: Path) -> None:
    with pytest.raises(InputError, match="is a dataset folder, whose classes are settled: leave --classes out"):
        open_set(packed, classes=["cat"])
