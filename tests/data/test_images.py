import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from onestage.data import images
from onestage.data.images import Pixels
from onestage.errors import InputError


def picture(height: int = 24, width: int = 40) -> Pixels:
    """Each corner has its own colour, each row and column its own shade."""
    rows, columns = np.indices((height, width))
    return np.stack([rows * 255 // height, columns * 255 // width, 255 - rows * 120 // height], -1).astype(np.uint8)


def encoded(pixels: Pixels, kind: str = "PNG", *, mode: str = "RGB", orientation: int = 1, **options: Any) -> bytes:
    image = Image.fromarray(pixels).convert(mode)
    exif = image.getexif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, kind, exif=exif, **options)
    return buffer.getvalue()


def by_pillow(content: bytes) -> Pixels:
    """The upright picture, as another library sees it."""
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    return np.asarray(upright.convert("RGB"))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_picture_is_upright_as_pillow_says(orientation: int, kind: str, tmp_path: Path) -> None:
    content = encoded(picture(), kind, orientation=orientation, **({"quality": 95} if kind == "JPEG" else {}))
    (tmp_path / "image").write_bytes(content)
    header = images.header(tmp_path / "image")
    assert header == (40, 24, orientation, "RGB")
    found, expected = images.decode(content, orientation=header.orientation), by_pillow(content)
    assert found is not None
    assert found.flags.c_contiguous
    assert header.upright == (expected.shape[1], expected.shape[0])
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).max() <= (0 if kind == "PNG" else 2)


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("PNG", "RGBA", {}), ("PNG", "L", {}), ("PNG", "P", {}), ("PNG", "1", {}), ("PNG", "LA", {}),
        ("JPEG", "L", {}), ("JPEG", "RGB", {"progressive": True}), ("JPEG", "RGB", {"subsampling": "4:4:4"}),
        ("JPEG", "RGB", {"subsampling": "4:2:0"}),
    ],
)  # fmt: skip
def test_every_usual_kind_is_rgb(kind: str, mode: str, options: dict[str, Any]) -> None:
    content = encoded(picture(), kind, mode=mode, **options)
    found, expected = images.decode(content), by_pillow(content)
    assert found is not None
    assert (found.dtype, found.shape) == (np.uint8, (24, 40, 3))
    # JPEG leaves rounding, and how colour is enlarged, to the decoder.
    assert np.abs(found.astype(int) - expected).max() <= (0 if kind == "PNG" else 3)


def test_cmyk_jpeg_has_about_pillows_colours() -> None:
    content = encoded(np.full((16, 16, 3), (200, 100, 50), np.uint8), "JPEG", mode="CMYK", quality=95)
    found = images.decode(content)
    assert found is not None
    assert np.abs(found.astype(int) - by_pillow(content)).max() <= 3


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_cut_short_anywhere_is_no_picture(kind: str) -> None:
    content = encoded(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8), kind)
    assert images.decode(content) is not None
    for share in (0.01, 0.1, 0.5, 0.9, 0.99):
        assert images.decode(content[: int(share * len(content))]) is None


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_damaged_in_the_middle_is_no_picture(kind: str) -> None:
    """OpenCV alone would hand out the JPEG's other half as grey or shifted."""
    content = bytearray(encoded(np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8), kind))
    middle = len(content) // 2
    content[middle : middle + 40] = bytes(40)
    assert images.decode(bytes(content)) is None


@pytest.mark.parametrize("content", [b"", b"text", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", encoded(picture(), "BMP")])
def test_anything_else_is_no_picture(content: bytes, tmp_path: Path) -> None:
    assert images.decode(content) is None
    (tmp_path / "image.jpg").write_bytes(content)
    with pytest.raises(InputError, match=r"image.jpg is no JPEG or PNG image that can be read: mend or remove it"):
        images.header(tmp_path / "image.jpg")


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    """A hundred bytes that claim 900 and 3,600 megapixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    for side in (30_000, 60_000):
        png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
        png += chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
        assert images.decode(png) is None
        (tmp_path / "bomb.png").write_bytes(png)
        with pytest.raises(InputError, match=r"bomb.png claims more than 178956970 pixels: make it smaller or remove"):
            images.header(tmp_path / "bomb.png")
    jpeg = bytearray(encoded(picture(), "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 60_000, 60_000)
    assert images.decode(bytes(jpeg)) is None
