"""What every choice of ``augment`` promises for any image and boxes."""

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onestage.config import build, compose, options
from onestage.data.transforms import MIN_SIDE_PX, Augment, Letterbox, OnCanvas, Sample, boxes_of, image_of
from onestage.types import Placement

SIZE = (96, 64)


@cache
def augment_of(name: str) -> Augment:
    node = compose("train", [f"augment={name}", f"detector.input_size={list(SIZE)}"])["augment"]
    return Augment(transforms=[build(one) for one in node.values() if one is not None])


def sample_of(height: int, width: int, *, seed: int, num_boxes: int) -> Sample:
    """Noise with boxes anywhere in it; the label of a box is its place, crowd and difficult its two lowest bits."""
    generator = np.random.default_rng(seed)
    corners = np.sort(generator.uniform(0, 1, (num_boxes, 2, 2)), axis=1).reshape(num_boxes, 4)
    boxes = torch.from_numpy(corners * [width, height, width, height]).float()
    labels = torch.arange(num_boxes)
    return {
        "key": "000001",
        "image_id": 1,
        "image": image_of(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)),
        "boxes": boxes_of(boxes, size=(height, width)),
        "labels": labels,
        "crowd": labels % 2 == 1,
        "difficult": labels // 2 % 2 == 1,
        "placement": Placement(),
    }


@pytest.mark.parametrize("name", options("augment"))
@settings(max_examples=15, deadline=None)
@given(
    height=st.integers(4, 300), width=st.integers(4, 300), num_boxes=st.integers(0, 12), seed=st.integers(0, 2**32 - 1)
)
def test_boxes_stay_inside_with_their_labels(name: str, height: int, width: int, num_boxes: int, seed: int) -> None:
    samples = [sample_of(height, width, seed=seed + index, num_boxes=num_boxes) for index in range(3)]
    out = augment_of(name)(samples[0], seed=seed, others=samples[1:])
    image, boxes = out["image"], out["boxes"].as_subclass(torch.Tensor)
    assert image.dtype == torch.uint8
    assert boxes.shape == (len(out["labels"]), 4)
    assert torch.equal(out["crowd"], out["labels"] % 2 == 1)
    assert torch.equal(out["difficult"], out["labels"] // 2 % 2 == 1)
    assert boxes.isfinite().all()
    assert (boxes >= -1e-3).all()
    assert (boxes[:, 2:] <= torch.tensor([image.shape[2], image.shape[1]]) + 1e-3).all()
    if any(isinstance(one, OnCanvas) for one in augment_of(name).transforms):
        assert tuple(image.shape) == (3, *SIZE)
        assert (boxes[:, 2:] - boxes[:, :2] >= MIN_SIDE_PX - 1e-3).all()
    else:
        assert len(boxes) == num_boxes


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
                torch.testing.assert_close(box, 2 * places[label], atol=1e-2, rtol=0)


def letterboxed(sample: Sample, *, size: tuple[int, int]) -> Sample:
    return sample if sample["image"].shape[1:] == size else Letterbox(size=size)(sample)
