"""From the bytes of a shard to a batch: decode, augment or letterbox, collate."""

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import cv2
import numpy as np
import torch

from onestage.data.input_sizes import InputSizes
from onestage.data.transforms import Augment, Letterbox, Sample, boxes_of, image_of
from onestage.errors import InputError
from onestage.types import XYXY, Batch, Placement, Target

IMAGE_MAGIC: Final = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")
"""First bytes of JPEG and PNG: OpenCV would open a dozen formats more, each a parser that nobody asked for."""


class RawShare(NamedTuple):
    """One rank's share of a step: its raw samples, the step's number in the epoch, and its images over all ranks."""

    raws: list[dict[str, Any]]
    step: int
    global_images: int


Prepare = Callable[..., Batch]
"""``prepare(raw_share, epoch=...)``."""


def decode(raw: dict[str, Any], *, num_classes: int) -> Sample:
    """A sample of a shard with its image decoded; ``InputError`` names key, shard and original file of a broken one."""
    where = f"sample {raw['__key__']} in {raw.get('__url__')}"
    try:
        truth = json.loads(raw["json"])
        where = f"{where} (from {truth['source']})"
        boxes = torch.tensor(truth["boxes"], dtype=torch.float32).reshape(-1, 4)
        labels = torch.tensor(truth["labels"], dtype=torch.int64)
        crowd = torch.tensor(truth["crowd"], dtype=torch.bool)
        difficult = torch.tensor(truth["difficult"], dtype=torch.bool)
        image_id = int(truth["image_id"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{where} has no annotation that can be read: make the dataset again") from error
    if not len(boxes) == len(labels) == len(crowd) == len(difficult):
        raise InputError(f"{where} has {len(boxes)} boxes but {len(labels)} labels: make the dataset again")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        wrong = next(label for label in truth["labels"] if not 0 <= label < num_classes)
        raise InputError(f"{where} has label {wrong} where labels run from 0 to {num_classes - 1}: mend its annotation")
    pixels = _decode_image(next((raw[member] for member in ("jpg", "jpeg", "png") if member in raw), b""))
    if pixels is None:
        raise InputError(f"{where} has an image that is corrupt or cut short: replace it and make the dataset again")
    return {
        "key": raw["__key__"],
        "image_id": image_id,
        "image": image_of(pixels),
        "boxes": boxes_of(boxes, size=pixels.shape[:2]),
        "labels": labels,
        "crowd": crowd,
        "difficult": difficult,
        "placement": Placement(),
    }


def _decode_image(content: bytes) -> Any:
    """Pixels (H, W, 3) RGB as stored: boxes were drawn before any EXIF rotation. None where it can't be decoded."""
    if not content.startswith(IMAGE_MAGIC):
        return None
    pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    return None if pixels is None else cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


def sample_seed(*, seed: int, epoch: int, key: str) -> int:
    """A seed of 64 bits that depends on nothing else, so on no rank, worker or batch."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def collate(samples: Sequence[Sample], *, size: Sequence[int], global_images: int) -> Batch:
    """Samples of one ``size`` [H, W] as a batch; of none, images (0, 3, H, W)."""
    images = torch.empty((len(samples), 3, size[0], size[1]), dtype=torch.uint8)
    for image, sample in zip(images, samples, strict=True):
        image.copy_(sample["image"])
    targets = [
        Target(
            boxes=XYXY(sample["boxes"].as_subclass(torch.Tensor)),
            labels=sample["labels"],
            image_id=sample["image_id"],
            placement=sample["placement"],
            crowd=sample["crowd"],
            difficult=sample["difficult"],
        )
        for sample in samples
    ]
    return Batch(images, targets, [sample["key"] for sample in samples], global_images=global_images)


class TrainingBatch:
    """Raw share to augmented batch, of the size that ``input_sizes`` gives its step.

    What the transforms leave at another size is letterboxed. Targets say no placement: an augmented image has no one
    way back to its original.
    """

    def __init__(self, *, augment: Augment, input_sizes: InputSizes, num_classes: int, seed: int) -> None:
        self.augment = augment
        self.input_sizes = input_sizes
        self.num_classes = num_classes
        self.seed = seed

    def __call__(self, share: RawShare, *, epoch: int) -> Batch:
        size = self.input_sizes(seed=self.seed, epoch=epoch, batch=share.step)
        augment, letterbox = self.augment.at(size), Letterbox(size=size)
        decoded = [decode(raw, num_classes=self.num_classes) for raw in share.raws]
        samples: list[Sample] = []
        for index, one in enumerate(decoded):
            seed = sample_seed(seed=self.seed, epoch=epoch, key=one["key"])
            sample = augment(one, seed=seed, epoch=epoch, others=decoded[:index] + decoded[index + 1 :])
            if tuple(sample["image"].shape[-2:]) != size:
                sample = letterbox(sample)
            samples.append({**sample, "placement": Placement()})
        return collate(samples, size=size, global_images=share.global_images)


class EvaluationBatch:
    """Raw share to letterboxed batch, its targets with the placement that leads back to the original."""

    def __init__(self, *, size: Sequence[int], num_classes: int) -> None:
        self.letterbox = Letterbox(size=size)
        self.num_classes = num_classes

    def __call__(self, share: RawShare, *, epoch: int) -> Batch:
        samples = [self.letterbox(decode(raw, num_classes=self.num_classes)) for raw in share.raws]
        return collate(samples, size=self.letterbox.size, global_images=share.global_images)
