"""Out of a dataset folder and in again: the same images and boxes, whatever they are called and however they lie."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from faster_coco_eval import COCO
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from onestage.data.clean import clean
from onestage.data.formats import coco, voc, yolo
from onestage.data.formats import findings as kinds
from onestage.data.formats.record import Box, Record, Source
from onestage.data.manifest import FILE_NAME, Manifest
from onestage.data.pack import pack
from onestage.data.unpack import export
from onestage.errors import InputError

READERS: dict[str, Callable[..., Any]] = {"voc": voc.read, "coco": coco.read, "yolo": yolo.read}
FORMATS = list(READERS)
ROUNDING_PX = {"voc": 1e-9, "coco": 1e-9, "yolo": 1e-6}


@dataclass(frozen=True)
class Drawn:
    """A box of a generated image: what must come back."""

    name: str
    box: Box
    difficult: bool
    crowd: bool


@dataclass(frozen=True)
class Picture:
    """A generated image; width and height are those of the upright picture."""

    split: str
    name: str
    content: bytes
    width: int
    height: int
    orientation: int
    drawn: list[Drawn]


def encoded(number: int, *, width: int, height: int, format: str, orientation: int) -> bytes:
    """An image that differs from that of any other number: it is what images are known by."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = (height, width) if orientation >= 5 else (width, height)
    buffer = io.BytesIO()
    Image.new("RGB", stored, (number * 16, 40, 90)).save(buffer, format, exif=exif)
    return buffer.getvalue()


names = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=12).filter(
    lambda name: len(name.encode()) < 200
)
class_names = st.lists(
    st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=8)
    | st.sampled_from(["no", "null", "1", "1e3", "a b", "<&>", "[x]", "wi-fi: on", "été", "#"]),
    min_size=1,
    max_size=4,
    unique=True,
)


@st.composite
def boxes_in(draw: st.DrawFn, *, width: int, height: int) -> Box:
    """A box on the image, from a hundredth of a pixel to all of it; in whole pixels as often as not."""

    def side(length: int) -> tuple[float, float]:
        if draw(st.booleans()):
            low = draw(st.integers(0, length - 1))
            return float(low), float(draw(st.integers(low + 1, length)))
        start = draw(st.floats(0, length - 0.01))
        return start, draw(st.floats(start + 0.01, max(start + 0.01, length)))

    (left, right), (top, bottom) = side(width), side(height)
    return left, top, min(right, width), min(bottom, height)


@st.composite
def sets(draw: st.DrawFn) -> tuple[list[str], list[Picture]]:
    """Classes and a few images of up to three splits."""
    classes = draw(class_names)
    splits = draw(st.sampled_from([["train"], ["train", "val"], ["train", "val", "test"], ["test"]]))
    pictures = []
    for number in range(draw(st.integers(len(splits), 6))):
        width, height = draw(st.integers(1, 40)), draw(st.integers(1, 40))
        format, orientation = draw(st.sampled_from(["JPEG", "PNG"])), draw(st.sampled_from([1, 1, 1, *range(2, 9)]))
        drawn: list[Drawn] = []
        for box in draw(st.lists(boxes_in(width=width, height=height), max_size=5)):
            one = Drawn(draw(st.sampled_from(classes)), box, draw(st.booleans()), draw(st.booleans()))
            # Boxes that nearly coincide are one to an import.
            if all(max(abs(a - b) for a, b in zip(one.box, other.box, strict=True)) > 0.6 for other in drawn):
                drawn.append(one)
        content = encoded(number, width=width, height=height, format=format, orientation=orientation)
        suffix = draw(st.sampled_from([".jpg", ".JPEG"] if format == "JPEG" else [".png"]))
        pictures.append(
            Picture(splits[number % len(splits)], draw(names) + suffix, content, width, height, orientation, drawn)
        )
    return classes, pictures


def write(folder: Path, classes: list[str], pictures: list[Picture]) -> None:
    """Pack the pictures, each from a file of a plain name, as the dataset ``folder``."""
    files = folder.with_name("files")
    files.mkdir()
    splits: dict[str, list[Record]] = {}
    for number, picture in enumerate(pictures):
        path = files / f"{number}{Path(picture.name).suffix or '.jpg'}"
        path.write_bytes(picture.content)
        splits.setdefault(picture.split, []).append(
            Record(
                path=path,
                width=picture.width,
                height=picture.height,
                boxes=[one.box for one in picture.drawn],
                labels=[classes.index(one.name) for one in picture.drawn],
                difficult=[one.difficult for one in picture.drawn],
                crowd=[one.crowd for one in picture.drawn],
                source=f"some/{picture.name}",
                orientation=picture.orientation,
            )
        )
    pack(Source(name="generated", classes=tuple(classes), splits=splits, findings=[]), folder)


def assert_same(source: Source, pictures: list[Picture], *, format: str) -> None:
    """What was read is what was generated, image by image, as far as the format can say it."""
    records = {one.path.read_bytes(): (split, one) for split, many in source.splits.items() for one in many}
    assert len(records) == sum(len(many) for many in source.splits.values()) == len(pictures)
    for picture in pictures:
        split, record = records[picture.content]
        assert split == picture.split
        assert (record.width, record.height) == (picture.width, picture.height)
        assert record.orientation == picture.orientation
        expected = [one for one in picture.drawn if not (format == "yolo" and one.crowd)]
        assert [source.classes[label] for label in record.labels] == [one.name for one in expected]
        assert record.difficult == [one.difficult and format != "yolo" for one in expected]
        assert record.crowd == [one.crowd for one in expected]
        for box, one in zip(record.boxes, expected, strict=True):
            assert box == pytest.approx(one.box, abs=ROUNDING_PX[format])


def round_trip(format: str, classes: list[str], pictures: list[Picture]) -> None:
    """Import, export, import: and as the second import is packed and exported again, once more the same."""
    with TemporaryDirectory() as folder:
        root = Path(folder)
        write(root / "dataset", classes, pictures)
        export(root / "dataset", format, root / "once")
        once = clean(READERS[format](root / "once"))
        assert_same(once, pictures, format=format)
        assert {finding.kind for finding in once.findings} <= {kinds.ROTATED}
        if format != "voc":  # which lists no classes
            assert once.classes == tuple(classes)
        pack(once, root / "again")
        export(root / "again", format, root / "twice")
        assert_same(clean(READERS[format](root / "twice")), pictures, format=format)


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(generated=sets())
def test_out_and_in_again(format: str, generated: tuple[list[str], list[Picture]]) -> None:
    round_trip(format, *generated)


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(generated=sets())
def test_out_and_in_again_many_times(format: str, generated: tuple[list[str], list[Picture]]) -> None:
    round_trip(format, *generated)


def example(folder: Path) -> list[Picture]:
    """Two splits, names that clash or are unfit, all marks, a turned image."""
    drawn = [
        Drawn("cat", (0.5, 2.0, 10.0, 9.25), difficult=True, crowd=False),
        Drawn("dog", (3.0, 4.0, 30.0, 20.0), difficult=False, crowd=True),
        Drawn("cat", (6.0, 7.0, 8.0, 9.0), difficult=False, crowd=False),
    ]
    given = [
        ("train", "a b.jpg", 1, drawn),
        ("train", "é.png", 1, []),
        ("train", "../../evil\n.jpg", 1, drawn[:1]),
        ("val", "A B.png", 6, drawn[2:]),
        ("val", "000001.jpg", 1, []),
    ]
    pictures = [
        Picture(
            split,
            name,
            encoded(number, width=40, height=30, format="PNG" if "png" in name else "JPEG", orientation=orientation),
            40,
            30,
            orientation,
            drawn,
        )
        for number, (split, name, orientation, drawn) in enumerate(given)
    ]
    write(folder, ["cat", "dog"], pictures)
    return pictures


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


STEMS = {"train": ["a b.jpg", "é.png", "000002.jpg"], "val": ["000003.png", "000001.jpg"]}
"""What the images of ``example`` are called: a name that is unfit or taken, if only but for its case, gives way."""


def test_voc_files(tmp_path: Path) -> None:
    pictures = example(tmp_path / "dataset")
    told: list[tuple[int, int]] = []
    exported = export(
        tmp_path / "dataset", "voc", tmp_path / "out", progress=lambda done, total: told.append((done, total))
    )
    assert exported.splits == {"train": (3, 4), "val": (2, 1)}
    assert told == [(done, 5) for done in range(1, 6)]
    out = tmp_path / "out"
    every = [name for names in STEMS.values() for name in names]
    assert files(out) == {
        *(f"JPEGImages/{name}" for name in every),
        *(f"Annotations/{Path(name).stem}.xml" for name in every),
        "ImageSets/Main/train.txt",
        "ImageSets/Main/val.txt",
    }
    assert (out / "ImageSets" / "Main" / "train.txt").read_text() == "a b\né\n000002\n"
    assert (out / "JPEGImages" / "a b.jpg").read_bytes() == pictures[0].content
    root = ElementTree.parse(out / "Annotations" / "a b.xml").getroot()
    assert [root.findtext(tag) for tag in ("filename", "size/width", "size/height")] == ["a b.jpg", "40", "30"]
    corners = [
        [node.findtext(f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")] for node in root.iter("object")
    ]
    assert corners == [["1.5", "3", "10", "9.25"], ["4", "5", "30", "20"], ["7", "8", "8", "9"]]
    assert [node.findtext("difficult") for node in root.iter("object")] == ["1", "0", "0"]
    assert [sentence.split(":")[0] for sentence in exported.lost] == ["crowds", "EXIF"]
    assert "1 boxes" in exported.lost[0]


def test_coco_files_load_elsewhere(tmp_path: Path) -> None:
    """faster-coco-eval's own reader sees the images and boxes that were generated."""
    pictures = example(tmp_path / "dataset")
    exported = export(tmp_path / "dataset", "coco", tmp_path / "out")
    assert [sentence.split(":")[0] for sentence in exported.lost] == ["EXIF"]
    assert files(tmp_path / "out") == {
        "annotations/instances_train.json",
        "annotations/instances_val.json",
        *(f"{split}/{name}" for split, names in STEMS.items() for name in names),
    }
    for split, stems in STEMS.items():
        loaded = COCO(str(tmp_path / "out" / "annotations" / f"instances_{split}.json"))
        assert [one["name"] for one in loaded.loadCats(loaded.getCatIds())] == ["cat", "dog"]
        images = loaded.loadImgs(loaded.getImgIds())
        assert [one["file_name"] for one in images] == stems
        for image, picture in zip(images, [one for one in pictures if one.split == split], strict=True):
            assert (image["width"], image["height"]) == (40, 30)
            assert (tmp_path / "out" / split / image["file_name"]).read_bytes() == picture.content
            annotations = loaded.loadAnns(loaded.getAnnIds(imgIds=[image["id"]]))
            assert len(annotations) == len(picture.drawn)
            for annotation, one in zip(annotations, picture.drawn, strict=True):
                left, top, right, bottom = one.box
                assert annotation["bbox"] == [left, top, right - left, bottom - top]
                assert annotation["area"] == (right - left) * (bottom - top)
                assert loaded.loadCats([annotation["category_id"]])[0]["name"] == one.name
                assert (annotation["iscrowd"], annotation["difficult"]) == (one.crowd, one.difficult)


def test_yolo_files(tmp_path: Path) -> None:
    example(tmp_path / "dataset")
    exported = export(tmp_path / "dataset", "yolo", tmp_path / "out")
    assert files(tmp_path / "out") == {
        "data.yaml",
        *(f"images/{split}/{name}" for split, names in STEMS.items() for name in names),
        *(f"labels/{split}/{Path(name).stem}.txt" for split, names in STEMS.items() for name in names),
    }
    # (0.5 + 10) / 2 / 40, (2 + 9.25) / 2 / 30, 9.5 / 40, 7.25 / 30; then 7 / 40, 8 / 30, 2 / 40, 2 / 30. No crowd.
    assert (tmp_path / "out" / "labels" / "train" / "a b.txt").read_text() == (
        "0 0.13125 0.1875 0.2375 0.2416666667\n0 0.175 0.2666666667 0.05 0.06666666667\n"
    )
    assert (tmp_path / "out" / "labels" / "train" / "é.txt").read_text() == ""
    assert (tmp_path / "out" / "data.yaml").read_text() == (
        "train: images/train\nval: images/val\nnames:\n  0: cat\n  1: dog\n"
    )
    assert [sentence.split(":")[0] for sentence in exported.lost] == ["crowds", "difficult", "EXIF"]


def test_all_or_nothing(tmp_path: Path) -> None:
    example(tmp_path / "dataset")
    shard = tmp_path / "dataset" / "val-000000.tar"
    shard.write_bytes(shard.read_bytes()[:2000])
    with pytest.raises(InputError, match=r"val-000000.tar"):
        export(tmp_path / "dataset", "coco", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"dataset", "files"}


def test_only_an_empty_place_is_written_to(tmp_path: Path) -> None:
    example(tmp_path / "dataset")
    (tmp_path / "out").mkdir()
    export(tmp_path / "dataset", "voc", tmp_path / "out")
    before = files(tmp_path / "out")
    for place in (tmp_path / "out", tmp_path / "dataset" / FILE_NAME):
        with pytest.raises(InputError, match="is not empty: choose another place"):
            export(tmp_path / "dataset", "yolo", place)
    assert files(tmp_path / "out") == before


def test_a_split_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    example(tmp_path / "dataset")
    manifest = Manifest.load(tmp_path / "dataset")
    manifest.splits["../../elsewhere"] = manifest.splits.pop("val")
    manifest.save(tmp_path / "dataset")
    with pytest.raises(InputError, match=r"has a split '../../elsewhere', which can be no file's name"):
        export(tmp_path / "dataset", "coco", tmp_path / "out")


def test_other_splits_are_written_and_said(tmp_path: Path) -> None:
    picture = Picture("extra", "a.jpg", encoded(0, width=4, height=4, format="JPEG", orientation=1), 4, 4, 1, [])
    write(tmp_path / "dataset", ["cat"], [picture])
    for format in ("voc", "yolo"):
        exported = export(tmp_path / "dataset", format, tmp_path / format)
        assert [sentence.split(":")[0] for sentence in exported.lost] == ["split extra"]
    export(tmp_path / "dataset", "coco", tmp_path / "coco")
    assert_same(clean(coco.read(tmp_path / "coco")), [picture], format="coco")


@pytest.mark.parametrize("name", ["a\x01b", "two\nlines"])
def test_a_class_that_xml_cannot_hold(tmp_path: Path, name: str) -> None:
    write(tmp_path / "dataset", [name], [
        Picture("train", "a.jpg", encoded(0, width=4, height=4, format="JPEG", orientation=1), 4, 4, 1, [])
    ])  # fmt: skip
    with pytest.raises(InputError, match="has characters that XML can't hold: export as coco"):
        export(tmp_path / "dataset", "voc", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_such_format(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no format 'kitti': choose one of voc, coco, yolo"):
        export(tmp_path, "kitti", tmp_path / "out")


def test_numpy_sees_the_stored_pixels(tmp_path: Path) -> None:
    """Bytes are written as they came, so a turned image is still stored as it was."""
    pictures = example(tmp_path / "dataset")
    export(tmp_path / "dataset", "yolo", tmp_path / "out")
    with Image.open(tmp_path / "out" / "images" / "val" / "000003.png") as image:
        assert np.asarray(image).shape == (40, 30, 3)
        assert image.getexif()[0x0112] == pictures[3].orientation
