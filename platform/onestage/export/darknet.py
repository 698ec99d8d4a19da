"""A trained detector as a Darknet ``.weights`` file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from onestage.config import compose
from onestage.errors import InputError
from onestage.inference import Predictor
from onestage.weights import darknet

HEADER_BYTES: Final = 20
STRUCTURE: Final = ("backbone", "neck", "head", "hidden", "boxes_per_cell", "priors", "masks", "centre_scale")
"""What a cfg fixes; it leaves input size, number of classes and thresholds to whoever uses it."""
CFGS: Final = {
    "yolov1_darknet": "yolov1.cfg",
    "yolov1_tiny": "yolov1-tiny.cfg",
    "yolov2": "yolov2.cfg",
    "yolov2_voc": "yolov2-voc.cfg",
    "yolov2_tiny_voc": "yolov2-tiny-voc.cfg",
    "yolov3": "yolov3.cfg",
    "yolov3_spp": "yolov3-spp.cfg",
    "yolov3_tiny": "yolov3-tiny.cfg",
    "yolov4": "yolov4.cfg",
    "yolov4_tiny": "yolov4-tiny.cfg",
}
"""The cfg of Darknet that each of our configs at width 1.0 is the network of."""


def export(run: str, *, out: Path | None, overrides: Sequence[str]) -> dict[str, Any]:
    """Writes RUN's weights to ``out`` (RUN.weights by default: beside a checkpoint, else in the current folder).

    Returns what was written; ``cfg`` is None where no cfg of Darknet has this network. Raises InputError for a detector
    that is not of the Darknet family.
    """
    from onestage.tracking.tracker import store_uri

    config = compose("train", list(overrides))
    predictor = Predictor.open(run, storage=config["storage"], tracking_uri=store_uri(config))
    detector: Any = predictor.detector
    if not hasattr(detector, "darknet_layers"):
        raise InputError(
            f"{run} holds {type(detector).__name__}, which Darknet does not have; "
            f"--format darknet is for {', '.join(CFGS)}"
        )
    file = _beside(run) if out is None else out
    file.parent.mkdir(parents=True, exist_ok=True)
    darknet.save(detector, file)
    size = file.stat().st_size
    node = predictor.config["detector"]
    return {
        "run_id": run,
        "out": str(file),
        "bytes": size,
        "floats": (size - HEADER_BYTES) // 4,
        "cfg": cfg_of(node),
        "width": node["width"],
        "input_size": list(detector.input_size),
        "classes": list(predictor.classes),
    }


def cfg_of(node: Mapping[str, Any]) -> str | None:
    """The cfg of Darknet that a detector's config is the network of."""
    family = node["_target_"].split(".")[-2]
    for name, cfg in CFGS.items():
        if name.startswith(family):
            theirs = compose("train", [f"detector={name}"])["detector"]
            if all(theirs.get(key) == node.get(key) for key in STRUCTURE):
                return cfg
    return None


def _beside(run: str) -> Path:
    """``some/last.ckpt`` gives ``some/last.weights``, run 0af3 ``0af3.weights``, a model ``NAME@ALIAS.weights``."""
    file = Path(run)
    return file.with_suffix(".weights") if file.is_file() else Path(f"{file.name}.weights")
