"""Every detector has its paper's recipe; the figures here are the papers', in their own units.

VOC is Pascal VOC 2007 and 2012 trainval, COCO trainval35k; cfg is the authors' Darknet configuration.
"""

from functools import cache
from typing import Any, Final, NamedTuple

import pytest
import torch

from onestage.config import build, compose, options

VOC: Final = 16_551
COCO: Final = 118_287


class Paper(NamedTuple):
    """Batch, rate, momentum, decay, epochs, and the rate's factor behind some share of the training."""

    batch: int
    rate: float
    momentum: float
    decay: float
    epochs: float
    factors: dict[float, float]


YOLOV1 = Paper(64, 1e-2, 0.9, 5e-4, 75 + 30 + 30, {74 / 135: 1, 80 / 135: 0.1, 110 / 135: 0.01})
SSD = Paper(32, 1e-3, 0.9, 5e-4, 400_000 * 32 / COCO, {279 / 400: 1, 281 / 400: 0.1, 361 / 400: 0.01})  # with zoom-out
YOLOV2 = Paper(64, 1e-3, 0.9, 5e-4, 160, {59 / 160: 1, 61 / 160: 0.1, 91 / 160: 0.01})
RETINANET = Paper(16, 1e-2, 0.9, 1e-4, 90_000 * 16 / COCO, {59 / 90: 1, 61 / 90: 0.1, 81 / 90: 0.01})
YOLOV3 = Paper(64, 1e-3, 0.9, 5e-4, 500_200 * 64 / COCO, {399 / 500.2: 1, 401 / 500.2: 0.1, 451 / 500.2: 0.01})
YOLOV4 = Paper(64, 1.3e-3, 0.949, 5e-4, 500_500 * 64 / COCO, {0.01: 1, 0.5: 0.5, 1.0: 0})
YOLOV4_TINY = Paper(64, 2.61e-3, 0.9, 5e-4, 2_000_200 * 64 / COCO, {0.79: 1, 0.81: 0.1, 0.91: 0.01})
PAPERS: Final = {
    "yolov1": YOLOV1,
    "yolov1_darknet": YOLOV1,
    "yolov1_tiny": YOLOV1,
    "ssd300": SSD,
    "ssd512": SSD,
    "yolov2": YOLOV2,
    "yolov2_voc": YOLOV2,
    "yolov2_tiny_voc": YOLOV2,
    "retinanet_r50": RETINANET,
    "retinanet_r101": RETINANET,
    "yolov3": YOLOV3,
    "yolov3_spp": YOLOV3,
    "yolov3_tiny": YOLOV3,
    "yolov4": YOLOV4,
    "yolov4_tiny": YOLOV4_TINY,
}
MULTI_SCALE: Final = {"yolov2", "yolov2_voc", "yolov2_tiny_voc", "yolov3", "yolov3_spp", "yolov3_tiny", "yolov4"}


@cache
def recipe(name: str, *overrides: str) -> dict[str, Any]:
    return compose("train", [f"experiment={name}_paper", *overrides])


@pytest.mark.parametrize("name", options("detector"))
def test_every_detector_has_its_papers_recipe(name: str) -> None:
    config, detector = recipe(name), compose("train", [f"detector={name}"])["detector"]
    assert config["detector"].keys() == detector.keys()
    assert config["detector"]["backbone"] == detector["backbone"]
    assert config["trainer"]["gradient_clip"] == 0
    assert config["trainer"]["ema_decay"] == 0
    build(config["data"] | {"root": "anywhere"})
    build(config["schedule"])
    build(config["optimizer"])([torch.zeros(1, requires_grad=True)])


@pytest.mark.parametrize(("name", "paper"), PAPERS.items(), ids=PAPERS)
def test_figures_are_the_papers(name: str, paper: Paper) -> None:
    config = recipe(name)
    assert config["data"]["batch_size"] == paper.batch
    optimizer = build(config["optimizer"])([torch.zeros(1, requires_grad=True)])
    assert isinstance(optimizer, torch.optim.SGD)
    found = [optimizer.defaults[key] for key in ("lr", "momentum", "weight_decay", "nesterov")]
    assert found == [paper.rate, paper.momentum, paper.decay, False]
    num_epochs = config["trainer"]["max_epochs"]
    assert num_epochs == pytest.approx(paper.epochs, rel=0.02)
    schedule = build(config["schedule"])
    for share, factor in paper.factors.items():
        assert schedule(share * num_epochs, num_epochs) == pytest.approx(factor, abs=0.011), share


@pytest.mark.parametrize(
    ("name", "warm_epochs", "start", "middle"),
    [
        ("yolov1", 600 * 64 / VOC, 0.1, 0.55),  # cfg: 600 batches, Sec. 2.2: from a tenth
        ("yolov2", 1000 * 64 / COCO, 0.0, 0.5**4),  # cfg: burn_in
        ("yolov2_voc", 1000 * 64 / VOC, 0.0, 0.5**4),
        ("yolov3", 1000 * 64 / COCO, 0.0, 0.5**4),
        ("yolov4", 1000 * 64 / COCO, 0.0, 0.5**4),
        ("retinanet_r50", 500 * 16 / COCO, 1 / 3, 2 / 3),  # Detectron
        ("ssd300", 0.0, 1.0, 1.0),
    ],
)
def test_warm_up_is_as_long(name: str, warm_epochs: float, start: float, middle: float) -> None:
    config = recipe(name)
    schedule, num_epochs = build(config["schedule"]), float(config["trainer"]["max_epochs"])
    found = [schedule(share * warm_epochs, num_epochs) for share in (0.0, 0.5, 1.02)]
    assert found == pytest.approx([start, middle, 1.0], abs=0.01)


@pytest.mark.parametrize("name", PAPERS)
def test_multi_scale_where_the_paper_has_it(name: str) -> None:
    sizes = build(recipe(name)["data"]["input_sizes"])
    drawn = {sizes(seed=0, epoch=0, batch=batch)[0] for batch in range(0, 1000, 10)}
    if name in MULTI_SCALE:
        assert drawn == set(range(320, 609, 32))
    else:
        assert drawn == {recipe(name)["detector"]["input_size"][0]}


def test_torchvisions_recipe_of_retinanet_v2() -> None:
    """pytorch/vision pull request 5756: AdamW, 1e-4, 0.05, 26 epochs with steps at 16 and 22, 8 GPUs of 2 images."""
    config = recipe("retinanet_r50_v2")
    optimizer = build(config["optimizer"])([torch.zeros(1, requires_grad=True)])
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (1e-4, 0.05)
    assert (config["data"]["batch_size"], config["trainer"]["max_epochs"]) == (16, 26)
    schedule = build(config["schedule"])
    factors = [schedule(epoch, 26.0) for epoch in (15.9, 16.1, 21.9, 22.1)]
    assert factors == pytest.approx([1.0, 0.1, 0.1, 0.01])


def test_yolov4_has_mosaic_and_cosine() -> None:
    config = recipe("yolov4")
    assert config["augment"]["mosaic"]["_target_"].endswith("Mosaic")
    assert config["augment"]["mosaic"]["num_epochs"] == config["trainer"]["max_epochs"]
    assert config["schedule"]["_target_"].endswith("WarmupCosine")


@pytest.mark.parametrize("name", ["yolov3", "yolov3_spp", "yolov3_tiny", "yolov4", "yolov4_tiny"])
def test_darknets_augmentation(name: str) -> None:
    """Their cfgs: jitter=.3 hue=.1 saturation=1.5 exposure=1.5."""
    augment = recipe(name)["augment"]
    assert augment["window"]["jitter"] == 0.3
    assert [augment["colour"][key] for key in ("hue", "saturation", "value")] == [0.1, 1.5, 1.5]


def test_ssds_hue_turns_by_18_of_opencvs_180() -> None:
    """hue_delta: 18 in the authors' prototxt, added to OpenCV's 8-bit hue of 180 levels."""
    assert recipe("ssd300")["augment"]["colour"]["hue"] * 180 == pytest.approx(18)


@pytest.mark.parametrize("name", ["retinanet_r50", "retinanet_r101"])
def test_smooth_l1_is_detectrons(name: str) -> None:
    """BBOX_REG_BETA in Detectron's config."""
    detector = recipe(name)["detector"]
    assert (detector["box_loss"], detector["smooth_l1_beta"]) == ("smooth_l1", 0.11)


def test_command_line_before_experiment_before_groups() -> None:
    assert compose("train", [])["data"]["batch_size"] != 64
    assert recipe("yolov4")["data"]["batch_size"] == 64
    config = recipe("yolov4", "data.batch_size=8", "trainer.max_epochs=3", "data.input_sizes.every=0")
    assert (config["data"]["batch_size"], config["trainer"]["max_epochs"]) == (8, 3)
    assert config["augment"]["mosaic"]["num_epochs"] == 3
    assert config["data"]["input_sizes"]["every"] == 0


@pytest.mark.parametrize("name", ["yolov1", "ssd300", "retinanet_r50", "yolov4", "yolov4_tiny"])
def test_a_recipes_parts_can_be_exchanged(name: str) -> None:
    config = recipe(name, "optimizer=adamw", "schedule=cosine", "augment=none")
    build(config["data"] | {"root": "anywhere"})
    build(config["schedule"])
    assert isinstance(build(config["optimizer"])([torch.zeros(1, requires_grad=True)]), torch.optim.AdamW)


@pytest.mark.parametrize("name", sorted({*PAPERS, "retinanet_r50_v2"}))
def test_evaluation_fits_images_as_training_does(name: str) -> None:
    """Who trains on images stretched to the square is not measured on letterboxed ones."""
    config = recipe(name)
    stretched = [key for key in ("window",) if config["augment"].get(key) is not None]
    assert config["data"]["fit"] == ("stretch" if stretched else "letterbox")
