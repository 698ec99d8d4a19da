"""The one Lightning module for all detectors.

B images of this rank's batch.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import LRSchedulerConfigType, OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from onestage.errors import InputError
from onestage.training.divergence import BadBatch, check_weights, stop
from onestage.training.schedules import Schedule
from onestage.types import MAX_LOGGED_CLASSES, WHOLE, Batch, Detections, Skipped, Target


class Found(NamedTuple):
    """One validation image: its detections and its truth, both in the original image's pixels, on the CPU."""

    image_id: int
    detections: Detections
    target: Target


class MicroBatch(NamedTuple):
    """What a rank trains on at once, its loss there, as a whole and by part, and what its random draws began with."""

    batch: Batch
    loss: Tensor
    parts: Mapping[str, Tensor]
    seed: int


class Step(NamedTuple):
    """Of all ranks: a step's loss, how many images it had to skip, and how many ranks ask to stop behind it."""

    loss: Tensor
    skipped: Tensor
    asking: Tensor


class Metric(Protocol):
    """Scores of a whole split by name, such as ``map_50``."""

    def __call__(self, found: Sequence[Found]) -> dict[str, float]: ...


Interval = Callable[[Sequence[Found]], tuple[float, float] | None]
"""How sure the mAP of a split is."""


class DetectionModule(pl.LightningModule):
    """Trains ``detector`` and validates it; every rank holds the same weights.

    ``optimizer`` makes one from parameter groups; ``schedule`` gives the factor of its learning rate; ``card`` is plain
    data that every checkpoint carries, enough to build the detector again. More than ``max_skipped`` images of
    an epoch, or of a validation, that could not be read are an ``InputError``; rank 0 has them in ``skipped``.

    A step's gradient is that of the mean loss over its images, on however many ranks and in however many micro-batches.
    A detector with ``counts_over_ranks`` divides by the positives of all ranks, but of one micro-batch: where a step
    has several, each is weighed by its images, not by its positives, and the step depends a little on their number.

    ``stop_asked`` may be set on any rank at any time. With the end of the next step ``stop_agreed`` is set on all of
    them, before its ``on_train_batch_end``.
    """

    def __init__(
        self,
        *,
        detector: nn.Module,
        optimizer: Callable[[Iterable[Any]], Optimizer],
        schedule: Schedule,
        metric: Metric,
        seed: int,
        card: Mapping[str, Any],
        max_skipped: int = 0,
        interval: Interval = lambda found: None,
    ) -> None:
        super().__init__()
        # Convolutions on CPUs and tensor cores alike run fastest with channels last.
        self.detector = detector.to(memory_format=torch.channels_last)
        self.optimizer = optimizer
        self.schedule = schedule
        self.metric = metric
        self.interval = interval
        self.best_map = -1.0
        self.seed = seed
        self.card = dict(card)
        self.metrics: dict[str, float] = {}
        self.images_seen = 0
        self.stop_asked = False
        self.stop_agreed = False
        self.max_skipped = max_skipped
        self.num_skipped = 0  # of the epoch, over all ranks
        self.skipped: list[Skipped] = []  # not told to anyone yet
        self._start = (0, Fraction(0))  # the step and the epoch from which this process counts
        self._steps_per_epoch = 1
        self._micro_batches: list[MicroBatch] = []  # of the step at hand
        self.found: list[Found] = []
        self.val_losses: list[Tensor] = []
        self.val_skipped: list[Skipped] = []

    def setup(self, stage: str) -> None:
        self.detector.mean_over_ranks = self._mean_in_training  # type: ignore[assignment]

    def _mean_in_training(self, value: Tensor) -> Tensor:
        """In validation the ranks' batches differ in number: who waited for the others would wait for ever."""
        return self._mean_over_ranks(value) if self.detector.training else value

    def _mean_over_ranks(self, value: Tensor) -> Tensor:
        if self.trainer.world_size == 1:
            return value
        reduced = self.trainer.strategy.reduce(value.detach(), reduce_op="mean")
        assert isinstance(reduced, Tensor)
        return reduced

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Weight decay acts on weights alone: a decayed norm or bias only shrinks the signal."""
        trained = [(name, p) for name, p in self.detector.named_parameters() if p.requires_grad]
        weights = [p for name, p in trained if p.ndim > 1 and not name.endswith("bias")]
        others = [p for name, p in trained if p.ndim <= 1 or name.endswith("bias")]
        try:
            optimizer = self.optimizer([{"params": weights}, {"params": others, "weight_decay": 0.0}])
        except ValueError as error:  # torch says which value, not whose
            raise InputError(f"optimizer: {error}") from error
        num_steps = int(self.trainer.estimated_stepping_batches)
        num_batches, accumulated = int(self.trainer.num_training_batches), self.trainer.accumulate_grad_batches
        self._steps_per_epoch = max(-(-num_batches // accumulated), 1)
        num_epochs = num_steps / self._steps_per_epoch

        def factor(step: int) -> float:
            # Step 0 is the first to be taken: a warm-up from nothing would waste it.
            return self.schedule(float(self._epoch(step + 1)), num_epochs)

        scheduler: LRSchedulerConfigType = {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}
        self._settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def on_train_start(self) -> None:
        """A resume takes the optimizer's state from the checkpoint, but its settings from the config of now."""
        scheduler = self.lr_schedulers()
        assert isinstance(scheduler, LambdaLR)
        scheduler.base_lrs = [settings["initial_lr"] for settings in self._settings]
        factor = scheduler.lr_lambdas[0](scheduler.last_epoch)
        for group, settings in zip(scheduler.optimizer.param_groups, self._settings, strict=True):
            group.update(settings | {"lr": settings["initial_lr"] * factor})
        scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]

    def _epoch(self, step: int) -> Fraction:
        """Epochs done before ``step``; exact, also where a resume changed how many steps an epoch has."""
        first, epoch = self._start
        return epoch + Fraction(step - first, self._steps_per_epoch)

    def on_train_epoch_start(self) -> None:
        self.num_skipped = 0

    def on_train_epoch_end(self) -> None:
        self.log("data/skipped", float(self.num_skipped), batch_size=1)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # What a batch draws depends on the seed, step, rank and its part of the step alone, so that a resumed run draws
        # the same.
        torch.manual_seed(self._seed_of(batch))

    def _seed_of(self, batch: Batch) -> int:
        return hash((self.seed, self.global_step, self.global_rank, batch.part.number)) % 2**63

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        num_images = batch.step_images(self.trainer.world_size)
        if len(batch) == 0:
            losses: dict[str, Tensor] = {}
            loss = self._loss_of_none(batch)
        else:
            # DDP averages over ranks, Lightning over micro-batches: weighting by images makes that the mean over the
            # images of the whole step.
            share = len(batch) * self.trainer.world_size * batch.part.of / num_images
            losses = {name: part * share for name, part in self._losses(batch).items()}
            loss = torch.stack(list(losses.values())).sum()
        if batch.part.number == 0:
            self._micro_batches = []
        parts = {name: part.detach() for name, part in losses.items()}
        self._micro_batches.append(MicroBatch(batch, loss.detach(), parts, self._seed_of(batch)))
        if batch.ends_step:
            self._step = self._log_losses()
            self.images_seen += num_images
            if isinstance(seen := getattr(self.detector, "seen", None), Tensor):
                seen += num_images
        return loss

    def _loss_of_none(self, batch: Batch) -> Tensor:
        """Nothing, where a step leaves a rank without an image; the others still wait for its gradients and counts."""
        parameters = [p.sum() for p in self.detector.parameters() if p.requires_grad]
        # The ranks' largest share of the step: where even that has no image in this part, nobody waits.
        largest = -(-batch.step_images(self.trainer.world_size) // self.trainer.world_size)
        if batch.part.number < largest and any(
            isinstance(module, nn.SyncBatchNorm) and module.training for module in self.detector.modules()
        ):
            # Synchronised norms exchange their statistics in forward and backward, and leave out who has no image.
            parameters += [one.sum() for one in self.detector.raw_maps(to_float(batch.images))]  # type: ignore[operator]
        if getattr(self.detector, "counts_over_ranks", False):
            self._mean_over_ranks(torch.zeros(2, device=self.device))
        return torch.stack(parameters).sum() * 0.0

    def _losses(self, batch: Batch) -> dict[str, Tensor]:
        parts: dict[str, Tensor] = self.detector.losses(self.detector(to_float(batch.images)), batch.targets)  # type: ignore[operator]
        return parts

    def _log_losses(self) -> Step:
        """The step's losses over all ranks, by name; one reduction of a few numbers at the end of its micro-batches."""
        names: tuple[str, ...] = self.detector.loss_parts  # type: ignore[assignment]
        none = torch.zeros((), device=self.device)  # a rank without an image has no parts
        by_part = [torch.stack([one.parts.get(name, none) for one in self._micro_batches]).mean() for name in names]
        num_skipped = sum(len(one.batch.skipped) for one in self._micro_batches)
        total = torch.stack([one.loss for one in self._micro_batches]).mean()
        mine = [total, *by_part, none + num_skipped, none + self.stop_asked]
        loss, *parts, skipped, asking = self._mean_over_ranks(torch.stack(mine))
        losses = {f"train/loss/{name}": part for name, part in zip(names, parts, strict=True)}
        self.log_dict({"train/loss": loss, **losses}, batch_size=1)
        self.log("train/lr", self.lr_schedulers().get_last_lr()[0], batch_size=1)  # type: ignore[union-attr]
        return Step(loss, skipped * self.trainer.world_size, asking * self.trainer.world_size)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        norm = nn.utils.clip_grad_norm_(self.detector.parameters(), gradient_clip_val or float("inf"))
        self.log("train/grad_norm", norm, batch_size=1)
        self._stop_if_diverged(norm)
        # Asked here, where the device has been waited for already.
        num_skipped, num_asking = (round(number) for number in torch.stack(self._step[1:]).tolist())
        self.stop_agreed = num_asking > 0
        if num_skipped:
            self._count_skipped(num_skipped)

    def _count_skipped(self, num_skipped: int) -> None:
        """Every rank knows the number, so that all of them come here, and all of them stop or none does."""
        self.num_skipped += num_skipped
        self.log("data/skipped", float(self.num_skipped), batch_size=1)
        mine = [one for micro_batch in self._micro_batches for one in micro_batch.batch.skipped]
        skipped = [one for part in all_gather(mine, self.trainer.world_size) for one in part]
        if self.global_rank == 0:
            self.skipped += skipped
        check_skipped(self.num_skipped, self.max_skipped, what=f"of epoch {self.current_epoch}", such_as=skipped)

    def _stop_if_diverged(self, norm: Tensor) -> None:
        """Before the weights are touched, so that they, the optimizer and the average stay those of the last good step.

        Loss and gradient are by now the same on all ranks: all of them stop or none does.
        """
        finite = self._step.loss.isfinite()
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        scale = None if scaler is None else float(scaler.get_scale())
        if scale is None or scale < 1:
            finite = finite & norm.isfinite()  # 16-mixed's scaler finds its scale by infinite gradients, and skips them
        if finite:
            return
        suspect = _suspect(self._micro_batches)
        weights = self.detector.state_dict()
        if "seen" in weights:
            weights["seen"] = weights["seen"] - suspect.batch.step_images(self.trainer.world_size)
        bad = BadBatch(
            batch=suspect.batch,
            weights=weights,
            card=self.card,
            step=self.global_step,
            rank=self.global_rank,
            seed=suspect.seed,
            precision=str(self.trainer.precision),
        )
        folder = Path(self.trainer.default_root_dir) / "bad_batch"
        stop(
            bad,
            suspect.parts,
            loss=self._step.loss,
            folder=folder,
            world_size=self.trainer.world_size,
            loss_scale=scale,
        )

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.val_skipped += batch.skipped
        if len(batch) == 0:
            return
        output = self.detector(to_float(batch.images))
        parts = self.detector.losses(output, batch.targets)  # type: ignore[operator]
        self.val_losses.append(torch.stack(list(parts.values())).sum().detach().cpu() * len(batch))
        detections = self.detector.detect(output)  # type: ignore[operator]
        self.found += [in_original(one, target) for one, target in zip(detections, batch.targets, strict=True)]

    def on_validation_epoch_end(self) -> None:
        """Gathers every image once to rank 0, which alone computes the metrics and tells the others."""
        loss = torch.stack(self.val_losses).sum() if self.val_losses else torch.zeros(())
        gathered = gather((self.found, float(loss), self.val_skipped), self.trainer.world_size)
        metrics: dict[str, float] = {}
        num_found = 0
        skipped: list[Skipped] = []
        if gathered is not None:
            found = sorted((one for part, _, _ in gathered for one in part), key=lambda one: one.image_id)
            metrics = {f"val/{name}": value for name, value in self.metric(found).items()}
            metrics["val/loss"] = sum(part for _, part, _ in gathered) / max(len(found), 1)
            metrics |= self._best_so_far(metrics.get("val/map", -1.0), found)
            self.found = found
            num_found = len(found)
            skipped = [one for _, _, part in gathered for one in part]
            if skipped:
                self.skipped += skipped
                metrics["val/skipped"] = float(len(skipped))
        told = (metrics, num_found, skipped[:1])
        self.metrics, num_found, skipped = self.trainer.strategy.broadcast(told)
        # Of no image at all there is no score, however many may be skipped.
        limit = self.max_skipped if num_found else 0
        check_skipped(int(self.metrics.get("val/skipped", 0)), limit, what="to validate on", such_as=skipped)
        self.best_map = self.metrics.get("best/map", self.best_map)
        self.log_dict(without_many_classes(self.metrics), batch_size=1)

    def _best_so_far(self, score: float, found: Sequence[Found]) -> dict[str, float]:
        """The validation's mAP with its interval, where none was better; nothing otherwise."""
        if score <= self.best_map:
            return {}
        interval = self.interval(found)
        bounds = {} if interval is None else dict(zip(("best/map_low", "best/map_high"), interval, strict=True))
        return {"best/map": score, **bounds}

    def on_validation_epoch_start(self) -> None:
        self.found, self.val_losses, self.val_skipped = [], [], []

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_weights(self.detector, step=self.global_step)
        epoch = self._epoch(self.global_step).as_integer_ratio()
        checkpoint["onestage"] = self.card | {
            "images_seen": self.images_seen,
            "epoch": list(epoch),
            "skipped": self.num_skipped,
            "metrics": self.metrics,
            "best_map": self.best_map,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        epoch = Fraction(*checkpoint["onestage"]["epoch"])
        realign = getattr(getattr(self.trainer, "datamodule", None), "realign", None)
        if realign is not None:  # this training's steps may be of another size than the checkpoint's
            epoch = realign(checkpoint)
        self.num_skipped = checkpoint["onestage"].get("skipped", 0)
        self.best_map = checkpoint["onestage"].get("best_map", -1.0)
        self.images_seen = checkpoint["onestage"]["images_seen"]
        self._start = (checkpoint["global_step"], epoch)


def _suspect(micro_batches: Sequence[MicroBatch]) -> MicroBatch:
    """The first micro-batch of a diverged step whose loss is not finite; where there is none, all of them as one."""
    for one in micro_batches:
        if not one.loss.isfinite():
            return one
    if len(micro_batches) == 1:
        return micro_batches[0]
    batches = [one.batch for one in micro_batches]
    whole = replace(
        batches[0],
        images=torch.cat([batch.images.cpu() for batch in batches]),
        targets=[target for batch in batches for target in batch.targets],
        keys=[key for batch in batches for key in batch.keys],
        part=WHOLE,
    )
    names = dict.fromkeys(name for one in micro_batches for name in one.parts)
    parts = {
        name: torch.stack([one.parts[name] for one in micro_batches if name in one.parts]).sum() / len(micro_batches)
        for name in names
    }
    return MicroBatch(whole, torch.stack([one.loss for one in micro_batches]).mean(), parts, micro_batches[0].seed)


def check_skipped(num_skipped: int, limit: int, *, what: str, such_as: Sequence[Skipped]) -> None:
    """Raises InputError where more images could not be read than ``limit``; ``what`` images they are.

    The first of ``such_as`` is named with its reason: the same words on all ranks.
    """
    if num_skipped > limit:
        beyond = f", more than data.max_skipped={limit}" if limit else ""
        example = f" (such as {such_as[0].key}: {such_as[0].why})" if such_as else ""
        raise InputError(
            f"{num_skipped} images {what} could not be read{example}{beyond}: mend the dataset "
            f"(`onestage data check` names what is broken), or raise data.max_skipped"
        )


def without_many_classes(metrics: Mapping[str, float]) -> dict[str, float]:
    """A split's metrics without those of single classes, where ``SPLIT/ap/…`` are more than ``MAX_LOGGED_CLASSES``."""
    many = sum(name.split("/")[1:2] == ["ap"] for name in metrics) > MAX_LOGGED_CLASSES
    return {name: value for name, value in metrics.items() if not many or "/ap/" not in name}


def to_float(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) as float in [0, 1], channels last; uint8 ones are scaled."""
    images = images.float().div_(255) if images.dtype == torch.uint8 else images
    return images.contiguous(memory_format=torch.channels_last)


def in_original(detections: Detections, target: Target) -> Found:
    """Detections and truth of one image on the CPU, in the original image's pixels: where sizes mean something."""
    place = target.placement
    target = target.to("cpu")
    return Found(
        target.image_id,
        Detections(
            place.to_original(detections.boxes.cpu()),  # type: ignore[arg-type]
            detections.scores.cpu(),
            detections.labels.cpu(),
        ),
        Target(
            place.to_original(target.boxes),
            target.labels,
            target.image_id,
            crowd=target.crowd,
            difficult=target.difficult,
        ),
    )


def gather(value: Any, world_size: int) -> list[Any] | None:
    """The ranks' values on rank 0, None elsewhere."""
    if world_size == 1:
        return [value]
    gathered = [None] * world_size if torch.distributed.get_rank() == 0 else None
    torch.distributed.gather_object(value, gathered)
    return gathered


def all_gather(value: Any, world_size: int) -> list[Any]:
    """The ranks' values on every rank."""
    if world_size == 1:
        return [value]
    gathered: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(gathered, value)
    return gathered
