import cv2
import numpy as np
import pytest
import torch

from onestage.drawing import COLOURS, draw, side_by_side

CLASSES = [f"class{number}" for number in range(9)]
GREY = 90


def grey(width: int = 640, height: int = 480) -> np.ndarray:
    return np.full((height, width, 3), GREY, np.uint8)


def drawn(*boxes: tuple[float, ...], labels: list[int], image: np.ndarray | None = None, **more: object) -> np.ndarray:
    values = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    return draw(grey() if image is None else image, values, torch.tensor(labels), classes=CLASSES, **more)


def changed(picture: np.ndarray) -> np.ndarray:
    """Where something was drawn, as (H, W)."""
    return (picture != GREY).any(axis=2)


@pytest.mark.parametrize("label", [0, 3, 8])
def test_an_edge_has_the_colour_of_its_class(label: int) -> None:
    picture = drawn((100, 200, 300, 400), labels=[label])
    colour = COLOURS[label % len(COLOURS)]
    for row, column in [(300, 100), (300, 300), (400, 200), (200, 290)]:  # left, right, bottom, top beside the label
        assert tuple(picture[row, column]) == colour
    assert not changed(picture)[210:390, 110:290].any()  # the object stays visible


def test_two_boxes_have_two_colours() -> None:
    picture = drawn((100, 200, 300, 400), (350, 200, 550, 400), labels=[1, 2])
    assert tuple(picture[300, 100]) == COLOURS[1]
    assert tuple(picture[300, 350]) == COLOURS[2]


def test_the_image_itself_is_unchanged() -> None:
    image = grey()
    drawn((100, 200, 300, 400), labels=[0], image=image)
    assert (image == GREY).all()


def test_without_boxes_the_picture_is_the_image() -> None:
    picture = drawn(labels=[])
    assert np.array_equal(picture, grey())


def test_the_score_is_written_beside_the_name() -> None:
    box = (100, 200, 300, 400)
    plain, scored = drawn(box, labels=[0]), drawn(box, labels=[0], scores=torch.tensor([0.5]))
    (width, _), _ = cv2.getTextSize("class0 0.50", cv2.FONT_HERSHEY_SIMPLEX, 0.4, 1)
    assert not changed(plain)[190, 100 + width - 5]
    assert changed(scored)[190, 100 + width - 5]


@pytest.mark.parametrize("box", [(600, 0, 640, 40), (0, 0, 30, 30), (630, 470, 640, 480), (-50, -60, 30, 40)])
def test_a_label_stays_inside_the_picture(box: tuple[float, ...]) -> None:
    text = "class0 0.50"
    (width, height), base = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.4, 1)
    picture = drawn(box, labels=[0], scores=torch.tensor([0.5]))
    left, top = int(min(max(box[0], 0), 640 - width)), int(max(box[1] - height - base, 0))
    label = picture[top : top + height + base, left : left + width]
    assert label.shape == (height + base, width, 3)
    assert not (label == GREY).all(axis=2).any()  # the whole label: its ground, and the text on it
    middle = drawn((300, 200, 340, 240), labels=[0], scores=torch.tensor([0.5]))
    same = middle[200 - height - base : 200, 300 : 300 + width]
    # Above the box's own edge it looks as it does in the middle of a picture.
    assert np.array_equal(label[: height - 2], same[: height - 2])


def test_small_images_are_enlarged_and_their_boxes_with_them() -> None:
    picture = drawn((20, 20, 80, 60), labels=[0], image=grey(100, 80))
    assert picture.shape == (240, 300, 3)
    assert tuple(picture[120, 60]) == COLOURS[0]
    assert tuple(picture[180, 150]) == COLOURS[0]


def test_large_images_are_made_no_wider_than_640() -> None:
    picture = drawn((256, 256, 1024, 640), labels=[0], image=grey(1280, 800))
    assert picture.shape == (400, 640, 3)
    assert tuple(picture[200, 128]) == COLOURS[0]


def test_side_by_side_has_a_white_line_between() -> None:
    picture = side_by_side(grey(30, 20), grey(50, 20))
    assert picture.shape == (20, 30 + 4 + 50, 3)
    assert (picture[:, 30:34] == 255).all()
    assert (picture[:, :30] == GREY).all() and (picture[:, 34:] == GREY).all()
