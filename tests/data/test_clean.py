"""What an import mends and leaves out, and that boxes follow their picture through EXIF's eight orientations."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from onestage.data.clean import clean, turned
from onestage.data.formats import findings as kinds
from onestage.data.formats.findings import REMEDY
from onestage.data.formats.record import Annotated, Annotation, Box, Finding, Labelled, Record, Source
from onestage.data.images import Header
from onestage.errors import InputError

ORIENTATION = 0x0112


def save(path: Path, *, size: tuple[int, int] = (100, 80), mode: str = "RGB", orientation: int = 1) -> Path:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.new(mode, size).save(path, exif=exif)
    return path


def annotated(
    path: Path, *boxes: Box, declared: tuple[int, int] | None = None, relative: bool = False, name: str = "cat"
) -> Annotated:
    annotations = [Annotation(name, box) for box in boxes]
    return Annotated(path, path.name, f"{path.stem}.xml", annotations, relative=relative, declared_size=declared)


def cleaned(*images: Annotated, classes: tuple[str, ...] | None = ("cat",)) -> Source:
    return clean(Labelled("set", classes, {"train": list(images)}))


def one(source: Source) -> Record:
    (record,) = source.splits["train"]
    return record


def found(source: Source) -> list[str]:
    return [finding.kind for finding in source.findings]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_boxes_drawn_before_the_turn_follow_the_picture(tmp_path: Path, orientation: int, suffix: str) -> None:
    """A white rectangle on the stored picture; Pillow turns it upright, and there the box must lie."""
    stored = np.zeros((48, 64, 3), np.uint8)
    stored[8:16, 24:56] = 255
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / f"a{suffix}"
    Image.fromarray(stored).save(path, exif=exif, quality=95)
    with Image.open(path) as image:
        upright = np.asarray(ImageOps.exif_transpose(image).convert("L"))
    rows, columns = np.nonzero(upright > 127)
    seen = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)

    assert turned((24, 8, 56, 16), Header(64, 48, orientation, "RGB")) == seen

    source = cleaned(annotated(path, (24, 8, 56, 16), declared=(64, 48)))
    record = one(source)
    assert record.orientation == orientation
    assert (record.height, record.width) == upright.shape
    if orientation in (2, 3, 4):  # the sizes are the same: nothing tells that boxes were drawn before the turn
        assert record.boxes == [(24, 8, 56, 16)]
    else:
        assert record.boxes == [seen]
    assert found(source) == [kinds.ROTATED] * (orientation != 1)


def test_boxes_drawn_on_the_upright_picture_stay(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", orientation=6)
    for image in (
        annotated(path, (0, 90, 80, 100), declared=(80, 100)),
        annotated(path, (0, 90, 80, 100)),
        annotated(path, (0, 0.9, 1, 1), relative=True),
    ):
        source = cleaned(image)
        assert (one(source).width, one(source).height) == (80, 100)
        assert one(source).boxes == [(0, 90, 80, 100)]
        assert found(source) == [kinds.ROTATED]
        assert "taken as drawn on the upright picture" in source.findings[0].what


def test_boxes_on_the_image_stay_as_they_are(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png")
    drawn: list[Box] = [(0, 0, 100, 80), (0.25, 3, 7.5, 9), (99, 79, 100, 80)]
    source = cleaned(annotated(path, *drawn, declared=(100, 80)))
    assert source.splits["train"] == [
        Record(path, 100, 80, drawn, [0, 0, 0], [False] * 3, [False] * 3, "a.png", orientation=1)
    ]
    assert source.findings == []


@pytest.mark.parametrize(
    ("box", "kept", "kind"),
    [
        ((-1, -1, 101, 81), (0, 0, 100, 80), None),  # a pixel off: counted from another corner
        ((-1.5, 2, 9, 9), (0, 2, 9, 9), kinds.CLIPPED),
        ((5, 2, 9, 81.5), (5, 2, 9, 80), kinds.CLIPPED),
        ((5, 5, 5, 9), None, kinds.NO_AREA),
        ((9, 5, 5, 9), None, kinds.NO_AREA),
        ((5, 9, 8, 5), None, kinds.NO_AREA),
        ((100, 5, 110, 9), None, kinds.OUTSIDE),
        ((5, -9, 8, 0), None, kinds.OUTSIDE),
    ],
)
def test_boxes_in_pixels(tmp_path: Path, box: Box, kept: Box | None, kind: str | None) -> None:
    source = cleaned(annotated(save(tmp_path / "a.jpg"), box))
    assert one(source).boxes == [kept] * (kept is not None)
    assert found(source) == [kind] * (kind is not None)


@pytest.mark.parametrize(
    ("box", "kept", "kind"),
    [
        ((0.25, 0.5, 0.75, 1), (25, 40, 75, 80), None),
        ((-0.0009, 0.5, 0.75, 1.0009), (0, 40, 75, 80), None),
        ((-0.002, 0.5, 0.75, 1), (0, 40, 75, 80), kinds.CLIPPED),
        ((0.5, 0.5, 0.75, 0.5), None, kinds.NO_AREA),
        ((320, 200, 400, 300), None, kinds.OUTSIDE),  # pixels, where shares were meant
    ],
)
def test_relative_boxes(tmp_path: Path, box: Box, kept: Box | None, kind: str | None) -> None:
    source = cleaned(annotated(save(tmp_path / "a.jpg"), box, relative=True))
    assert one(source).boxes == [kept] * (kept is not None)
    assert found(source) == [kind] * (kind is not None)


def test_a_box_drawn_twice_is_kept_once(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg")
    annotations = [
        Annotation("cat", (9.9, 10, 20, 20), difficult=True),
        Annotation("cat", (10.3, 10.4, 20, 19.6)),
        Annotation("cat", (9.9, 10, 20, 20.6)),
        Annotation("dog", (9.9, 10, 20, 20)),
        Annotation("cat", (9.9, 10, 20, 20), crowd=True),
    ]
    source = clean(Labelled("set", None, {"train": [Annotated(path, "a.jpg", "a.xml", annotations)]}))
    assert one(source).boxes == [annotations[index].box for index in (0, 2, 3, 4)]
    assert one(source).labels == [0, 0, 1, 0]
    assert one(source).difficult == [True, False, False, False]
    assert one(source).crowd == [False, False, False, True]
    assert found(source) == [kinds.TWICE]


def test_classes(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg")
    images = [annotated(path, (1, 1, 9, 9), (20, 1, 29, 9), name=name) for name in ("zebra", "ant")]
    source = cleaned(*images, classes=None)
    assert source.classes == ("ant", "zebra")
    assert [record.labels for record in source.splits["train"]] == [[1, 1], [0, 0]]
    source = cleaned(*images, *images, classes=("owl", "ant"))
    assert source.classes == ("owl", "ant")
    assert [record.labels for record in source.splits["train"]] == [[], [1, 1]] * 2
    assert [(one.kind, one.what) for one in source.findings] == [(kinds.UNKNOWN_CLASS, "zebra: 4 boxes in the set")]


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("L", ".jpg"), ("CMYK", ".jpg"), ("P", ".png"), ("RGBA", ".png"), ("I;16", ".png"), ("1", ".png")],
)
def test_an_image_that_is_not_rgb_is_kept(tmp_path: Path, mode: str, suffix: str) -> None:
    source = cleaned(annotated(save(tmp_path / f"a{suffix}", mode=mode), (1, 1, 9, 9)))
    assert len(one(source).boxes) == 1
    assert [(finding.kind, finding.what) for finding in source.findings] == [(kinds.NOT_RGB, f"mode {mode}")]


def test_the_header_wins_over_the_declared_size(tmp_path: Path) -> None:
    source = cleaned(annotated(save(tmp_path / "a.jpg"), (1, 1, 9, 9), declared=(50, 40)))
    assert (one(source).width, one(source).height, one(source).boxes) == (100, 80, [(1, 1, 9, 9)])
    assert [(finding.kind, finding.where, finding.what) for finding in source.findings] == [
        (kinds.SIZE_DIFFERS, "a.xml", "50x40 declared, 100x80 found")
    ]


def noise(format: str) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(5).integers(0, 255, (120, 100, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_an_image_cut_short_is_left_out(tmp_path: Path, format: str) -> None:
    whole = noise(format)
    paths = [tmp_path / f"{name}.jpg" for name in ("whole", "half", "almost", "followed")]
    trailer = b"a phone's own notes" * 1000
    for path, content in zip(paths, (whole, whole[: len(whole) // 2], whole[:-20], whole + trailer), strict=True):
        path.write_bytes(content)
    source = cleaned(*(annotated(path, (1, 1, 9, 9)) for path in paths))
    assert [record.source for record in source.splits["train"]] == ["whole.jpg", "followed.jpg"]
    assert [(finding.kind, finding.where) for finding in source.findings] == [
        (kinds.CUT_SHORT, "half.jpg"), (kinds.CUT_SHORT, "almost.jpg")
    ]  # fmt: skip


def test_what_is_no_image_is_left_out(tmp_path: Path) -> None:
    save(tmp_path / "good.jpg")
    Image.new("RGB", (9, 9)).save(tmp_path / "gif.jpg", "GIF")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "folder.jpg").mkdir()
    huge = bytearray(noise("PNG"))
    huge[16:24] = struct.pack(">II", 60_000, 60_000)
    huge[29:33] = struct.pack(">I", zlib.crc32(huge[12:29]))
    (tmp_path / "huge.png").write_bytes(huge)
    names = ["gif.jpg", "empty.jpg", "text.png", "folder.jpg", "huge.png", "gone.jpg"]
    source = cleaned(*(annotated(tmp_path / name, (1, 1, 9, 9)) for name in [*names, "good.jpg"]))
    assert one(source).source == "good.jpg"
    assert [(finding.kind, finding.where) for finding in source.findings] == [
        (kinds.UNREADABLE_IMAGE, name) for name in names
    ]


def test_a_split_without_images_goes_and_a_set_without_is_refused(tmp_path: Path) -> None:
    good, bad = annotated(save(tmp_path / "a.jpg")), annotated(tmp_path / "gone.jpg")
    source = clean(Labelled("set", ("cat",), {"train": [good], "val": [bad]}))
    assert list(source.splits) == ["train"]
    assert found(source) == [kinds.UNREADABLE_IMAGE, kinds.MISSING_SPLIT]
    with pytest.raises(
        InputError, match=r"set has no image that can be used \(1 x image that can't be read, such as gone"
    ):
        clean(Labelled("set", ("cat",), {"train": [bad]}))


def test_an_image_in_two_splits(tmp_path: Path) -> None:
    Image.new("RGB", (100, 80)).save(tmp_path / "a.jpg")
    one = Annotated(tmp_path / "a.jpg", "images/a.jpg", "a.xml", [])
    source = clean(Labelled("set", ("cat",), {"train": [one], "val": [one]}))
    assert source.findings == [Finding(kinds.IN_TWO_SPLITS, "images/a.jpg", "train and val")]
    assert {split: len(records) for split, records in source.splits.items()} == {"train": 1, "val": 1}


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    """A pipe that nobody writes to would be waited for."""
    Image.new("RGB", (100, 80)).save(tmp_path / "a.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    members = [Annotated(tmp_path / name, name, name, []) for name in ("a.jpg", "pipe.jpg", "folder.jpg")]
    source = clean(Labelled("set", ("cat",), {"train": members}))
    assert [(one.kind, one.where) for one in source.findings] == [
        (kinds.UNREADABLE_IMAGE, "pipe.jpg"),
        (kinds.UNREADABLE_IMAGE, "folder.jpg"),
    ]


def test_order_and_progress(tmp_path: Path) -> None:
    """More images than the threads take at a time, in order all the same."""
    images = [annotated(save(tmp_path / f"{number:03d}.png", size=(number + 1, 5))) for number in range(200)]
    told: list[tuple[int, int]] = []
    source = clean(
        Labelled("set", ("cat",), {"train": images[:150], "val": images[150:]}),
        progress=lambda done, total: told.append((done, total)),
    )
    assert [record.width for records in source.splits.values() for record in records] == list(range(1, 201))
    assert told == [(done, 200) for done in range(1, 201)]


def test_every_kind_has_its_remedy() -> None:
    named = {value for name, value in vars(kinds).items() if name.isupper() and isinstance(value, str)}
    assert named == set(REMEDY)


def test_a_bomb_with_bytes_behind_its_end_is_left_out_as_any_that_cannot_be_read(tmp_path: Path) -> None:
    """A header that claims 65,500 x 65,500 pixels, and so much behind the end that the whole file is looked at."""
    file = io.BytesIO()
    Image.new("RGB", (40, 30)).save(file, "JPEG")
    content = bytearray(file.getvalue())
    start = content.index(b"\xff\xc0") + 5
    content[start : start + 4] = (65_500).to_bytes(2) * 2
    bomb, sound = tmp_path / "bomb.jpg", tmp_path / "sound.jpg"
    bomb.write_bytes(bytes(content) + bytes(5000))
    sound.write_bytes(file.getvalue())
    images = [Annotated(path=path, source=path.name, where=path.name, annotations=[]) for path in (bomb, sound)]
    source = clean(Labelled("set", ("thing",), {"train": images}))
    assert [record.path for record in source.splits["train"]] == [sound]
    assert [(one.kind, one.where) for one in source.findings] == [(kinds.UNREADABLE_IMAGE, "bomb.jpg")]
