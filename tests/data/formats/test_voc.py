from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from onestage.data.clean import clean
from onestage.data.formats import findings as kinds
from onestage.data.formats import voc
from onestage.data.formats.record import Annotation, Labelled
from onestage.errors import InputError

BCCD = Path(__file__).parents[4] / "shared" / "data" / "bccd"
needs_bccd = pytest.mark.skipif(not BCCD.is_dir(), reason=f"no BCCD at {BCCD}")
SIDES = ("xmin", "ymin", "xmax", "ymax")


def box(name: str, corners: tuple[float, float, float, float], *, difficult: int = 0) -> str:
    sides = "".join(f"<{s}>{v}</{s}>" for s, v in zip(SIDES, corners, strict=True))
    return f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{sides}</bndbox></object>"


def annotate(
    folder: Path, stem: str, *objects: str, file_name: str = "", path: str = "", image: str | None = None
) -> None:
    """An annotation that declares 90x70, and its image of 100x80."""
    (folder / "Annotations").mkdir(parents=True, exist_ok=True)
    (folder / "JPEGImages").mkdir(exist_ok=True)
    texts = f"<filename>{file_name}</filename><path>{path}</path><size><width>90</width><height>70</height></size>"
    xml = f"<annotation>{texts}{''.join(objects)}</annotation>"
    (folder / "Annotations" / f"{stem}.xml").write_text(xml)
    Image.new("RGB", (100, 80)).save(folder / "JPEGImages" / (image or f"{stem}.jpg"))


def list_split(folder: Path, split: str, *lines: str) -> None:
    (folder / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
    (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{line}\n" for line in lines))


def stems(labelled: Labelled) -> dict[str, list[str]]:
    return {split: [image.path.stem for image in images] for split, images in labelled.splits.items()}


def found(labelled: Labelled) -> list[tuple[str, str]]:
    return [(finding.kind, finding.where) for finding in labelled.findings]


def test_corners_are_one_based_and_inclusive(tmp_path: Path) -> None:
    annotate(tmp_path, "a", box("dog", (1, 1, 100, 80)), box("cat", (11, 21, 30, 40), difficult=1))
    labelled = voc.read(tmp_path)
    (image,) = labelled.splits["train"]
    assert image.annotations == [
        Annotation("dog", (0, 0, 100, 80)),
        Annotation("cat", (10, 20, 30, 40), difficult=True),
    ]
    assert (image.source, image.where) == ("JPEGImages/a.jpg", "Annotations/a.xml")
    assert image.declared_size == (90, 70)
    assert not image.relative
    assert labelled.classes is None
    assert labelled.findings == []


@pytest.mark.parametrize("corners", [(5, 5, 5, 9), (5, 5, 4, 9), (5, 9, 8, 9), (5.5, 5, 5.5, 9)])
def test_a_slip_of_the_mouse_has_no_area(tmp_path: Path, corners: tuple[float, float, float, float]) -> None:
    annotate(tmp_path, "a", box("cat", corners))
    (drawn,) = voc.read(tmp_path).splits["train"][0].annotations
    left, top, right, bottom = drawn.box
    assert right <= left or bottom <= top


def test_what_the_cleaning_makes_of_it(tmp_path: Path) -> None:
    """Corners counted from 0 are within a pixel; what sticks out further is clipped, and told."""
    annotate(
        tmp_path,
        "a",
        box("cat", (5, 5, 5, 9)),
        box("cat", (0, 0, 50, 50)),
        box("cat", (90, 70, 103, 81)),
        box("cat", (101, 10, 120, 20)),
    )
    source = clean(voc.read(tmp_path))
    assert source.splits["train"][0].boxes == [(0, 0, 50, 50), (89, 69, 100, 80)]
    assert [finding.kind for finding in source.findings] == [
        kinds.SIZE_DIFFERS, kinds.NO_AREA, kinds.CLIPPED, kinds.OUTSIDE
    ]  # fmt: skip
    assert source.findings[1].where == "Annotations/a.xml"
    assert source.findings[1].what == "cat from 4, 4 to 4, 9 in an image of 100x80"


def test_own_stem_wins_over_file_name_and_path(tmp_path: Path) -> None:
    annotate(tmp_path, "a", file_name="b.jpg")
    annotate(tmp_path, "b", file_name="b.jpg", path="/home/me/a.jpg")
    annotate(tmp_path, "c", file_name="other.jpg", image="other.jpg")
    annotate(tmp_path, "d", image="d.PNG")
    annotate(tmp_path, "e", path=r"C:\Users\me\far.jpg", image="far.jpg")
    labelled = voc.read(tmp_path)
    assert [image.path.name for image in labelled.splits["train"]] == [
        "a.jpg",
        "b.jpg",
        "other.jpg",
        "d.PNG",
        "far.jpg",
    ]
    assert labelled.findings == []


def test_another_annotations_image_is_not_taken(tmp_path: Path) -> None:
    annotate(tmp_path, "a", file_name="b.jpg")
    annotate(tmp_path, "b", file_name="b.jpg")
    (tmp_path / "JPEGImages" / "a.jpg").unlink()
    labelled = voc.read(tmp_path)
    assert stems(labelled) == {"train": ["b"]}
    assert found(labelled) == [(kinds.MISSING_IMAGE, "Annotations/a.xml")]


def test_an_image_that_two_annotations_name_is_the_firsts(tmp_path: Path) -> None:
    annotate(tmp_path, "a", file_name="c.jpg", image="c.jpg")
    annotate(tmp_path, "b", file_name="c.jpg", image="c.jpg")
    labelled = voc.read(tmp_path)
    assert [image.where for image in labelled.splits["train"]] == ["Annotations/a.xml"]
    assert found(labelled) == [(kinds.MISSING_IMAGE, "Annotations/b.xml")]


def test_folders_in_small_letters_and_pictures_of_other_kinds(tmp_path: Path) -> None:
    """A picture that can't be taken is told as such, and not as missing."""
    annotate(tmp_path, "a")
    annotate(tmp_path, "b", image="b.bmp")
    (tmp_path / "Annotations").rename(tmp_path / "annotations")
    (tmp_path / "JPEGImages").rename(tmp_path / "images")
    labelled = voc.read(tmp_path)
    assert (stems(labelled), labelled.findings) == ({"train": ["a", "b"]}, [])
    assert [(one.kind, one.where) for one in clean(labelled).findings] == [
        (kinds.SIZE_DIFFERS, "annotations/a.xml"),
        (kinds.UNREADABLE_IMAGE, "images/b.bmp"),
    ]


def test_splits(tmp_path: Path) -> None:
    for stem in "abcd":
        annotate(tmp_path, stem)
    list_split(tmp_path, "trainval", "a", "b")
    list_split(tmp_path, "test", "c")
    labelled = voc.read(tmp_path)
    assert stems(labelled) == {"train": ["a", "b"], "test": ["c"]}
    assert found(labelled) == [(kinds.IN_NO_SPLIT, "Annotations/d.xml")]
    list_split(tmp_path, "train", "a", "", "a")
    list_split(tmp_path, "val", "b", "d", "a")
    labelled = voc.read(tmp_path)
    assert stems(labelled) == {"train": ["a"], "val": ["b", "d", "a"], "test": ["c"]}
    assert found(labelled) == [(kinds.LISTED_TWICE, "Annotations/a.xml")]
    assert [(one.kind, one.where, one.what) for one in clean(labelled).findings if one.kind == kinds.IN_TWO_SPLITS] == [
        (kinds.IN_TWO_SPLITS, "JPEGImages/a.jpg", "train and val")
    ]


def test_a_listed_name_may_have_spaces_or_a_mark(tmp_path: Path) -> None:
    annotate(tmp_path, "a b")
    annotate(tmp_path, "c")
    list_split(tmp_path, "train", "a b", "c -1")
    assert stems(voc.read(tmp_path)) == {"train": ["a b", "c"]}


def test_xml_beside_the_images(tmp_path: Path) -> None:
    """As Roboflow leaves it: an xml and a jpg side by side, a folder for each split."""
    for folder, stem in (("train", "a"), ("valid", "b"), ("test", "c")):
        annotate(tmp_path / "made", stem, box("cat", (1, 1, 9, 9)))
        (tmp_path / "set" / folder).mkdir(parents=True)
        for child, suffix in (("Annotations", "xml"), ("JPEGImages", "jpg")):
            (tmp_path / "made" / child / f"{stem}.{suffix}").rename(tmp_path / "set" / folder / f"{stem}.{suffix}")
    labelled = voc.read(tmp_path / "set")
    assert stems(labelled) == {"train": ["a"], "val": ["b"], "test": ["c"]}
    assert labelled.splits["val"][0].source == "valid/b.jpg"
    assert stems(voc.read(tmp_path / "set" / "valid")) == {"train": ["b"]}


def test_given_classes(tmp_path: Path) -> None:
    annotate(tmp_path, "a", box("cat", (1, 1, 9, 9)), box("dog", (1, 1, 9, 9)))
    source = clean(voc.read(tmp_path, classes=["dog", "owl", "cat"], name="pets"))
    assert (source.name, source.classes, source.splits["train"][0].labels) == ("pets", ("dog", "owl", "cat"), [2, 0])
    assert clean(voc.read(tmp_path)).classes == ("cat", "dog")


def test_what_is_missing_is_left_out(tmp_path: Path) -> None:
    for stem in "ab":
        annotate(tmp_path, stem)
    (tmp_path / "JPEGImages" / "a.jpg").unlink()
    Image.new("RGB", (9, 9)).save(tmp_path / "JPEGImages" / "unseen.jpg")
    list_split(tmp_path, "train", "a", "b", "nowhere")
    labelled = voc.read(tmp_path)
    assert stems(labelled) == {"train": ["b"]}
    assert found(labelled) == [
        (kinds.MISSING_IMAGE, "Annotations/a.xml"),
        (kinds.MISSING_ANNOTATION, "Annotations/nowhere.xml"),
        (kinds.MISSING_ANNOTATION, "JPEGImages/unseen.jpg"),
    ]


def test_folder_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a Pascal VOC folder"):
        voc.read(tmp_path)


BOMB = '<?xml version="1.0" encoding="{}"?><!DOCTYPE x [<!ENTITY y "z">]><annotation>&y;</annotation>'


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"<annotation>", "no element found"),
        (b"", "no element found"),
        (b"\x00\xff", "line 1"),
        (b"<annotation><object/></annotation>", "an object without a name"),
        (b"<annotation><object><name>cat</name></object></annotation>", "a cat without all of xmin"),
        (f"<annotation>{box('cat', (1, 1, 'x', 9))}</annotation>".encode(), "could not convert"),  # type: ignore[arg-type]
        (BOMB.format("utf-8").encode(), "it has a DOCTYPE"),
        (BOMB.format("utf-16").encode("utf-16"), "it has a DOCTYPE"),
        (b'<?xml version="1.0" encoding="nonsense"?><annotation/>', "nonsense"),
    ],
)  # fmt: skip
def test_a_broken_annotation_is_left_out(tmp_path: Path, content: bytes, said: str) -> None:
    annotate(tmp_path, "a")
    annotate(tmp_path, "b")
    (tmp_path / "Annotations" / "a.xml").write_bytes(content)
    labelled = voc.read(tmp_path)
    assert stems(labelled) == {"train": ["b"]}
    assert found(labelled) == [(kinds.UNREADABLE_ANNOTATION, "Annotations/a.xml")]
    assert said in labelled.findings[0].what


@needs_bccd
def test_bccd() -> None:
    source = clean(voc.read(BCCD))
    records = [record for split in source.splits.values() for record in split]
    assert {split: len(records) for split, records in source.splits.items()} == {"train": 205, "val": 87, "test": 72}
    assert source.classes == ("Platelets", "RBC", "WBC")
    assert sum(len(record.boxes) for record in records) == 4886
    assert [finding.kind for finding in source.findings] == [kinds.NO_AREA] * 2
    for record in records:
        written = ElementTree.parse(BCCD / "Annotations" / f"{record.path.stem}.xml").getroot()
        objects = [
            (node.findtext("name"), *(float(node.findtext(f"bndbox/{side}", "")) for side in SIDES))
            for node in written.iter("object")
        ]
        # Some corners are at 0: clipped by the pixel that this is off.
        expected = [
            (name, max(left - 1, 0), max(top - 1, 0), right, bottom)
            for name, left, top, right, bottom in objects
            if right > left and bottom > top
        ]
        named = [source.classes[label] for label in record.labels]
        assert [(name, *box) for name, box in zip(named, record.boxes, strict=True)] == expected
