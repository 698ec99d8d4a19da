from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from onestage.data.formats import voc
from onestage.errors import InputError

BCCD = Path(__file__).parents[4] / "shared" / "data" / "bccd"
needs_bccd = pytest.mark.skipif(not BCCD.is_dir(), reason=f"no BCCD at {BCCD}")


def box(name: str, corners: tuple[float, float, float, float], *, difficult: int = 0) -> str:
    sides = "".join(f"<{s}>{v}</{s}>" for s, v in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True))
    return f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{sides}</bndbox></object>"


def annotate(folder: Path, stem: str, *objects: str, file_name: str = "", image: str | None = None) -> None:
    """An annotation that gives a wrong size, and its image of 100x80."""
    (folder / "Annotations").mkdir(parents=True, exist_ok=True)
    (folder / "JPEGImages").mkdir(exist_ok=True)
    size = "<size><width>1</width><height>1</height></size>"
    xml = f"<annotation><filename>{file_name}</filename>{size}{''.join(objects)}</annotation>"
    (folder / "Annotations" / f"{stem}.xml").write_text(xml)
    Image.new("RGB", (100, 80)).save(folder / "JPEGImages" / (image or f"{stem}.jpg"))


def list_split(folder: Path, split: str, *stems: str) -> None:
    (folder / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
    (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{stem}\n" for stem in stems))


def test_corners_are_one_based_and_inclusive(tmp_path: Path) -> None:
    annotate(tmp_path, "a", box("dog", (1, 1, 100, 80)), box("cat", (11, 21, 30, 40), difficult=1))
    source = voc.read(tmp_path)
    (record,) = source.splits["train"]
    assert (record.width, record.height) == (100, 80)
    assert record.boxes == [(0, 0, 100, 80), (10, 20, 30, 40)]
    assert source.classes == ("cat", "dog")
    assert record.labels == [1, 0]
    assert record.difficult == [False, True]
    assert record.crowd == [False, False]
    assert record.source == "JPEGImages/a.jpg"
    assert source.findings == []


def test_boxes_left_out_and_clipped_are_reported(tmp_path: Path) -> None:
    annotate(
        tmp_path,
        "a",
        box("cat", (5, 5, 5, 9)),
        box("cat", (0, 0, 50, 50)),
        box("cat", (90, 70, 103, 81)),
        box("cat", (101, 10, 120, 20)),
    )
    source = voc.read(tmp_path)
    assert source.splits["train"][0].boxes == [(0, 0, 50, 50), (89, 69, 100, 80)]
    kinds = ["box without area", "box clipped to the image", "box outside the image"]
    assert [finding.kind for finding in source.findings] == kinds
    assert source.findings[0].where == "Annotations/a.xml"
    assert source.findings[0].what == "cat with xmin 5, ymin 5, xmax 5, ymax 9 in an image of 100x80"


def test_own_stem_wins_over_file_name(tmp_path: Path) -> None:
    annotate(tmp_path, "a", file_name="b.jpg")
    annotate(tmp_path, "b", file_name="b.jpg")
    annotate(tmp_path, "c", file_name="other.jpg", image="other.jpg")
    annotate(tmp_path, "d", image="d.PNG")
    names = [record.path.name for record in voc.read(tmp_path).splits["train"]]
    assert names == ["a.jpg", "b.jpg", "other.jpg", "d.PNG"]


def test_splits(tmp_path: Path) -> None:
    for stem in "abcd":
        annotate(tmp_path, stem)
    list_split(tmp_path, "trainval", "a", "b")
    list_split(tmp_path, "test", "c")
    source = voc.read(tmp_path)
    assert {split: [r.path.stem for r in records] for split, records in source.splits.items()} == {
        "train": ["a", "b"],
        "test": ["c"],
    }
    assert [(finding.kind, finding.where) for finding in source.findings] == [
        ("image in no split", "Annotations/d.xml")
    ]
    list_split(tmp_path, "train", "a", "")
    list_split(tmp_path, "val", "b", "d", "a")
    source = voc.read(tmp_path)
    assert [len(records) for records in source.splits.values()] == [1, 3, 1]
    assert [(finding.kind, finding.what) for finding in source.findings] == [("image listed twice", "a, also in train")]


def test_given_classes(tmp_path: Path) -> None:
    annotate(tmp_path, "a", box("cat", (1, 1, 9, 9)), box("dog", (1, 1, 9, 9)))
    assert voc.read(tmp_path, classes=["dog", "owl", "cat"]).splits["train"][0].labels == [2, 0]
    with pytest.raises(InputError, match="has classes dog beside cat: name them all in classes"):
        voc.read(tmp_path, classes=["cat"])


def test_missing_image_is_named(tmp_path: Path) -> None:
    annotate(tmp_path, "a")
    (tmp_path / "JPEGImages" / "a.jpg").unlink()
    with pytest.raises(InputError, match=r"Annotations/a.xml has no image: put a.jpg or .png into .*JPEGImages"):
        voc.read(tmp_path)


def test_missing_annotation_is_named(tmp_path: Path) -> None:
    annotate(tmp_path, "a")
    list_split(tmp_path, "train", "a", "b")
    with pytest.raises(InputError, match=r"lists 'b' but there is no .*Annotations/b.xml: add it"):
        voc.read(tmp_path)


def test_folder_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a Pascal VOC folder"):
        voc.read(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_entities_are_refused(tmp_path: Path, encoding: str) -> None:
    annotate(tmp_path, "a")
    bomb = f'<?xml version="1.0" encoding="{encoding}"?><!DOCTYPE x [<!ENTITY y "z">]><annotation>&y;</annotation>'
    (tmp_path / "Annotations" / "a.xml").write_bytes(bomb.encode(encoding))
    with pytest.raises(InputError, match=r"a.xml is no Pascal VOC annotation \(it has a DOCTYPE"):
        voc.read(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("<annotation>", "no element found"),
        ("<annotation><object/></annotation>", "an object without a name"),
        ("<annotation><object><name>cat</name></object></annotation>", "a cat without all of xmin"),
        (f"<annotation>{box('cat', (1, 1, 'x', 9))}</annotation>", "could not convert"),  # type: ignore[arg-type]
    ],
)
def test_broken_annotation_is_named(tmp_path: Path, content: str, message: str) -> None:
    annotate(tmp_path, "a")
    (tmp_path / "Annotations" / "a.xml").write_text(content)
    with pytest.raises(InputError, match=rf"a.xml is no Pascal VOC annotation .*{message}"):
        voc.read(tmp_path)


def test_broken_image_is_named(tmp_path: Path) -> None:
    annotate(tmp_path, "a")
    (tmp_path / "JPEGImages" / "a.jpg").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"a.jpg is no JPEG or PNG image"):
        voc.read(tmp_path)


@needs_bccd
def test_bccd() -> None:
    source = voc.read(BCCD)
    records = [record for split in source.splits.values() for record in split]
    assert {split: len(records) for split, records in source.splits.items()} == {"train": 205, "val": 87, "test": 72}
    assert source.classes == ("Platelets", "RBC", "WBC")
    assert sum(len(record.boxes) for record in records) == 4886
    assert [finding.kind for finding in source.findings] == ["box without area"] * 2
    for record in records:
        written = ElementTree.parse(BCCD / "Annotations" / f"{record.path.stem}.xml").getroot()
        named = [node.findtext("name") for node in written.iter("object")]
        assert len(named) - len(record.labels) == sum(record.path.stem in f.where for f in source.findings)
        if len(named) == len(record.labels):
            assert [source.classes[label] for label in record.labels] == named
