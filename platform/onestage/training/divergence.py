"""A loss or gradient that is not finite ends the training, and leaves what is needed to see why.

B images of one rank's batch.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from onestage.errors import InputError
from onestage.training.endings import Diverged
from onestage.types import XYXY, Batch, Target


@dataclass(frozen=True)
class BadBatch:
    """One rank's share of a step that diverged, and the weights that it met.

    ``weights`` are the parameters before the step, with ``seen`` not counting it yet; the other buffers are as its
    forward left them, so batch norm's statistics hold the batch. ``card`` builds the detector, ``seed`` is what the
    step's random draws began with, ``precision`` Lightning's name.
    """

    batch: Batch
    weights: Mapping[str, Tensor]
    card: Mapping[str, Any]
    step: int
    rank: int
    seed: int
    precision: str

    def save(self, folder: Path) -> Path:
        """Writes ``step-N-rank-R.safetensors`` into ``folder``: images, boxes and labels by image, and weights."""
        # Not a copy on the GPU, whose memory the training may have filled.
        weights = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in self.weights.items()}
        tensors = {f"weights.{name}": value for name, value in weights.items()}
        tensors["images"] = self.batch.images.contiguous()
        for number, target in enumerate(self.batch.targets):
            tensors[f"boxes.{number}"] = target.boxes.contiguous()
            tensors[f"labels.{number}"] = target.labels.contiguous()
        facts = {
            "keys": list(self.batch.keys),
            "image_ids": [target.image_id for target in self.batch.targets],
            "card": dict(self.card),
            "step": self.step,
            "rank": self.rank,
            "seed": self.seed,
            "precision": self.precision,
        }
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"step-{self.step}-rank-{self.rank}.safetensors"
        save_file(tensors, path, metadata={"onestage": json.dumps(facts)})
        return path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """What ``save`` wrote. Raises InputError for any other file."""
        try:
            with safe_open(str(path), framework="pt") as file:
                facts = json.loads((file.metadata() or {})["onestage"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            targets = [
                Target(XYXY(tensors[f"boxes.{number}"]), tensors[f"labels.{number}"], image_id)
                for number, image_id in enumerate(facts["image_ids"])
            ]
            prefix = "weights."
            return cls(
                batch=Batch(tensors["images"], targets, facts["keys"]),
                weights={k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)},
                card=facts["card"],
                step=facts["step"],
                rank=facts["rank"],
                seed=facts["seed"],
                precision=facts["precision"],
            )
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} holds no batch of a diverged training: {error}") from error
        except (KeyError, ValueError, TypeError) as error:  # a safetensors file with other facts, or none
            raise InputError(f"{path} holds no batch of a diverged training") from error


def stop(
    bad: BadBatch,
    parts: Mapping[str, Tensor],
    *,
    loss: Tensor,
    folder: Path,
    world_size: int,
    loss_scale: float | None = None,
) -> NoReturn:
    """Saves the batch on the ranks where it happened, and raises the same Diverged on all of them.

    ``parts`` are this rank's; ``loss`` is the mean over ranks; ``loss_scale`` is the scaler's, where there is one.
    Every rank must call this: it tells the others.
    """
    values, total = {name: float(part) for name, part in parts.items()}, float(loss)
    what = f"the loss is {total}"
    if math.isfinite(total):
        scaled = "" if loss_scale is None else f" even with the loss scaled by {loss_scale:g}"
        what = f"the gradient is not finite{scaled}, the loss is {total:.6g}"
    # Whose gradient it was, nobody can say after the sum over the ranks: then every rank saves its share.
    ours = math.isfinite(total) or not all(map(math.isfinite, values.values()))
    found = _finding(bad, values, folder) if ours else None
    findings: list[str | None] = [found]
    if world_size > 1:
        findings = [None] * world_size
        torch.distributed.all_gather_object(findings, found)
    raise Diverged("; ".join([f"step {bad.step}: {what}", *(one for one in findings if one is not None)]))


def _finding(bad: BadBatch, parts: Mapping[str, float], folder: Path) -> str:
    listed = ", ".join(f"{name} {value:.6g}" for name, value in parts.items())
    try:
        saved = f"`onestage replay {bad.save(folder)}` says which"
    except (OSError, SafetensorError, RuntimeError) as error:  # the other ranks wait to hear of this one
        saved = f"not saved: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
    return f"rank {bad.rank} ({listed}), images {', '.join(bad.batch.keys)}: {saved}"


def check_weights(module: nn.Module, *, step: int) -> None:
    """Raises Diverged where a parameter is not finite: such weights are not to be saved."""
    parameters = dict(module.named_parameters())
    finite = torch.stack([parameter.isfinite().all() for parameter in parameters.values()])
    if not finite.all():
        first = next(name for name, good in zip(parameters, finite.tolist(), strict=True) if not good)
        raise Diverged(f"step {step}: the optimizer's last step left {first} not finite: lower optimizer.lr")
