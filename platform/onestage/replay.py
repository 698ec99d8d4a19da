"""A step that diverged, taken again: which image, in which part of the loss."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from onestage.config import build
from onestage.training.divergence import BadBatch
from onestage.training.module import to_float
from onestage.types import Target

AUTOCAST: Final = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class Loss(NamedTuple):
    """The parts of a loss, and the L2 norm of its gradient."""

    parts: dict[str, float]
    grad_norm: float

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, (*self.parts.values(), self.grad_norm)))


def replay(path: str | Path) -> dict[str, Any]:
    """The loss of a saved batch as a whole and of each of its images alone, with the weights of that step.

    ``weights`` names the saved parameters that are not finite: then no image is to blame. Raises InputError for a file
    that no diverged training saved.
    """
    bad = BadBatch.load(path)
    detector: nn.Module = build(bad.card["detector"])
    detector.load_state_dict(bad.weights)
    detector.to(memory_format=torch.channels_last).train()
    images, targets = to_float(bad.batch.images), bad.batch.targets

    def loss_of(chosen: list[int]) -> Loss:
        torch.manual_seed(bad.seed)
        return _loss(detector, images[chosen], [targets[one] for one in chosen], precision=bad.precision)

    # Twice over, as batch norm refuses to train on a single value; means over two equal images are those of one.
    alone = [loss_of([number, number]) for number in range(len(targets))]
    return {
        "step": bad.step,
        "rank": bad.rank,
        "detector": type(detector).__name__,
        "precision": bad.precision,
        "weights": [name for name, value in detector.named_parameters() if not value.isfinite().all()],
        "batch": _described(loss_of([*range(len(targets))])),
        "images": [
            {"key": key, "image_id": target.image_id, "boxes": len(target.labels), **_described(loss)}
            for key, target, loss in zip(bad.batch.keys, targets, alone, strict=True)
        ],
    }


def _loss(detector: nn.Module, images: Tensor, targets: Sequence[Target], *, precision: str) -> Loss:
    detector.zero_grad()
    with torch.autocast("cpu", dtype=AUTOCAST.get(precision, torch.bfloat16), enabled=precision in AUTOCAST):
        parts: dict[str, Tensor] = detector.losses(detector(images), targets)  # type: ignore[operator]
    torch.stack(list(parts.values())).sum().backward()
    norm = nn.utils.get_total_norm([p.grad for p in detector.parameters() if p.grad is not None])
    return Loss({name: float(part.detach()) for name, part in parts.items()}, float(norm))


def _described(loss: Loss) -> dict[str, Any]:
    return {"finite": loss.finite, "parts": loss.parts, "grad_norm": loss.grad_norm}
