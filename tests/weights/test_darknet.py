import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from onestage.errors import InputError
from onestage.weights import darknet

Make = Callable[..., Any]


@pytest.fixture
def small(make_detector: Make) -> Any:
    """yolov3-tiny of one class at an eighth of its width: 13 convolutions."""
    return make_detector("yolov3_tiny", "width=0.125", "num_classes=1")


def num_floats(detector: Any) -> int:
    return sum(v.numel() for k, v in detector.state_dict().items() if k != "seen" and "num_batches" not in k)


def write(
    path: Path, detector: Any, *, version: tuple[int, int, int] = (0, 2, 0), seen: int = 0, more: int = 0
) -> Path:
    """A file whose floats are 0.0, 1.0, 2.0, … : as many as ``detector`` needs, and ``more``."""
    header = struct.pack("<iii", *version) + struct.pack("<Q" if version >= (0, 2) else "<I", seen)
    path.write_bytes(header + np.arange(num_floats(detector) + more, dtype="<f4").tobytes())
    return path


def test_reading_and_writing_a_foreign_file_keeps_every_byte_of_the_layers(
    make_detector: Make, tiny_weights: Path, shared: Path, tmp_path: Path
) -> None:
    facts = json.loads((shared / "refs" / "facts" / "yolov3-tiny.json").read_text())
    detector = make_detector("yolov3_tiny")
    darknet.load(detector, tiny_weights)
    darknet.save(detector, tmp_path / "again.weights")
    first, again = tiny_weights.read_bytes(), (tmp_path / "again.weights").read_bytes()
    assert len(again) == facts["file_bytes"]
    assert again[12:] == first[12:]  # seen and all floats; the revision before them is ours
    assert struct.unpack("<ii", again[:8]) == (0, 2)
    assert int(detector.seen) == 32_013_312


def test_writing_and_reading_gives_the_same_detector(small: Any, make_detector: Make, tmp_path: Path) -> None:
    small.seen.fill_(2**40)
    small(torch.rand(4, 3, 64, 64))  # moves the statistics of batch norm from where they are born
    darknet.save(small, tmp_path / "small.weights")
    other = make_detector("yolov3_tiny", "width=0.125", "num_classes=1", f"weights={tmp_path}/small.weights")
    mine = {k: v for k, v in small.state_dict().items() if "num_batches" not in k}
    assert int(other.seen) == 2**40
    assert all(torch.equal(other.state_dict()[name], value) for name, value in mine.items())
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(other.eval()(images).boxes, small.eval()(images).boxes)


def test_a_convolution_is_biases_scales_means_variances_then_weights(small: Any, tmp_path: Path) -> None:
    darknet.load(small, write(tmp_path / "counted.weights", small))
    convolution, norm = small.backbone.fine[0][0], small.backbone.fine[0][1]  # 3 to 8 channels
    assert norm.bias.tolist() == list(range(8))
    assert norm.weight.tolist() == list(range(8, 16))
    assert norm.running_mean.tolist() == list(range(16, 24))
    assert norm.running_var.tolist() == list(range(24, 32))
    assert convolution.weight.flatten().tolist() == list(range(32, 32 + 8 * 3 * 3 * 3))


def test_the_last_convolution_is_the_finest_heads_biases_then_weights(small: Any, tmp_path: Path) -> None:
    darknet.load(small, write(tmp_path / "counted.weights", small))
    last, end = small.head.out[0], num_floats(small)
    num_weights = last.weight.numel()
    assert last.weight.flatten().tolist() == list(range(end - num_weights, end))
    assert last.bias.tolist() == list(range(end - num_weights - 18, end - num_weights))


@pytest.mark.parametrize(
    ("version", "seen"), [((0, 1, 0), 3_000_000_000), ((0, 2, 0), 2**40), ((0, 2, 5), 64), ((1, 0, 0), 2**40)]
)
def test_seen_is_of_four_bytes_before_version_0_2_and_of_eight_from_then_on(
    small: Any, tmp_path: Path, version: tuple[int, int, int], seen: int
) -> None:
    darknet.load(small, write(tmp_path / "counted.weights", small, version=version, seen=seen))
    assert int(small.seen) == seen
    assert small.backbone.fine[0][1].bias.tolist() == list(range(8))


def test_a_file_that_is_too_short_is_refused_with_how_much_and_where(small: Any, tmp_path: Path) -> None:
    path, needed = write(tmp_path / "short.weights", small, more=-1), num_floats(small)
    with pytest.raises(InputError) as error:
        darknet.load(small, path)
    assert str(error.value) == (
        f"detector.weights: {path} holds {needed - 1:,} floats, the detector needs {needed:,}: "
        "1 too few, short at convolution 13 of 13"
    )


@pytest.mark.parametrize(
    ("num_values", "convolution"),
    # 8 channels from 3: 248 floats; 8 from 8: 608; 8 from 8 again, and 16 from 8: 1216
    [(0, 1), (247, 1), (248, 2), (248 + 607, 2), (248 + 608, 3)],
)
def test_a_cut_is_told_at_the_convolution_where_it_is(
    small: Any, tmp_path: Path, num_values: int, convolution: int
) -> None:
    path = write(tmp_path / "cut.weights", small)
    path.write_bytes(path.read_bytes()[: 20 + 4 * num_values])
    with pytest.raises(
        InputError, match=rf"{num_floats(small) - num_values:,} too few, .* convolution {convolution} of"
    ):
        darknet.load(small, path)


def test_a_file_that_is_too_long_is_refused_with_how_much(small: Any, tmp_path: Path) -> None:
    path, needed = write(tmp_path / "long.weights", small, more=7), num_floats(small)
    with pytest.raises(InputError) as error:
        darknet.load(small, path)
    assert str(error.value) == (
        f"detector.weights: {path} holds {needed + 7:,}.00 floats, the detector needs {needed:,}: "
        "7.00 too many after convolution 13, the last"
    )


def test_a_part_of_a_float_at_the_end_is_refused(small: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "odd.weights", small)
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(InputError, match=r"0.25 too many"):
        darknet.load(small, path)


@pytest.mark.parametrize(("version", "num_bytes"), [((0, 2, 0), 19), ((0, 2, 0), 16), ((0, 1, 0), 15), ((0, 2, 0), 0)])
def test_less_than_a_header_is_refused(
    small: Any, tmp_path: Path, version: tuple[int, int, int], num_bytes: int
) -> None:
    path = write(tmp_path / "stump.weights", small, version=version)
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(InputError, match=rf"stump.weights has {num_bytes} bytes, less than a Darknet header"):
        darknet.load(small, path)


@pytest.mark.parametrize("name", ["missing.weights", "."])
def test_a_file_that_is_not_there_is_refused_with_its_path(small: Any, tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError) as error:
        darknet.load(small, tmp_path / name)
    assert str(error.value) == f"detector.weights: no file {tmp_path / name}"


def test_another_number_of_classes_does_not_fit(small: Any, make_detector: Make, tmp_path: Path) -> None:
    darknet.save(small, tmp_path / "one_class.weights")
    with pytest.raises(InputError, match=r"too few, short at convolution \d+ of 13"):
        darknet.load(make_detector("yolov3_tiny", "width=0.125", "num_classes=2"), tmp_path / "one_class.weights")
