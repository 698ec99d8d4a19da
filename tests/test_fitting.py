"""Fitted priors where they meet a config: the launcher's own, units, levels, and what goes along with a run."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import box_iou

from onestage.config import build, compose, merged, options
from onestage.data.formats.record import Record, Source
from onestage.data.pack import pack
from onestage.errors import InputError
from onestage.fitting import fitted, own_priors
from onestage.weights import darknet

SHAPES = [(12, 20), (24, 16), (40, 44), (64, 30), (70, 90), (120, 100), (100, 180), (200, 120), (190, 210)]
"""Widths and heights in pixels of a 416x416 image, by area."""
WITH_PRIORS = [
    "yolov2",
    "yolov2_tiny_voc",
    "yolov2_voc",
    "yolov3",
    "yolov3_spp",
    "yolov3_tiny",
    "yolov4",
    "yolov4_tiny",
]
WITHOUT = ["retinanet_r50", "ssd300", "yolov1_tiny"]
QUICK = ["yolov2_tiny_voc", "yolov3", "yolov4_tiny"]
EACH = pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in WITH_PRIORS]
)


def record(path: Path, shapes: Sequence[tuple[int, int]]) -> Record:
    count = len(shapes)
    boxes = [(3.0, 5.0, 3.0 + width, 5.0 + height) for width, height in shapes]
    return Record(path, 416, 416, boxes, [0] * count, [False] * count, [False] * count, source=path.name)


@pytest.fixture(scope="session")
def shaped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset whose boxes have just the nine ``SHAPES``; val has others."""
    folder = tmp_path_factory.mktemp("shaped")
    Image.fromarray(np.zeros((416, 416, 3), np.uint8)).save(folder / "one.png")
    train = [record(folder / "one.png", SHAPES[n % 3 :: 3]) for n in range(6)]
    val = [record(folder / "one.png", [(9, 9), (400, 9)])]
    pack(Source("shaped", ("thing",), {"train": train, "val": val}, []), folder / "set")
    return folder / "set"


def config_of(root: Path, detector: str, *overrides: str) -> dict[str, Any]:
    sized = "detector.input_size=[416,416]"
    return compose("train", [f"data.root={root}", f"detector={detector}", sized, *overrides])


@EACH
def test_priors_are_fitted_in_the_detectors_own_unit(shaped: Path, name: str) -> None:
    """The detector, once built, has them in pixels: each within its rounding of a true shape, or between some."""
    config = fitted(config_of(shaped, name, "detector.fit_anchors=true", "detector.width=0.125"))
    detector = build(config["detector"])
    before = compose("train", [f"detector={name}"])["detector"]["priors"]
    assert len(detector.priors) == len(before)
    shapes = torch.tensor(SHAPES, dtype=torch.float32)
    corners = [torch.cat((torch.zeros_like(one), one), dim=1) for one in (shapes, detector.priors)]
    reached = box_iou(*corners).amax(dim=1)
    if len(before) == len(SHAPES):
        assert detector.priors.tolist() == [list(shape) for shape in SHAPES]
    else:  # fewer priors than shapes: some answer for two
        assert float(reached.mean()) > 0.75
        assert (reached > 0.9).sum() >= 2 * len(before) - len(SHAPES)


@EACH
def test_every_prior_is_on_one_level_and_they_grow_with_it(shaped: Path, name: str) -> None:
    """As the cfgs have it, but yolov4-tiny's: it leaves its smallest prior out, which costs fitted ones their boxes."""
    config = fitted(config_of(shaped, name, "detector.fit_anchors=true", "detector.width=0.125"))
    detector = build(config["detector"])
    numbers = [number for mask in detector.masks for number in mask]
    assert numbers == list(range(len(detector.priors)))
    areas = detector.priors.prod(dim=1)
    assert (areas[1:] >= areas[:-1]).all()


@pytest.mark.parametrize("name", QUICK)
def test_the_overrides_compose_to_the_same_detector(shaped: Path, name: str) -> None:
    """What a resume and an evaluation do: the run's overrides, with others after them."""
    config = fitted(config_of(shaped, name, "detector.fit_anchors=true", "seed=7"))
    again = compose("train", merged(config["overrides"], ["data.batch_size=3"]))
    assert again["detector"] == config["detector"]
    assert again["detector"]["fit_anchors"] is False
    assert "detector.fit_anchors=true" not in config["overrides"]
    assert "seed=7" in config["overrides"]
    assert json.loads(json.dumps(config)) == config
    assert fitted(again) == again


def test_the_config_that_was_given_stays_as_it_was(shaped: Path) -> None:
    config = config_of(shaped, "yolov3_tiny", "detector.fit_anchors=true")
    before = json.dumps(config)
    fitted(config)
    assert json.dumps(config) == before


def test_detectors_with_priors_are_told_by_their_files() -> None:
    assert sorted(own_priors()) == WITH_PRIORS


@pytest.mark.slow
def test_priors_read_from_the_files_are_those_that_compose() -> None:
    for name in options("detector"):
        assert compose("train", [f"detector={name}"])["detector"].get("priors") == own_priors().get(name)


def test_without_the_key_nothing_is_read(shaped: Path) -> None:
    for name in ("yolov3_tiny", "ssd300"):
        config = compose("train", ["data.root=/no/such/folder", f"detector={name}"])
        assert fitted(config) is config


def test_a_recipe_that_asks_for_it_is_answered_once(shaped: Path) -> None:
    """Where a yaml says true, the run's overrides have to say false."""
    config = config_of(shaped, "yolov3_tiny")
    config["detector"]["fit_anchors"] = True
    assert "detector.fit_anchors=false" in fitted(config)["overrides"]


def test_two_lines_tell_what_it_brought(shaped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fitted(config_of(shaped, "yolov3", "detector.fit_anchors=true"))
    captured = capsys.readouterr()
    assert captured.out == ""
    before, after = captured.err.splitlines()
    assert before.startswith("detector.priors as configured: average IoU 0.")
    assert before.endswith("%, over 18 boxes at 416x416")
    assert after == "detector.priors as fitted: average IoU 1.000, possible recall at IoU 0.5 100.0%"


def test_the_seed_is_the_runs(shaped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from onestage.anchors import clusters

    seeds: list[int] = []
    fit = clusters.fit

    def spied(sizes: torch.Tensor, k: int, *, seed: int) -> torch.Tensor:
        seeds.append(seed)
        return fit(sizes, k, seed=seed)

    monkeypatch.setattr(clusters, "fit", spied)
    fitted(config_of(shaped, "yolov3_tiny", "detector.fit_anchors=true", "seed=11"))
    assert seeds == [11]


def test_they_are_for_the_input_size_of_the_run(shaped: Path) -> None:
    config = fitted(config_of(shaped, "yolov3", "detector.input_size=[832,832]", "detector.fit_anchors=true"))
    assert config["detector"]["priors"] == [[2 * width, 2 * height] for width, height in SHAPES]


def test_and_for_images_as_they_come_to_it(shaped: Path) -> None:
    """Square ones on an input twice as wide: stretched they are twice as wide, letterboxed they stay."""
    wide = ("detector.input_size=[416,832]", "detector.fit_anchors=true")
    stretched = fitted(config_of(shaped, "yolov3", *wide, "data.fit=stretch"))["detector"]["priors"]
    assert sorted(stretched) == sorted([2 * width, height] for width, height in SHAPES)
    letterboxed = fitted(config_of(shaped, "yolov3", *wide))["detector"]["priors"]
    assert letterboxed == [list(shape) for shape in SHAPES]


def test_small_ones_keep_a_tenth_of_a_pixel(tmp_path: Path) -> None:
    """416 px shrunk to 128: a box of 13 px has 4."""
    Image.fromarray(np.zeros((416, 416, 3), np.uint8)).save(tmp_path / "one.png")
    shapes = [(13, 14), (16, 20), (30, 31), (80, 60), (100, 120), (200, 300)]
    pack(Source("s", ("thing",), {"train": [record(tmp_path / "one.png", shapes)]}, []), tmp_path / "set")
    sized = "detector.input_size=[128,128]"
    config = fitted(config_of(tmp_path / "set", "yolov3_tiny", "detector.fit_anchors=true", sized))
    expected = [[4.0, 4.3], [4.9, 6.2], [9.2, 9.5], [25, 18], [31, 37], [62, 92]]
    assert config["detector"]["priors"] == expected


def test_a_resumed_run_keeps_its_priors(shaped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where the command says again what it said at first."""
    first = fitted(config_of(shaped, "yolov4_tiny", "detector.fit_anchors=true"))
    before = merged(first["overrides"], ["data.root=/gone", "detector.fit_anchors=true", "resume=0123abcd"])
    capsys.readouterr()
    resumed = fitted(compose("train", before))
    assert {**resumed["detector"], "num_classes": 1} == first["detector"]
    assert "detector.fit_anchors=false" in resumed["overrides"]
    assert capsys.readouterr().err == "detector.fit_anchors: a resumed run keeps its priors\n"


def test_fewer_shapes_than_priors_are_refused_in_one_line(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((416, 416, 3), np.uint8)).save(tmp_path / "one.png")
    train = [record(tmp_path / "one.png", [(10, 20), (10, 20), (30, 30), (30, 30), (30, 30), (9, 9), (9, 9)])]
    pack(Source("few", ("thing",), {"train": train}, []), tmp_path / "set")
    with pytest.raises(
        InputError, match=r"6 anchors need as many boxes of different sizes; train of .*set has 7 boxes"
    ):
        fitted(config_of(tmp_path / "set", "yolov3_tiny", "detector.fit_anchors=true"))


@pytest.mark.parametrize("name", ["yolov2_tiny_voc", "yolov3_tiny", "yolov4_tiny"])
def test_a_detector_itself_refuses_the_key(make_detector: Callable[..., Any], name: str) -> None:
    with pytest.raises(InputError, match=r"^detector\.fit_anchors=true is for `onestage train`"):
        make_detector(name, "width=0.125", "fit_anchors=true")


@pytest.mark.parametrize("name", WITHOUT)
def test_detectors_without_priors_do_not_have_the_key(name: str) -> None:
    with pytest.raises(InputError, match=r"^no config key 'detector\.fit_anchors'"):
        compose("train", [f"detector={name}", "detector.fit_anchors=true"])


@pytest.mark.parametrize("name", ["yolov2_tiny_voc", "yolov3_tiny", "yolov4_tiny"])
def test_weights_load_under_other_priors(
    make_detector: Callable[..., Any], shaped: Path, tmp_path: Path, name: str
) -> None:
    """A ``.weights`` file knows no priors: what is loaded gives the same raw maps, and other boxes."""
    author = make_detector(name, "width=0.125", "num_classes=1")
    darknet.save(author, tmp_path / "author.weights")
    weights = f"detector.weights={tmp_path / 'author.weights'}"
    config = fitted(config_of(shaped, name, "detector.fit_anchors=true", "detector.width=0.125", weights))
    ours = build(config["detector"])
    assert not torch.equal(ours.priors, author.priors)
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for mine, theirs in zip(ours.eval().raw_maps(images), author.eval().raw_maps(images), strict=True):
            assert torch.equal(mine, theirs)
        assert not torch.equal(ours(images).boxes, author(images).boxes)
