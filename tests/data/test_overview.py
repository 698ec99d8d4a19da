"""The page is read back as a browser would: what it shows, and that it fetches and runs nothing."""

import base64
import io
import re
from collections.abc import Sequence
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from onestage.data import overview
from onestage.data.contents import Contents, Entry, open_set
from onestage.data.formats.record import Finding
from onestage.errors import InputError

BCCD = Path(__file__).parents[3] / "shared" / "data" / "bccd"
HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>'
VOID = {"meta", "image", "rect", "line"}


class Page(HTMLParser):
    """Every tag with its attributes, and all text that is shown."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def jpeg(size: tuple[int, int], *, orientation: int = 1) -> bytes:
    """Red on its left half, as stored, blue on the right."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[:, : size[0] // 2, 0] = 255
    pixels[:, size[0] // 2 :, 2] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", exif=exif)
    return file.getvalue()


def entry(
    where: str = "a.jpg", *, labels: Sequence[int] = (), boxes: Sequence[tuple[float, ...]] | None = None
) -> Entry:
    drawn = [(10.0, 10.0, 60.0, 50.0)] * len(labels) if boxes is None else list(boxes)
    content = partial(jpeg, (100, 80))
    return Entry("train", where, 100, 80, drawn, list(labels), 1, content)  # type: ignore[arg-type]


def write(tmp_path: Path, contents: Contents, **more: object) -> Page:
    overview.write(contents, tmp_path / "page.html", **more)  # type: ignore[arg-type]
    return Page((tmp_path / "page.html").read_text(encoding="utf-8"))


def shapes(page: Page) -> list[dict[str, str | None]]:
    """The boxes on the pictures: charts fill their rectangles, these have an outline."""
    return [one for one in page.named("rect") if "stroke" in one]


def test_pictures_boxes_and_names(tmp_path: Path) -> None:
    boxes = [(1.0, 2.0, 31.0, 42.0), (40.0, 10.0, 100.0, 80.0)]
    train = [entry("a.jpg", labels=[0, 1], boxes=boxes), entry("b.jpg")]
    contents = Contents("pets", ("cat", "Hündin"), {"train": train, "val": [entry("c.jpg", labels=[1])]}, [], False)
    page = write(tmp_path, contents)
    assert len(page.named("image")) == 3
    sides = [[float(one[side] or "") for side in ("x", "y", "width", "height")] for one in shapes(page)]
    assert sides == [[40, 10, 60, 70], [1, 2, 30, 40], [10, 10, 50, 40]]  # the larger of a picture's below
    text = " ".join(page.texts)
    assert text.count("Hündin") >= 3
    assert re.search(r"a\.jpg · 100×80 · 2 boxes", text)
    assert "pets" in page.texts and "3 images, 3 boxes, 2 classes" in page.texts


def test_the_table_counts_by_split_and_class(tmp_path: Path) -> None:
    splits = {"train": [entry(labels=[0, 0, 1]), entry()], "val": [entry(labels=[1])]}
    contents = Contents("pets", ("cat", "dog"), splits, [], packed=False)
    text = (write(tmp_path, contents), (tmp_path / "page.html").read_text())[1]
    rows = re.findall(r"<tr[^>]*><td>([^<]*)((?:<td>[^<\n]*)+)", text)
    assert {name: values.split("<td>")[1:] for name, values in rows} == {
        "images": ["2", "1", "3"],
        "images without boxes": ["1", "0", "1"],
        "boxes": ["3", "1", "4"],
        "boxes per image": ["1.50", "1.00", "1.33"],
        "cat": ["2", "0", "2"],
        "dog": ["1", "1", "2"],
    }


def test_names_from_the_data_stay_text(tmp_path: Path) -> None:
    splits = {HOSTILE: [entry(f"{HOSTILE}.jpg", labels=[0])]}
    findings = [Finding(HOSTILE, HOSTILE, HOSTILE)]
    page = write(tmp_path, Contents(HOSTILE, (HOSTILE,), splits, findings, packed=False))
    assert page.named("script") == page.named("img") == []
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "".join(page.texts).count("alert(1)") >= 6


def test_a_file_whose_name_is_no_utf8(tmp_path: Path) -> None:
    write(tmp_path, Contents("pets", (), {"train": [entry(where="\udcff.jpg")]}, [], packed=False))
    assert "?.jpg" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_the_page_fetches_nothing(tmp_path: Path) -> None:
    page = write(tmp_path, Contents("pets", ("cat",), {"train": [entry(labels=[0])]}, [], packed=False))
    links = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("href", "src")]
    assert links and all(value is not None and value.startswith("data:image/jpeg;base64,") for value in links)
    assert not page.named("link") and "@import" not in "".join(page.texts) and "url(" not in "".join(page.texts)
    (policy,) = [one["content"] for one in page.named("meta") if one.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None and policy.startswith("default-src 'none'")


def pictures(page: Page) -> list[Image.Image]:
    contents = [base64.b64decode((one["href"] or "").partition(",")[2]) for one in page.named("image")]
    return [Image.open(io.BytesIO(content)) for content in contents]


def test_pictures_are_upright_and_small(tmp_path: Path) -> None:
    """Orientation 6: the stored left is the picture's top."""
    turned = Entry("train", "a.jpg", 800, 1000, [], [], 6, partial(jpeg, (1000, 800), orientation=6))
    page = write(tmp_path, Contents("pets", ("cat",), {"train": [turned]}, [], packed=False))
    (picture,) = pictures(page)
    assert picture.size == (384, 480)
    red, _, blue = picture.convert("RGB").resize((1, 2), Image.Resampling.BOX).getpixel((0, 0))  # type: ignore[misc]
    assert red > 200 and blue < 50
    (one,) = page.named("image")
    assert (one["width"], one["height"]) == ("800", "1000")


def test_an_image_that_cannot_be_decoded_has_its_place(tmp_path: Path) -> None:
    def gone() -> bytes:
        raise FileNotFoundError("gone.jpg")

    entries = [
        entry("good.jpg"),
        Entry("train", "bad.jpg", 10, 10, [], [], 1, lambda: jpeg((100, 80))[:300]),
        Entry("train", "gone.jpg", 10, 10, [], [], 1, gone),
    ]
    page = write(tmp_path, Contents("pets", ("cat",), {"train": entries}, [], packed=False))
    assert len(page.named("image")) == 1
    assert page.texts.count("can't be decoded") == 2
    assert "There are no boxes." in page.texts


@given(
    labels=st.lists(st.lists(st.integers(0, 5), max_size=4), min_size=1, max_size=30),
    num_images=st.integers(1, 12),
)
def test_the_choice_shows_every_class_where_there_is_room(labels: list[list[int]], num_images: int) -> None:
    entries = [entry(f"{number}.jpg", labels=one) for number, one in enumerate(labels)]
    chosen = overview.chosen(entries, num_images=num_images)
    assert len(chosen) == min(num_images, len(entries))
    numbers = [int(one.where.removesuffix(".jpg")) for one in chosen]
    assert numbers == sorted(set(numbers))
    shown = {label for one in chosen for label in one.labels}
    present = {label for one in labels for label in one}
    assert shown == present or len(shown) >= num_images
    assert [one.where for one in overview.chosen(entries, num_images=num_images)] == [one.where for one in chosen]


def test_the_choice_is_spread_and_finds_what_is_rare() -> None:
    entries = [entry(f"{number}.jpg", labels=[0]) for number in range(100)]
    entries[37] = entry("37.jpg", labels=[1])
    wheres = [int(one.where.removesuffix(".jpg")) for one in overview.chosen(entries, num_images=10)]
    assert 37 in wheres
    others = sorted(set(wheres) - {37})
    assert max(np.diff([*others, 100])) <= 16


@pytest.mark.parametrize("name", ["data.yaml", "inspect", "page.html.txt"])
def test_a_page_is_not_written_over_something_else(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match=r"is no name for a page: give a file that ends in \.html"):
        overview.write(Contents("pets", (), {"train": [entry()]}, [], False), tmp_path / name)
    assert (tmp_path / name).read_text() == "mine"


def test_a_page_about_real_images(tmp_path: Path) -> None:
    if not BCCD.is_dir():
        pytest.skip(f"no BCCD at {BCCD}")
    contents = open_set(BCCD)
    told: list[tuple[int, int]] = []
    page = write(tmp_path, contents, num_images=4, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (12, 12)
    assert [picture.size for picture in pictures(page)] == [(480, 360)] * 12
    chosen = [one for entries in contents.splits.values() for one in overview.chosen(entries, num_images=4)]
    assert len(shapes(page)) == sum(len(one.boxes) for one in chosen)
    assert "364 images, 4,886 boxes, 3 classes" in page.texts
    assert (tmp_path / "page.html").stat().st_size < 12 * 60_000
