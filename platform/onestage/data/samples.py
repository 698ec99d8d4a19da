"""From the bytes of a shard to a batch: decode, augment or only fit to the input, collate."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from onestage.data import images
from onestage.data.faults import Unreadable
from onestage.data.input_sizes import InputSizes
from onestage.data.shards import image_of as stored_image
from onestage.data.transforms import Augment, Sample, boxes_of, fit_of, image_of, pixels_of
from onestage.data.truth import named, truth_of
from onestage.types import WHOLE, XYXY, Batch, Part, Placement, Skipped, Target


class RawShare(NamedTuple):
    """One rank's share of a step: its raw samples, the step's number in the epoch, and its images over all ranks.

    ``skipped`` are those of the share that could not be read; ``part`` says which micro-batch of the step it is.
    """

    raws: list[dict[str, Any]]
    step: int
    global_images: int
    skipped: Sequence[Skipped] = ()
    part: Part = WHOLE


Prepare = Callable[..., Batch]
"""``prepare(raw_share, epoch=...)``."""


def decode(raw: dict[str, Any], *, num_classes: int) -> Sample:
    """A sample of a shard with its image decoded; ``Unreadable`` names key, shard and original file of a broken one."""
    truth = truth_of(raw, num_classes=num_classes)
    pixels = images.decode(stored_image(raw)[1], orientation=truth.orientation)
    if pixels is None:
        where = named(raw, truth.source)
        raise Unreadable(f"{where} has an image that is corrupt or cut short: replace it and make the dataset again")
    return {
        "key": raw["__key__"],
        "image_id": truth.image_id,
        "image": image_of(pixels),
        "boxes": boxes_of(torch.tensor(truth.boxes).reshape(-1, 4), size=pixels.shape[:2]),
        "labels": torch.tensor(truth.labels, dtype=torch.int64),
        "crowd": torch.tensor(truth.crowd, dtype=torch.bool),
        "difficult": torch.tensor(truth.difficult, dtype=torch.bool),
        "placement": Placement(),
    }


def decode_all(share: RawShare, *, num_classes: int, skipped: list[Skipped]) -> Iterator[Sample]:
    """The samples of a share that can be decoded, one by one; ``skipped`` grows by those that can't."""
    for raw in share.raws:
        try:
            yield decode(raw, num_classes=num_classes)
        except Unreadable as error:
            skipped.append(Skipped(raw["__key__"], str(error)))


def sample_seed(*, seed: int, epoch: int, key: str) -> int:
    """A seed of 64 bits that depends on nothing else, so on no rank, worker or batch."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def collate(
    samples: Iterable[Sample],
    *,
    size: Sequence[int],
    global_images: int,
    skipped: Sequence[Skipped] = (),
    room: int | None = None,
    part: Part = WHOLE,
) -> Batch:
    """Samples of one ``size`` [H, W] as a batch; of none, images (0, 3, H, W). Images lie in memory channels last.

    Samples may come from an iterator, ``room`` of them at most, which may still add to ``skipped`` meanwhile. Then no
    two of them need be in memory at once: a decoded image in fresh memory takes half as long again.
    """
    if room is None:
        samples = list(samples)
        room = len(samples)
    # As decoded images lie: each is copied in one piece, and the networks want them so.
    stacked = np.empty((room, size[0], size[1], 3), np.uint8)
    targets: list[Target] = []
    keys: list[str] = []
    colours: list[torch.Tensor] = []
    for pixels, sample in zip(stacked, samples, strict=False):
        pixels[:] = pixels_of(sample["image"])
        targets.append(
            Target(
                boxes=XYXY(sample["boxes"].as_subclass(torch.Tensor)),
                labels=sample["labels"],
                image_id=sample["image_id"],
                placement=sample["placement"],
                crowd=sample["crowd"],
                difficult=sample["difficult"],
            )
        )
        keys.append(sample["key"])
        if "colour" in sample:
            colours.append(sample["colour"])
    return Batch(
        torch.from_numpy(stacked[: len(keys)]).permute(0, 3, 1, 2),
        targets,
        keys,
        global_images=global_images,
        skipped=tuple(skipped),
        colour=torch.stack(colours) if colours else None,
        part=part,
    )


class TrainingBatch:
    """Raw share to augmented batch, of the size that ``input_sizes`` gives its step.

    What the transforms leave at another size is fitted as ``fit`` says: "letterbox" or "stretch". Targets say no
    placement: an augmented image has no one way back to its original.
    """

    def __init__(
        self, *, augment: Augment, input_sizes: InputSizes, num_classes: int, seed: int, fit: str = "letterbox"
    ) -> None:
        self.augment = augment
        self.input_sizes = input_sizes
        self.num_classes = num_classes
        self.seed = seed
        self.fit = fit_of(fit)

    def __call__(self, share: RawShare, *, epoch: int) -> Batch:
        size = self.input_sizes(seed=self.seed, epoch=epoch, batch=share.step)
        skipped = list(share.skipped)
        samples = self._samples(share, size=size, epoch=epoch, skipped=skipped)
        return collate(
            samples,
            size=size,
            global_images=share.global_images,
            skipped=skipped,
            room=len(share.raws),
            part=share.part,
        )

    def _samples(
        self, share: RawShare, *, size: tuple[int, ...], epoch: int, skipped: list[Skipped]
    ) -> Iterator[Sample]:
        augment, fit = self.augment.at(size), self.fit.transform(size=size)
        decoded: Iterable[Sample] = decode_all(share, num_classes=self.num_classes, skipped=skipped)
        others: list[Sample] = []
        if augment.mixes:
            decoded = others = list(decoded)
        for index, one in enumerate(decoded):
            seed = sample_seed(seed=self.seed, epoch=epoch, key=one["key"])
            sample = augment(one, seed=seed, epoch=epoch, others=others[:index] + others[index + 1 :])
            if tuple(sample["image"].shape[-2:]) != size:
                sample = fit(sample)
            yield {**sample, "placement": Placement()}


class EvaluationBatch:
    """Raw share to batch, fitted to ``size`` [H, W] as ``fit`` says: "letterbox" or "stretch".

    Targets have the placement that leads back to the original.
    """

    def __init__(self, *, size: Sequence[int], num_classes: int, fit: str = "letterbox") -> None:
        self.fit = fit_of(fit).transform(size=size)
        self.num_classes = num_classes

    def __call__(self, share: RawShare, *, epoch: int) -> Batch:
        skipped = list(share.skipped)
        decoded = decode_all(share, num_classes=self.num_classes, skipped=skipped)
        return collate(
            map(self.fit, decoded),
            size=self.fit.size,
            global_images=share.global_images,
            skipped=skipped,
            room=len(share.raws),
        )
