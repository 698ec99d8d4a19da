"""The benchmark of the data: that each contestant does the same work, and that the report's figures follow from it."""

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from onestage.bench import data
from onestage.cli import main
from onestage.config import build
from onestage.data.formats.record import Record, Source
from onestage.data.pack import pack
from onestage.data.scenes import draw
from onestage.errors import InputError

STEPS = ["read", "decode", "placement", "flip", "colour", "collate"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve of the drawn pictures, in four shards."""
    folder = tmp_path_factory.mktemp("bench")
    records = []
    for number, (content, fields) in enumerate(data._drawn(12)):
        (folder / f"{number}.jpg").write_bytes(content)
        records.append(Record(path=folder / f"{number}.jpg", **fields))
    pack(Source("bench", ("thing",), {"train": records}, []), folder / "dataset", samples_per_shard=3)
    return folder / "dataset"


def test_drawn_pictures_are_as_large_as_cocos() -> None:
    """COCO's train2017 has 118,287 images in 19.3 GB: 163 kB each."""
    pictures = list(data._drawn(24))
    sizes = [len(content) for content, _ in pictures]
    assert 140_000 < np.mean(sizes) < 190_000
    assert np.std(sizes) > 10_000
    for content, fields in pictures:
        pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
        assert pixels.shape == (480, 640, 3)
        assert pixels.std() > 30
        assert len(fields["boxes"]) == len(fields["labels"]) == 7
        left, top, right, bottom = np.array(fields["boxes"]).T
        assert ((left >= 0) & (left < right) & (right <= 640) & (top >= 0) & (top < bottom) & (bottom <= 480)).all()


def test_drawn_pictures_are_equal_in_every_run() -> None:
    assert list(data._drawn(3)) == list(data._drawn(3))
    assert len({content for content, _ in data._drawn(3)}) == 3


def test_rougher_pictures_make_larger_files() -> None:
    sizes = [
        len(cv2.imencode(".jpg", data.picture(np.random.default_rng(1), roughness=roughness))[1])
        for roughness in (0.5, 0.7, 0.9)
    ]
    assert sizes[0] < 0.7 * sizes[1] < 0.5 * sizes[2]


@pytest.mark.parametrize("name", data.DECODERS)
def test_decoders_give_the_picture(name: str) -> None:
    """Pillow's is the reference; the others' libraries round and upsample a little differently."""
    ((content, _),) = data._drawn(1)
    pixels = np.asarray(data.DECODERS[name](content))
    expected = data.DECODERS["pillow"](content)
    assert np.abs(pixels.astype(int) - np.asarray(expected).astype(int)).mean() < 1.0


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_and_webdataset_go_once_over_all_pictures(
    packed: Path, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []

    def tally(batches: Iterable[int], *, num_workers: int) -> float:
        counted.append(sum(batches))
        return 1.0

    monkeypatch.setattr(data, "_per_core", tally)
    data._load(data._data(packed, num_workers=num_workers), epochs=count())
    data._webdataset(packed, [416, 416], num_workers=num_workers)
    assert counted == [12, 12]


def test_the_recipe_is_yolov3s(packed: Path) -> None:
    config = data._data(packed, num_workers=0)
    assert config["input_size"] == [416, 416]
    assert list(config["augment"]) == ["placement", "flip", "colour"]
    batch = next(iter(build(config).train_dataloader()))
    assert batch.images.shape == (8, 3, 416, 416)
    assert batch.images.dtype == torch.uint8
    assert batch.colour is None


def test_colour_is_left_to_the_device(packed: Path) -> None:
    batch = next(iter(build(data._data(packed, num_workers=0, colour_on_device=True)).train_dataloader()))
    assert batch.colour is not None
    assert batch.colour.shape == (8, 3)


def test_webdatasets_transforms_do_the_like() -> None:
    torch.manual_seed(3)
    pixels = np.zeros((480, 640, 3), np.uint8)
    pixels[100:400, 200:500] = (0, 255, 0)
    truth = {"boxes": [[200, 100, 500, 400]], "labels": [5]}
    transforms = data._transforms([416, 416])
    drawn = [data._transformed(transforms, (Image.fromarray(pixels), truth)) for _ in range(20)]
    widths = set()
    for image, target in drawn:
        assert image.shape == (3, 416, 416)
        assert image.dtype == torch.uint8
        ((left, top, right, bottom),) = target["boxes"].tolist()
        assert 0 <= left < right <= 416 and 0 <= top < bottom <= 416
        assert target["labels"].tolist() == [5]
        inside = image[:, int(top) + 3 : int(bottom) - 3, int(left) + 3 : int(right) - 3].float()
        assert (inside.amax(dim=0) - inside.amin(dim=0)).min() > 50  # coloured, where all around is grey
        widths.add(round(right - left))
    assert len(widths) > 5


def test_steps_are_the_recipes_and_draw_nothing_from_the_generator(packed: Path) -> None:
    state = torch.get_rng_state()
    steps = data._steps(data._data(packed, num_workers=0))
    assert list(steps) == [f"ms/{step}" for step in STEPS]
    assert all(value > 0 for value in steps.values())
    assert steps["ms/decode"] > steps["ms/read"]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("num_workers", "expected"), [(0, 20 / 8), (2, 4 / 2 / 2)])
def test_rates_of_workers_start_when_all_have_delivered(
    num_workers: int, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches come at 3, 6 and 8 seconds, and hold 8, 8 and 4 images."""
    now = [0.0]

    def batches() -> Iterator[int]:
        for moment, num_images in ((3.0, 8), (6.0, 8), (8.0, 4)):
            now[0] = moment
            yield num_images

    monkeypatch.setattr(data.time, "perf_counter", lambda: now[0])
    assert data._per_core(batches(), num_workers=num_workers) == expected


def rounds() -> list[dict[str, float]]:
    """Three rounds, the second on a machine half as fast."""
    rates = {"simplejpeg": 400.0, "opencv": 300.0, "pillow": 100.0}
    rates |= {"loader": 200.0, "loader_colour_on_device": 280.0, "webdataset": 40.0, "packing": 2000.0}
    rates |= {"resize": 240.0, "resize_colour_on_device": 320.0}
    slow = {name: rate / 2 for name, rate in rates.items()}
    times = {f"ms/{step}": float(number) for number, step in enumerate(STEPS)}
    return [rates | times, slow | times, {**rates, "loader": 100.0} | times]


def test_shares_are_taken_within_a_round() -> None:
    """By hand: the loader is at 200, 100 and 100 images/s, beside 400, 200 and 400 of the bare decoder."""
    summary = data.summary(rounds())
    assert summary["decoder"] == "simplejpeg"
    assert summary["images_per_s"]["loader"] == {"median": 100.0, "min": 100.0, "max": 200.0}
    assert summary["of_decoding"] == {
        "loader": {"median": 0.5, "min": 0.25, "max": 0.5},
        "loader_colour_on_device": {"median": 0.7, "min": 0.7, "max": 0.7},
        "resize": {"median": 0.6, "min": 0.6, "max": 0.6},
        "resize_colour_on_device": {"median": 0.8, "min": 0.8, "max": 0.8},
        "webdataset": {"median": 0.1, "min": 0.1, "max": 0.1},
    }
    assert summary["loader_of_webdataset"] == {"median": 5.0, "min": 2.5, "max": 5.0}
    assert summary["ms_per_image"] == {step: number for number, step in enumerate(STEPS)}


def test_the_fastest_decoder_is_the_measure() -> None:
    measured = [{**one, "opencv": 800.0} for one in rounds()]
    summary = data.summary(measured)
    assert summary["decoder"] == "opencv"
    assert summary["of_decoding"]["loader"] == {"median": 0.125, "min": 0.125, "max": 0.25}


def test_the_page_says_what_was_measured_and_how() -> None:
    report = {
        "command": "onestage bench data --num-workers 0 --seconds 60",
        "date": "2030-01-31",
        "machine": "a processor, 2 cores",
        "versions": {"simplejpeg": "1.9", "webdataset": "1.0"},
        "dataset": "drawn",
        "images": 192,
        "image_bytes": 163_499,
        "num_workers": 0,
        "rounds": 3,
        **data.summary(rounds()),
    }
    lines = data.markdown(report).splitlines()
    assert "192 640×480 JPEGs drawn for it, 163 kB on average, in 3 rounds in which all take their turn." in lines
    assert "- versions: simplejpeg 1.9, webdataset 1.0" in lines
    assert "- our loader against webdataset: 5.00 (2.50 to 5.00) times as fast" in lines
    assert "| our loader, augment=yolov3 | 100 (100 to 200) | 0.50 (0.25 to 0.50) |" in lines
    assert "| packing into shards | 2,000 (1,000 to 2,000) |  |" in lines
    head, _, times = lines[-3:]
    assert head == "| read | decode | placement | flip | colour | collate |"
    assert times == "| 0.000 | 1.000 | 2.000 | 3.000 | 4.000 | 5.000 |"


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: Callable[[int], Iterator[tuple[bytes, dict[str, Any]]]] = data._drawn
    monkeypatch.setattr(data, "_drawn", lambda num_images: islice(drawn(num_images), 4))


@pytest.mark.usefixtures("few")
def test_one_object_of_json_and_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads(), cv2.getNumThreads()
    page = tmp_path / "docs" / "data.md"
    assert main(["bench", "data", "--seconds", "0", "--json", "--out", str(page)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["command"] == "onestage bench data --num-workers 0 --seconds 0"
    assert (report["images"], report["rounds"], report["dataset"]) == (4, 3, "drawn")
    assert report["image_bytes"] == pytest.approx(np.mean([len(content) for content, _ in data._drawn(4)]), abs=1)
    assert set(report["images_per_s"]) == set(data.NAMES)
    assert all(0 < rate["min"] <= rate["median"] <= rate["max"] for rate in report["images_per_s"].values())
    assert list(report["ms_per_image"]) == STEPS
    assert page.read_text() == data.markdown(report)
    assert (torch.get_num_threads(), cv2.getNumThreads()) == before


def test_a_datasets_own_pictures(tmp_path: Path) -> None:
    draw(tmp_path / "digits", seed=1, num_train=7, num_val=1, num_test=1, size=96)
    report = data.bench(data=str(tmp_path / "digits"), seconds=0, num_images=5)
    assert (report["dataset"], report["images"]) == ("digits", 5)
    assert report["image_bytes"] < 10_000
    assert report["command"].endswith(f"--data {tmp_path / 'digits'}")


def test_a_dataset_without_jpegs_is_refused(tmp_path: Path) -> None:
    """One picture is a PNG, the other a JPEG that is cut short."""
    Image.new("RGB", (40, 30)).save(tmp_path / "image.png")
    ((content, _),) = data._drawn(1)
    (tmp_path / "cut.jpg").write_bytes(content[:5000])
    records = [Record(tmp_path / name, 40, 30, [], [], [], [], name) for name in ("image.png", "cut.jpg")]
    pack(Source("none", ("thing",), {"train": records}, []), tmp_path / "none")
    with pytest.raises(InputError, match="has no JPEG in its train split: without --data, pictures are drawn"):
        data.bench(data=str(tmp_path / "none"), seconds=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_workers": -1}, "--num-workers must be from 0 to the .* got -1"),
        ({"num_workers": 100_000}, "--num-workers must be from 0 to the .* got 100000"),
        ({"seconds": -1.0}, "--seconds must be 0 or more, got -1"),
        ({"seconds": float("nan")}, "--seconds must be 0 or more, got nan"),
        ({"data": "/nowhere"}, "no dataset folder at /nowhere"),
    ],
)
def test_refuses_what_cannot_be_measured(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        data.bench(**settings)
