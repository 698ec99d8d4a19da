"""What every transform, and every choice of ``augment``, promises for any image and boxes."""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torchvision import tv_tensors

from onestage.config import build, compose, options
from onestage.data.affine import RandomAffine
from onestage.data.colour import PhotometricDistort
from onestage.data.crops import RandomIoUWindow, RandomWindow
from onestage.data.mixup import MixUp
from onestage.data.mosaic import Mosaic
from onestage.data.transforms import (
    MIN_SIDE_PX,
    Augment,
    HorizontalFlip,
    HSVJitter,
    Letterbox,
    OnCanvas,
    RandomPlacement,
    Resize,
    Sample,
    Transform,
    boxes_of,
    image_of,
)
from onestage.types import Placement

SIZE = (96, 64)
TRANSFORMS: Mapping[str, Callable[[], Transform]] = {
    "letterbox": lambda: Letterbox(size=SIZE),
    "resize": lambda: Resize(size=SIZE),
    "placement": lambda: RandomPlacement(size=SIZE, scale=(0.3, 3), aspect=2, translate=0.6, min_visible=0),
    "window": lambda: RandomWindow(size=SIZE, jitter=0.45, min_visible=0),
    "iou window": lambda: RandomIoUWindow(size=SIZE),
    "affine": lambda: RandomAffine(size=SIZE, degrees=180, shear=30, scale=(0.2, 4), translate=0.5, min_visible=0),
    "mosaic": lambda: Mosaic(size=SIZE, probability=1, min_visible=0),
    "mixup": lambda: MixUp(size=SIZE, probability=1),
    "flip": lambda: HorizontalFlip(p=1),
    "hsv": lambda: HSVJitter(hue=0.5, saturation=3, value=3),
    "hsv on the device": lambda: HSVJitter(on_device=True),
    "photometric": lambda: PhotometricDistort(brightness=0.5, hue=0.5, p=1),
}
KEEPS_ALL_BOXES = {"letterbox", "resize", "mixup", "flip", "hsv", "hsv on the device", "photometric"}


def recipe_of(name: str, **changes: Any) -> Augment:
    overrides = [f"augment={name}", f"detector.input_size={list(SIZE)}"]
    node = compose("train", [*overrides, *(f"{key}={value}" for key, value in changes.items())])["augment"]
    return Augment(transforms=[build(one) for one in node.values() if one is not None])


@cache
def augment_of(name: str) -> Augment:
    return Augment(transforms=[TRANSFORMS[name]()]) if name in TRANSFORMS else recipe_of(name)


def sample_of(height: int, width: int, *, seed: int, num_boxes: int, kind: str = "anywhere") -> Sample:
    """Noise with boxes in it; the label of a box is its place, crowd and difficult its two lowest bits.

    ``kind`` says where: "anywhere", "at the edges" (each touches two), "tiny" (under a pixel, but with area) or "same"
    (all in one place, of the whole image).
    """
    generator = np.random.default_rng(seed)
    corners = np.sort(generator.uniform(0, 1, (num_boxes, 2, 2)), axis=1).reshape(num_boxes, 4)
    boxes = corners * [width, height, width, height]
    if kind == "at the edges":
        rows, sides = np.arange(num_boxes), generator.integers(0, 2, (2, num_boxes))
        boxes[rows, 2 * sides[0]] = sides[0] * width
        boxes[rows, 2 * sides[1] + 1] = sides[1] * height
    elif kind == "tiny":
        boxes[:, :2] *= 0.9
        boxes[:, 2:] = np.minimum(boxes[:, :2] + generator.uniform(0.01, 1, (num_boxes, 2)), [width, height])
    elif kind == "same":
        boxes[:] = [0, 0, width, height]
    labels = torch.arange(num_boxes)
    return {
        "key": "000001",
        "image_id": 1,
        "image": image_of(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)),
        "boxes": boxes_of(torch.from_numpy(boxes).float(), size=(height, width)),
        "labels": labels,
        "crowd": labels % 2 == 1,
        "difficult": labels // 2 % 2 == 1,
        "placement": Placement(),
    }


@pytest.mark.parametrize("name", [*TRANSFORMS, *options("augment")])
@settings(max_examples=25, deadline=None)
@given(
    height=st.one_of(st.integers(1, 8), st.integers(4, 300)),
    width=st.one_of(st.integers(1, 8), st.integers(4, 300)),
    num_boxes=st.sampled_from([0, 1, 2, 12, 150]),
    kind=st.sampled_from(["anywhere", "at the edges", "tiny", "same"]),
    seed=st.integers(0, 2**32 - 1),
    num_others=st.integers(0, 4),
)
@example(height=1, width=1, num_boxes=1, kind="same", seed=0, num_others=0)
@example(height=3, width=1200, num_boxes=12, kind="at the edges", seed=1, num_others=3)
def test_boxes_stay_inside_and_keep_area(
    name: str, height: int, width: int, num_boxes: int, kind: str, seed: int, num_others: int
) -> None:
    samples = [
        sample_of(height + 3 * index, width + 5 * index, seed=seed + index, num_boxes=num_boxes, kind=kind)
        for index in range(1 + num_others)
    ]
    untouched = [sample["image"].clone() for sample in samples]
    augment = augment_of(name)
    out = augment(samples[0], seed=seed, others=samples[1:])
    assert all(torch.equal(sample["image"], one) for sample, one in zip(samples, untouched, strict=True))
    image, boxes = out["image"], out["boxes"]
    assert isinstance(image, tv_tensors.Image) and image.dtype == torch.uint8
    assert isinstance(boxes, tv_tensors.BoundingBoxes) and boxes.dtype == torch.float32
    assert boxes.canvas_size == tuple(image.shape[-2:])
    on_canvas = any(isinstance(one, OnCanvas) for one in augment.transforms)
    mixing = any(isinstance(one, Mosaic | MixUp) for one in augment.transforms)
    # Mixing alone leaves out what it does not mix: such a batch is fitted to the canvas afterwards.
    fitted = on_canvas and (not mixing or len(augment.transforms) > 1 or bool(num_others) or name == "mosaic")
    assert tuple(image.shape) == (3, *(SIZE if fitted else (height, width)))

    assert boxes.shape == (len(out["labels"]), 4)
    assert torch.equal(out["crowd"], out["labels"] % 2 == 1)
    assert torch.equal(out["difficult"], out["labels"] // 2 % 2 == 1)
    plain = boxes.as_subclass(torch.Tensor)
    assert plain.isfinite().all()
    assert (plain >= -1e-3).all()
    assert (plain[:, 2:] <= torch.tensor([image.shape[2], image.shape[1]]) + 1e-3).all()
    sides = plain[:, 2:] - plain[:, :2]
    if name in KEEPS_ALL_BOXES or name in ("none", "retinanet"):
        both = 1 + (name == "mixup" and num_others > 0)
        assert len(plain) == both * num_boxes
        assert (sides > 0).all()
    else:
        assert (sides >= MIN_SIDE_PX - 1e-3).all()


@pytest.mark.parametrize("name", options("augment"))
def test_another_canvas_has_the_same_picture(name: str) -> None:
    """Twice the canvas with the same seed: each box at twice its place, so that a drawn size is only a size."""
    samples = [sample_of(120, 160, seed=index, num_boxes=6) for index in range(4)]
    augment = augment_of(name)
    sizes = [(96, 96), (192, 192)]
    for seed in range(8):
        small, large = (
            letterboxed(augment.at(size)(samples[0], seed=seed, others=samples[1:]), size=size) for size in sizes
        )
        assert small["image"].shape[1:] == (96, 96)
        assert large["image"].shape[1:] == (192, 192)
        if len(set(small["labels"].tolist())) < len(small["labels"]):
            continue  # a mosaic, whose tiles are whole pixels
        places = dict(zip(small["labels"].tolist(), small["boxes"].as_subclass(torch.Tensor), strict=True))
        for label, box in zip(large["labels"].tolist(), large["boxes"].as_subclass(torch.Tensor), strict=True):
            if label in places:
                # Each is laid on whole pixels of its own, and enlarged by up to four.
                torch.testing.assert_close(box, 2 * places[label], atol=4, rtol=0)


def letterboxed(sample: Sample, *, size: tuple[int, int]) -> Sample:
    return sample if sample["image"].shape[1:] == size else Letterbox(size=size)(sample)


@pytest.mark.parametrize("name", options("augment"))
def test_a_recipe_depends_on_its_seed_alone(name: str) -> None:
    samples = [sample_of(60, 80, seed=index, num_boxes=6) for index in range(4)]
    augment, again = augment_of(name), recipe_of(name)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    for seed in (0, 2**64 - 1):
        one, other = (each(samples[0], seed=seed, others=samples[1:]) for each in (augment, again))
        assert torch.equal(one["image"], other["image"])
        assert torch.equal(one["boxes"], other["boxes"])
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(3)
        before = torch.get_rng_state()


@pytest.mark.parametrize(("name", "key"), [("yolov4", "mosaic"), ("full", "mosaic"), ("full", "mixup")])
def test_mixing_is_off_for_the_last_epochs_by_config(name: str, key: str) -> None:
    """Of 30 epochs the last 10: epoch 19 still mixes, onto the canvas, and 20 leaves the image as it is."""
    overrides = {"trainer.max_epochs": 30, f"augment.{key}.plain_epochs": 10, f"augment.{key}.probability": 1}
    mix = next(one for one in recipe_of(name, **overrides).transforms if type(one).__name__.lower() == key)
    samples = [sample_of(60, 80, seed=index, num_boxes=1) for index in range(4)]
    mixed = [
        Augment(transforms=[mix])(samples[0], seed=5, epoch=epoch, others=samples[1:])["image"].shape
        for epoch in (0, 19, 20, 29)
    ]
    assert mixed == [(3, *SIZE), (3, *SIZE), (3, 60, 80), (3, 60, 80)]
