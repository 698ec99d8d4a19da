"""The kinds of findings, and what an import does about each."""

from typing import Final

UNREADABLE_IMAGE: Final = "image that can't be read"
CUT_SHORT: Final = "image cut short"
MISSING_IMAGE: Final = "image that is missing"
ELSEWHERE: Final = "image path that leads elsewhere"
UNREADABLE_ANNOTATION: Final = "annotation that can't be read"
MISSING_ANNOTATION: Final = "image without annotation"
NO_AREA: Final = "box without area"
OUTSIDE: Final = "box outside the image"
CLIPPED: Final = "box clipped to the image"
TWICE: Final = "box drawn twice"
UNKNOWN_CLASS: Final = "unknown class"
GROUPING_CLASS: Final = "class that only groups others"
POLYGONS: Final = "polygons"
SIZE_DIFFERS: Final = "size that differs"
ROTATED: Final = "EXIF-rotated image"
NOT_RGB: Final = "image that is not RGB"
LISTED_TWICE: Final = "image listed twice"
IN_TWO_SPLITS: Final = "image in two splits"
IN_NO_SPLIT: Final = "image in no split"
MISSING_SPLIT: Final = "split without images"

REMEDY: Final[dict[str, str]] = {
    UNREADABLE_IMAGE: "left out: save it as JPEG or PNG",
    CUT_SHORT: "left out: copy the image again from where it came",
    MISSING_IMAGE: "left out: add the image, or take its annotation away",
    ELSEWHERE: "left out: name images relative to the dataset's folder",
    UNREADABLE_ANNOTATION: "left out, as far as it can't be read: mend it",
    MISSING_ANNOTATION: "left out, as it may show objects that nobody marked: annotate it, if only as empty",
    NO_AREA: "left out: draw the box again if something is there",
    OUTSIDE: "left out: draw the box again if something is there",
    CLIPPED: "kept, as far as it lies on the image",
    TWICE: "kept once",
    UNKNOWN_CLASS: "its boxes are left out: add the class to those of the set, or to --classes",
    GROUPING_CLASS: "left out: it names the group of all other classes and has no boxes",
    POLYGONS: "kept, as the boxes around them",
    SIZE_DIFFERS: "kept, its boxes taken as pixels of the image as it is: look at a few of them",
    ROTATED: "kept; it and its boxes are turned upright when it is decoded",
    NOT_RGB: "kept, decoded to RGB",
    LISTED_TWICE: "taken once, with the boxes of both",
    IN_TWO_SPLITS: "kept in both, so that scores will flatter: take it out of one",
    IN_NO_SPLIT: "left out: list it in a split if it is to count",
    MISSING_SPLIT: "left out",
}
"""What is done about each kind of finding, and where it helps, what a person can do."""
