"""Image files: what their header says, and their pixels.

An upright picture is what a person sees: the stored pixels turned as EXIF's orientation (1 to 8) asks.
"""

import math
import struct
from pathlib import Path
from typing import Final, NamedTuple

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from onestage.errors import InputError

Pixels = NDArray[np.uint8]
"""An image (H, W, 3), RGB."""

MAGIC: Final = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")
"""First bytes of JPEG and PNG: OpenCV would open a dozen formats more, each a parser that nobody asked for."""
SUFFIXES: Final = (".jpg", ".jpeg", ".png")
MAX_PIXELS: Final = 178_956_970
"""A few kilobytes can claim any size: beyond Pillow's own limit it is no photograph, and would take a GiB and more."""
_ORIENTATION_TAG: Final = 0x0112


class Header(NamedTuple):
    """``width`` and ``height`` as stored, in pixels; ``orientation`` is EXIF's, ``mode`` Pillow's, such as "RGB"."""

    width: int
    height: int
    orientation: int
    mode: str

    @property
    def upright(self) -> tuple[int, int]:
        """Width and height of the upright picture."""
        return (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)


def header(path: Path) -> Header:
    """Read from the first bytes alone; ``InputError`` where it is no JPEG or PNG."""
    try:
        with Image.open(path, formats=("JPEG", "PNG")) as image:
            # Of a PNG, Pillow's own override would decode the whole picture first.
            orientation = Image.Image.getexif(image).get(_ORIENTATION_TAG, 1)
            return Header(*image.size, orientation if orientation in range(1, 9) else 1, image.mode)
    except Image.DecompressionBombError as error:
        raise InputError(f"{path} claims more than {MAX_PIXELS} pixels: make it smaller or remove it") from error
    except (OSError, SyntaxError, ValueError, struct.error) as error:  # the last: odd EXIF
        raise InputError(f"{path} is no JPEG or PNG image that can be read: mend or remove it") from error


def decode(content: bytes, *, orientation: int = 1) -> Pixels | None:
    """The upright picture; None where the bytes are no JPEG or PNG, corrupt, cut short, or claim too many pixels."""
    if not content.startswith(MAGIC):
        return None
    pixels = _jpeg(content) if content.startswith(MAGIC[0]) else _any(content)
    return None if pixels is None else upright(pixels, orientation)


def upright(pixels: Pixels, orientation: int) -> Pixels:
    """Stored pixels turned and mirrored as EXIF's ``orientation`` asks."""
    if orientation >= 5:
        pixels = cv2.transpose(pixels)  # type: ignore[assignment]
    across, down = orientation in (2, 3, 6, 7), orientation in (3, 4, 7, 8)
    if across or down:
        pixels = cv2.flip(pixels, -1 if across and down else int(across))  # type: ignore[assignment]
    return pixels


def _jpeg(content: bytes) -> Pixels | None:
    """By libjpeg-turbo itself: OpenCV, which has it inside, is slower and lets damaged pixels through."""
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(content)
        # Where libjpeg would warn and guess, strict raises; so even stray bytes between its parts make a file corrupt.
        return simplejpeg.decode_jpeg(content, strict=True) if height * width <= MAX_PIXELS else None
    except ValueError as error:
        # TurboJPEG's interface knows the usual ways to subsample colours, OpenCV all.
        return _any(content) if "subsampling" in str(error) else None


def _any(content: bytes) -> Pixels | None:
    if content.startswith(MAGIC[1]) and math.prod(int.from_bytes(content[at : at + 4]) for at in (16, 20)) > MAX_PIXELS:
        return None
    try:
        how = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        return cv2.imdecode(np.frombuffer(content, np.uint8), how)  # type: ignore[return-value]
    except cv2.error:  # more pixels than even OpenCV allows
        return None
