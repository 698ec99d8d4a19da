"""COCO's mean average precision, by torchmetrics over faster-coco-eval."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torchmetrics.detection import MeanAveragePrecision

from onestage.types import Detections, Target


class Found(Protocol):
    """One image: what was found in it, and the truth, in the same pixels."""

    @property
    def detections(self) -> Detections: ...

    @property
    def target(self) -> Target: ...


class MeanAP:
    """map (IoU 0.5 to 0.95), map_50, map_75, by size (COCO's areas in pixels: 32² and 96²), and ``ap/<class>``.

    Called with every image of the split exactly once. A class or size without truths has no score and is left out.
    """

    NAMES = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large", "mar_100")

    def __init__(self, *, classes: Sequence[str]) -> None:
        self.classes = list(classes)

    def __call__(self, found: Sequence[Found]) -> dict[str, float]:
        if not found:
            return {}
        metric = MeanAveragePrecision(
            box_format="xyxy", iou_type="bbox", class_metrics=True, backend="faster_coco_eval", sync_on_compute=False
        )
        metric.warn_on_many_detections = False  # COCO counts the 100 best of an image, however many there are
        predictions = [
            {"boxes": one.detections.boxes, "scores": one.detections.scores, "labels": one.detections.labels}
            for one in found
        ]
        truths = []
        for one in found:
            truth = {"boxes": one.target.boxes, "labels": one.target.labels}
            if one.target.crowd is not None:
                truth["iscrowd"] = one.target.crowd.to(torch.int64)
            truths.append(truth)
        metric.update(predictions, truths)
        scores = metric.compute()
        values = {name: float(scores[name]) for name in self.NAMES}
        present = torch.atleast_1d(scores["classes"]).tolist()
        for label, value in zip(present, torch.atleast_1d(scores["map_per_class"]).tolist(), strict=True):
            values[f"ap/{self.classes[int(label)]}"] = value
        return {name: value for name, value in values.items() if value >= 0}
