"""How fast pictures become batches: bare decoding, the loader, and webdataset as its README uses it, in one run.

All take turns, round after round, so that whatever else the machine does hits them alike. Rates are of one core: of a
single thread, or of one of ``num_workers`` processes.
"""

import io
import json
import math
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from functools import partial
from importlib.metadata import version
from itertools import count
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory
from typing import Any, Final, cast

import cv2
import numpy as np
import simplejpeg
import torch
import webdataset as wds
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from onestage.bench.detectors import machine
from onestage.config import build, compose
from onestage.data import images
from onestage.data.formats.record import Box, Record, Source
from onestage.data.manifest import Manifest
from onestage.data.pack import pack
from onestage.data.samples import collate, decode
from onestage.data.shards import ShardReader
from onestage.errors import InputError

NUM_IMAGES: Final = 96
MIN_ROUNDS: Final = 3
BATCH_SIZE: Final = 8
WIDTH_PX: Final = 640
HEIGHT_PX: Final = 480
JPEG_QUALITY: Final = 92
ROUGHNESS: Final = (0.7, 0.9)
"""What each octave of finer detail keeps of the contrast: with these, files are as large as COCO's on average."""
PACKED_TIMES: Final = 4
"""Each picture, in the measurement of packing: a dataset's few fixed costs are shared by more of them in earnest."""
NUM_BOXES: Final = 7
"""On a drawn picture; COCO has 7.3 on average."""
LIBRARIES: Final = ("simplejpeg", "opencv-python-headless", "torchvision", "pillow", "webdataset")
NAMES: Final = {
    "simplejpeg": "decoding alone: simplejpeg",
    "opencv": "decoding alone: OpenCV",
    "pillow": "decoding alone: Pillow",
    "loader": "our loader, augment=yolov3",
    "loader_colour_on_device": "the same, colour left to the training device",
    "resize": "our loader: resize, flip, colour",
    "resize_colour_on_device": "the same, colour left to the training device",
    "webdataset": "webdataset as its README uses it, with torchvision's transforms",
    "packing": "packing into shards",
}

Pixels = NDArray[np.uint8]
Turn = Callable[[], float]
"""Goes over all pictures once: images/s of one core."""


def bench(
    *, data: str | None = None, num_workers: int = 0, seconds: float = 60.0, num_images: int = NUM_IMAGES
) -> dict[str, Any]:
    """Measures for about ``seconds``, but at least ``MIN_ROUNDS`` rounds after one to warm up.

    The pictures are the first JPEGs, ``num_images`` at most, of the train split of ``data``, or are drawn here.
    """
    from rich.console import Console
    from rich.progress import Progress

    _check(num_workers=num_workers, seconds=seconds)
    manifest = None if data is None else Manifest.load(data)
    with (
        TemporaryDirectory(prefix="onestage-bench-") as name,
        _one_thread(),
        Progress(console=Console(stderr=True), transient=True) as bar,
    ):
        folder = Path(name)
        pictures = _drawn(num_images) if manifest is None else _stored(str(data), manifest, num_images)
        task = bar.add_task("pictures", total=num_images)
        records: list[Record] = []
        for content, fields in pictures:
            path = folder / f"{len(records):06d}.jpg"
            path.write_bytes(content)
            records.append(Record(path=path, **fields))
            bar.advance(task)
        if not records:
            raise InputError(f"{data} has no JPEG in its train split: without --data, pictures are drawn")
        classes = ("thing",) if manifest is None else manifest.classes
        source = Source(name="bench", classes=classes, splits={"train": records}, findings=[])
        # webdataset deals out whole shards: each worker must get as many.
        pack(source, folder / "dataset", samples_per_shard=math.ceil(len(records) / (2 * max(1, num_workers))))
        bar.update(task, description="measuring", total=seconds, completed=0)
        rounds = _rounds(
            source, folder, num_workers=num_workers, seconds=seconds, tell=lambda past: bar.update(task, completed=past)
        )
        image_bytes = fmean(record.path.stat().st_size for record in records)
    asked = ["--num-workers", str(num_workers), "--seconds", f"{seconds:g}"]
    if data is not None:
        asked += ["--data", data]
    return {
        "command": shlex.join(["onestage", "bench", "data", *asked]),
        "date": date.today().isoformat(),
        "machine": machine(),
        "versions": {library: version(library) for library in LIBRARIES},
        "dataset": "drawn" if manifest is None else manifest.name,
        "images": len(records),
        "image_bytes": round(image_bytes),
        "num_workers": num_workers,
        "rounds": len(rounds),
        **summary(rounds),
    }


def _check(*, num_workers: int, seconds: float) -> None:
    from onestage.data.threads import num_cores

    if not 0 <= num_workers <= num_cores():
        raise InputError(f"--num-workers must be from 0 to the {num_cores()} cores there are, got {num_workers}")
    if not 0 <= seconds < math.inf:
        raise InputError(f"--seconds must be 0 or more, got {seconds}")


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        cv2.setNumThreads(before[1])


def _drawn(num_images: int) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """JPEG files and the other fields of their records: equal in every run."""
    for index in range(num_images):
        generator = np.random.default_rng(index)
        pixels = picture(generator, roughness=generator.uniform(*ROUGHNESS))
        _, content = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
        yield content.tobytes(), _fields(_boxes(generator), [0] * NUM_BOXES, width=WIDTH_PX, height=HEIGHT_PX)


def picture(generator: np.random.Generator, *, roughness: float) -> Pixels:
    """Clouds of light and shade (480, 640, 3) RGB: coarse forms, on them finer ones, each fainter by ``roughness``.

    A photograph's spectrum falls off so, and as its file grows with what is left of the finest, so does this one's.
    """
    light = np.zeros((1, 1), np.float32)
    contrast, width, height = 55.0, 5, 4
    while width < WIDTH_PX:
        light = cast(NDArray[np.float32], cv2.resize(light, (width, height)))
        light += np.float32(contrast) * generator.standard_normal(light.shape, dtype=np.float32)
        contrast, width, height = contrast * roughness, 2 * width, 2 * height
    light = cast(NDArray[np.float32], cv2.resize(light, (WIDTH_PX, HEIGHT_PX), interpolation=cv2.INTER_CUBIC))
    light += np.float32(contrast) * generator.standard_normal(light.shape, dtype=np.float32)
    tints = generator.uniform(-40, 40, (12, 16, 3)).astype(np.float32)
    tint = cv2.resize(tints, (WIDTH_PX, HEIGHT_PX), interpolation=cv2.INTER_CUBIC)
    bright = tint + light[..., None] + np.float32(generator.uniform(90, 160))
    return np.asarray(np.clip(bright, 0, 255), np.uint8)


def _boxes(generator: np.random.Generator) -> list[Box]:
    starts = generator.uniform(0, [WIDTH_PX - 64, HEIGHT_PX - 64], (NUM_BOXES, 2))
    ends = np.minimum(starts + generator.uniform(16, 256, (NUM_BOXES, 2)), [WIDTH_PX, HEIGHT_PX])
    return [(left, top, right, bottom) for left, top, right, bottom in np.hstack([starts, ends]).round(1).tolist()]


def _fields(boxes: Sequence[Box], labels: Sequence[int], *, width: int, height: int) -> dict[str, Any]:
    unset = [False] * len(boxes)
    size = {"width": width, "height": height}
    return size | {"boxes": boxes, "labels": labels, "difficult": unset, "crowd": unset, "source": ""}


def _stored(data: str, manifest: Manifest, num_images: int) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Like ``_drawn``: the first JPEGs of a dataset that can be decoded."""
    reader = ShardReader(data, "train", manifest=manifest)
    found = 0
    keys = manifest.split("train").keys()
    for key in keys:
        raw = reader.read(key)
        content = raw.get("jpg", raw.get("jpeg"))
        if content is None or images.decode(content) is None:
            continue
        truth = json.loads(raw["json"])
        fields = _fields(truth["boxes"], truth["labels"], width=truth["width"], height=truth["height"])
        yield content, {**fields, "orientation": truth.get("orientation", 1)}
        found += 1
        if found == num_images:
            return


def _rounds(
    source: Source, folder: Path, *, num_workers: int, seconds: float, tell: Callable[[float], None]
) -> list[dict[str, float]]:
    """What each round measured: images/s of one core by name, and ``ms/`` an image of each step of the loader's."""
    contents = [record.path.read_bytes() for record in source.splits["train"]]
    data = _data(folder / "dataset", num_workers=num_workers)
    turns: dict[str, Turn] = {name: partial(_decode, one, contents) for name, one in DECODERS.items()}
    for name, resize in (("loader", False), ("resize", True)):
        for suffix, on_device in (("", False), ("_colour_on_device", True)):
            loaded = _data(folder / "dataset", num_workers=num_workers, resize=resize, colour_on_device=on_device)
            turns[name + suffix] = partial(_load, loaded, epochs=count())
    turns["webdataset"] = partial(_webdataset, folder / "dataset", data["input_size"], num_workers=num_workers)
    turns["packing"] = partial(_pack, source, folder / "again")
    start = time.perf_counter()
    rounds: list[dict[str, float]] = []
    for number in count():
        measured = {name: turn() for name, turn in turns.items()} | _steps(data)
        past = time.perf_counter() - start
        tell(past)
        if number == 0:
            start = time.perf_counter()  # everything is loaded, and every file in memory
        else:
            rounds.append(measured)
            if number >= MIN_ROUNDS and past >= seconds:
                return rounds
    raise AssertionError("counting has no end")


def _simplejpeg(content: bytes) -> object:
    return simplejpeg.decode_jpeg(content)


def _opencv(content: bytes) -> object:
    return cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB)


def _pillow(content: bytes) -> object:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


DECODERS: Final = {"simplejpeg": _simplejpeg, "opencv": _opencv, "pillow": _pillow}
"""Well-kept libraries' own: torchvision's is deprecated since 0.29."""


def _decode(decoder: Callable[[bytes], object], contents: Sequence[bytes]) -> float:
    start = time.perf_counter()
    for content in contents:
        decoder(content)
    return len(contents) / (time.perf_counter() - start)


def _data(root: Path, *, num_workers: int, resize: bool = False, colour_on_device: bool = False) -> dict[str, Any]:
    """The config of the data of a YOLOv3's training; with ``resize`` a plain one takes the place of the random one."""
    data: dict[str, Any] = compose("train", ["detector=yolov3", "augment=yolov3"])["data"]
    if resize:
        node = {"_target_": "onestage.data.transforms.Resize", "size": data["input_size"]}
        data["augment"] = {"resize": node} | {k: v for k, v in data["augment"].items() if k != "placement"}
    if colour_on_device:
        data["augment"]["colour"]["on_device"] = True
    return data | {"root": str(root), "num_workers": num_workers, "batch_size": BATCH_SIZE}


def _load(data: Mapping[str, Any], *, epochs: Iterator[int]) -> float:
    loader = build(data).train_dataloader()
    loader.set_epoch(next(epochs))
    return _per_core((len(batch) for batch in loader), num_workers=data["num_workers"])


def _webdataset(root: Path, input_size: Sequence[int], *, num_workers: int) -> float:
    """Its README's pipeline, on Pillow's images: torchvision's kernels for tensors are a quarter slower still."""
    shards = [str(path) for path in sorted(root.glob("*.tar"))]
    dataset = (
        wds.WebDataset(shards, shardshuffle=100)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "json")
        .map(partial(_transformed, _transforms(input_size)))
        .batched(BATCH_SIZE, collation_fn=_stacked)
    )
    loader = wds.WebLoader(dataset, batch_size=None, num_workers=num_workers)
    return _per_core((len(targets) for _, targets in loader), num_workers=num_workers)


def _transforms(input_size: Sequence[int]) -> Callable[..., tuple[Tensor, Any]]:
    """What torchvision has that is most like the recipe: random scale and place, flip, colour."""
    size = tuple(input_size)
    transforms: Callable[..., tuple[Tensor, Any]] = v2.Compose(
        [
            v2.ScaleJitter(size, scale_range=(0.75, 1.33)),
            v2.RandomCrop(size, pad_if_needed=True, fill=128),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(brightness=0.5, saturation=0.5, hue=0.1),
            v2.ToImage(),
            v2.SanitizeBoundingBoxes(min_size=2),
        ]
    )
    return transforms


def _transformed(
    transforms: Callable[..., tuple[Tensor, Any]], sample: tuple[Image.Image, dict[str, Any]]
) -> tuple[Tensor, Any]:
    image, truth = sample
    boxes = torch.tensor(truth["boxes"]).reshape(-1, 4)
    size = (image.height, image.width)
    format_ = tv_tensors.BoundingBoxFormat.XYXY
    target = {
        "boxes": tv_tensors.BoundingBoxes(boxes, format=format_, canvas_size=size),
        "labels": torch.tensor(truth["labels"]),
    }
    return transforms(image, target)


def _stacked(samples: Sequence[tuple[Tensor, Any]]) -> tuple[Tensor, list[Any]]:
    return torch.stack([image for image, _ in samples]), [target for _, target in samples]


def _per_core(batches: Iterable[int], *, num_workers: int) -> float:
    """Images/s of one worker, given each batch's number of images; workers are given a batch each to start."""
    start = time.perf_counter()
    done = 0
    for number, num_images in enumerate(batches, start=1):
        if number <= num_workers:
            start = time.perf_counter()
        else:
            done += num_images
    return done / (time.perf_counter() - start) / max(1, num_workers)


def _pack(source: Source, out: Path) -> float:
    more = replace(source, splits={"train": source.splits["train"] * PACKED_TIMES})
    start = time.perf_counter()
    manifest = pack(more, out, num_workers=1, overwrite=True)
    return manifest.split("train").num_samples / (time.perf_counter() - start)


def _steps(data: Mapping[str, Any]) -> dict[str, float]:
    """Milliseconds an image that the loader's steps take: its own code, one step after the other."""
    manifest = Manifest.load(data["root"])
    split = manifest.split("train")
    reader = ShardReader(data["root"], "train", manifest=manifest)
    transforms = {name: build(node) for name, node in data["augment"].items() if node is not None}
    spent = dict.fromkeys(["read", "decode", *transforms, "collate"], 0.0)
    reader.read(split.keys()[0])  # the index of a shard is made once

    def timed(step: str, call: Callable[..., Any], *arguments: Any, **settings: Any) -> Any:
        start = time.perf_counter()
        result = call(*arguments, **settings)
        spent[step] += time.perf_counter() - start
        return result

    def samples(keys: Sequence[str]) -> Iterator[Any]:
        for key in keys:
            sample = timed("decode", decode, timed("read", reader.read, key), num_classes=len(manifest.classes))
            for name, transform in transforms.items():
                sample = timed(name, transform, sample)
            yield sample

    keys = split.keys()
    with torch.random.fork_rng(devices=[]):
        for first in range(0, len(keys), BATCH_SIZE):
            batch = list(samples(keys[first : first + BATCH_SIZE]))
            timed("collate", collate, batch, size=data["input_size"], global_images=len(batch))
    return {f"ms/{step}": 1000 * seconds / len(keys) for step, seconds in spent.items()}


def summary(rounds: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Medians and extremes over the rounds; shares are of the decoder that is fastest, each within its round."""
    rates = {name: [measured[name] for measured in rounds] for name in NAMES}
    decoder = max(DECODERS, key=lambda name: median(rates[name]))
    steps = {name.removeprefix("ms/"): [one[name] for one in rounds] for name in rounds[0] if name.startswith("ms/")}

    def ratios(name: str, other: str) -> dict[str, float]:
        return _spread([one / by for one, by in zip(rates[name], rates[other], strict=True)])

    return {
        "images_per_s": {name: _spread(values) for name, values in rates.items()},
        "decoder": decoder,
        "of_decoding": {name: ratios(name, decoder) for name in NAMES if name not in ("packing", *DECODERS)},
        "loader_of_webdataset": ratios("loader", "webdataset"),
        "ms_per_image": {name: median(values) for name, values in steps.items()},
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def markdown(report: Mapping[str, Any]) -> str:
    """The report of ``bench`` as a page with a table."""
    decoder = report["decoder"]
    drawn = report["dataset"] == "drawn"
    pictures = f"{WIDTH_PX}×{HEIGHT_PX} JPEGs drawn for it" if drawn else f"JPEGs of {report['dataset']}"
    workers = f"each of {report['num_workers']} loader processes" if report["num_workers"] else "a single thread"
    against = report["loader_of_webdataset"]
    lines = [
        "# Data",
        "",
        f"{report['images']} {pictures}, {report['image_bytes'] / 1000:.0f} kB on average, in {report['rounds']} rounds"
        " in which all take their turn.",
        f"Rates are of {workers}, shares of the bare decoding by {decoder}: medians, and from lowest to highest.",
        "",
        f"- command: `{report['command']}`",
        f"- machine: {report['machine']}",
        f"- versions: {', '.join(f'{name} {number}' for name, number in report['versions'].items())}",
        f"- date: {report['date']}",
        f"- our loader against webdataset: {against['median']:.2f} ({against['min']:.2f} to {against['max']:.2f})"
        " times as fast",
        "",
        "| what | images/s | share of decoding |",
        "| --- | --: | --: |",
        *(_row(name, report) for name in NAMES),
        "",
        "Milliseconds an image takes in the loader, step by step:",
        "",
        "| " + " | ".join(report["ms_per_image"]) + " |",
        "|" + " --: |" * len(report["ms_per_image"]),
        "| " + " | ".join(f"{value:.3f}" for value in report["ms_per_image"].values()) + " |",
        "",
    ]
    return "\n".join(lines)


def _row(name: str, report: Mapping[str, Any]) -> str:
    rate, share = report["images_per_s"][name], report["of_decoding"].get(name)
    cells = [NAMES[name], f"{rate['median']:,.0f} ({rate['min']:,.0f} to {rate['max']:,.0f})"]
    cells.append("" if share is None else f"{share['median']:.2f} ({share['min']:.2f} to {share['max']:.2f})")
    return "| " + " | ".join(cells) + " |"
