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
        f"detector.weights: {path} holds {needed + 7:,} floats, the detector needs {needed:,}: "
        "7 too many after convolution 13, the last"
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


# Connected and local layers


@pytest.fixture
def yolov1(make_detector: Make) -> Any:
    """yolov1_darknet of one class, 24 convolutions, a local layer (32 of 128 channels) and a connected one."""
    return make_detector("yolov1_darknet", "width=0.125", "num_classes=1", "input_size=[64,128]")


def test_a_local_layer_is_biases_then_weights_place_by_place(yolov1: Any, tmp_path: Path) -> None:
    darknet.load(yolov1, write(tmp_path / "counted.weights", yolov1))
    local, out, end = yolov1.hidden[0], yolov1.out, num_floats(yolov1)
    start = end - out.weight.numel() - out.bias.numel() - local.weight.numel() - local.bias.numel()
    assert start + end < 2**24  # so that every number is a float32
    assert local.bias.shape == (32, 1, 2)
    assert local.bias.flatten().tolist() == list(range(start, start + 64))
    start += 64
    assert local.weight.shape == (2, 32, 128 * 3 * 3)
    assert local.weight.flatten().tolist() == list(range(start, start + 2 * 32 * 128 * 9))


def test_a_connected_layer_is_biases_then_a_row_of_weights_for_each_output(yolov1: Any, tmp_path: Path) -> None:
    darknet.load(yolov1, write(tmp_path / "counted.weights", yolov1))
    end, num_outputs, num_inputs = num_floats(yolov1), 2 * (1 + 3 * 5), 32 * 1 * 2
    start = end - num_outputs * num_inputs
    assert yolov1.out.bias.tolist() == list(range(start - num_outputs, start))
    assert yolov1.out.weight[0].tolist() == list(range(start, start + num_inputs))
    assert yolov1.out.weight[-1, -1] == end - 1


class Connected:
    """A detector of one connected layer with batch norm, which none of ours has but Darknet's files may."""

    num_classes = 1

    def __init__(self) -> None:
        self.seen = torch.zeros((), dtype=torch.int64)
        self.layer = torch.nn.Sequential(torch.nn.Linear(2, 3, bias=False), torch.nn.BatchNorm1d(3))

    def darknet_layers(self) -> list[torch.nn.Module]:
        return [self.layer]

    def darknet_outputs(self) -> list[tuple[torch.nn.Module, int]]:
        return []


def test_a_normalised_connected_layer_has_its_norm_behind_the_weights(tmp_path: Path) -> None:
    detector, path = Connected(), tmp_path / "counted.weights"
    path.write_bytes(struct.pack("<iiiQ", 0, 2, 0, 9) + np.arange(18, dtype="<f4").tobytes())
    darknet.load(detector, path)
    linear, norm = detector.layer
    assert norm.bias.tolist() == [0, 1, 2]
    assert linear.weight.tolist() == [[3, 4], [5, 6], [7, 8]]
    assert norm.weight.tolist() == [9, 10, 11]
    assert norm.running_mean.tolist() == [12, 13, 14]
    assert norm.running_var.tolist() == [15, 16, 17]
    assert int(detector.seen) == 9


@pytest.mark.parametrize(
    ("fewer", "place"),  # the last layer has 32 outputs of 64 inputs: 2080 floats
    [(1, "connected layer 26"), (2080, "connected layer 26"), (2081, "local layer 25"), (80_000, "convolution 24")],
)
def test_layers_of_other_kinds_are_told_by_their_kind(yolov1: Any, tmp_path: Path, fewer: int, place: str) -> None:
    with pytest.raises(InputError, match=rf"{fewer:,} too few, short at {place} of 26$"):
        darknet.load(yolov1, write(tmp_path / "short.weights", yolov1, more=-fewer))


@pytest.mark.parametrize("version", [(1001, 0, 0), (0, 1001, 0), (981668463, 1063675494, 974204142)])
def test_transposed_connected_layers_are_refused(small: Any, tmp_path: Path, version: tuple[int, int, int]) -> None:
    """The last is the learning rate, momentum and decay that the first of all files began with."""
    path = write(tmp_path / "old.weights", small, version=version)
    with pytest.raises(InputError) as error:
        darknet.load(small, path)
    assert str(error.value) == (
        f"detector.weights: {path} is no Darknet file, or of version {version[0]}.{version[1]}, whose connected layers "
        "are transposed: load and save it with a newer Darknet first"
    )


# Values


@pytest.mark.parametrize(
    ("at", "place"), [(0, "convolution 1"), (247, "convolution 1"), (248, "convolution 2"), (-1, "convolution 13")]
)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_values_that_are_not_finite_are_refused_and_nothing_is_loaded(
    small: Any, tmp_path: Path, at: int, place: str, value: float
) -> None:
    path, before = tmp_path / "broken.weights", {k: v.clone() for k, v in small.state_dict().items()}
    values = np.zeros(num_floats(small), "<f4")
    values[at] = value
    path.write_bytes(struct.pack("<iiiQ", 0, 2, 0, 5) + values.tobytes())
    with pytest.raises(InputError) as error:
        darknet.load(small, path)
    assert str(error.value) == f"detector.weights: {path} has values that are not finite in {place} of 13"
    assert all(torch.equal(small.state_dict()[name], value) for name, value in before.items())


# Files of another number of classes, and of the first layers alone


def state(detector: Any) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in detector.state_dict().items() if k != "seen" and "num_batches" not in k}


@pytest.mark.parametrize("name", ["yolov3_tiny", "yolov1_tiny", "yolov1_darknet"])
@pytest.mark.parametrize(("theirs", "ours"), [(4, 2), (2, 4)])
def test_a_file_of_other_classes_gives_all_but_the_outputs(
    make_detector: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, theirs: int, ours: int
) -> None:
    size = ("width=0.125", "input_size=[64,128]")
    source, detector = (make_detector(name, *size, f"num_classes={num}") for num in (theirs, ours))
    with torch.no_grad():
        for value in source.parameters():
            value.add_(1.0)
    source.seen.fill_(99)
    path, before = tmp_path / "other.weights", state(detector)
    darknet.save(source, path)
    with caplog.at_level("WARNING", logger="onestage"):
        darknet.load(detector, path)
    outputs = {key for key, value in detector.named_parameters() if value.shape != source.get_parameter(key).shape}
    expected = {key: before[key] if key in outputs else value for key, value in state(source).items()}
    assert all(torch.equal(value, expected[key]) for key, value in state(detector).items())
    assert int(detector.seen) == 0
    total = {"yolov3_tiny": 13, "yolov1_tiny": 9, "yolov1_darknet": 26}[name]
    num_loaded = total - len(outputs) // 2  # each has weights and biases
    assert [record.getMessage() for record in caplog.records] == [
        f"detector.weights: {path} is for {theirs} classes, the detector for {ours}: loaded {num_loaded} of {total} "
        "layers, the others depend on the classes and start anew"
    ]


def test_no_number_of_classes_is_below_one(small: Any, make_detector: Make, tmp_path: Path) -> None:
    """Of one class fewer than one, the file would be of none."""
    num_per_class = 3 * (64 + 1) + 3 * (32 + 1)
    with pytest.raises(InputError, match=rf"{num_per_class} too few, short at convolution 13 of 13"):
        darknet.load(small, write(tmp_path / "none.weights", small, more=-num_per_class))


@pytest.mark.parametrize("num_layers", [1, 12])
def test_a_file_of_the_first_layers_is_told_by_its_name(
    small: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, num_layers: int
) -> None:
    before, path = state(small), write(tmp_path / f"tiny.conv.{num_layers}", small, seen=77)
    last = 18 * 33 if num_layers == 12 else num_floats(small) - 248
    path.write_bytes(path.read_bytes()[: -4 * last])
    with caplog.at_level("WARNING", logger="onestage"):
        darknet.load(small, path)
    assert small.backbone.fine[0][1].bias.tolist() == list(range(8))
    assert torch.equal(small.head.out[0].weight, before["head.out.0.weight"])
    assert int(small.seen) == 0
    assert [record.getMessage() for record in caplog.records] == [
        f"detector.weights: {path} ends early: loaded the first {num_layers} of 13 layers, the others start anew"
    ]


def test_a_whole_file_may_have_such_a_name(small: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    darknet.load(small, write(tmp_path / "tiny.conv.13", small, seen=77))
    assert int(small.seen) == 77
    assert caplog.records == []


@pytest.mark.parametrize(("name", "fewer"), [("tiny.conv.12", 18 * 33 + 1), ("tiny.weights", 18 * 33)])
def test_files_that_end_elsewhere_or_have_another_name_are_too_short(
    small: Any, tmp_path: Path, name: str, fewer: int
) -> None:
    with pytest.raises(InputError, match=rf"{fewer} too few, short at convolution"):
        darknet.load(small, write(tmp_path / name, small, more=-fewer))
