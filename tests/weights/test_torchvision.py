"""Against the state dicts of the installed torchvision, of random weights: the published ones have the same entries."""

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
import torchvision as reference
from safetensors.torch import save_file
from torch import Tensor
from torchvision.models import detection

from onestage.errors import InputError
from onestage.weights import torchvision

Make = Callable[..., Any]
State = dict[str, Tensor]
DETECTORS = {
    "retinanet_r50": detection.retinanet_resnet50_fpn,
    "retinanet_r50_v2": detection.retinanet_resnet50_fpn_v2,
    "ssd300": detection.ssd300_vgg16,
}
CLASSIFIERS = {"retinanet_r50": "resnet50", "retinanet_r101": "resnet101", "ssd300": "vgg16"}
LAST = "head.classification_head.cls_logits"


def num_classes(name: str) -> int:
    """With which a detector has torchvision's 91: SSD brings the background with it."""
    return 90 if name == "ssd300" else 91


def values_of(layers: dict[str, Any]) -> State:
    values: State = {}
    for name, layer in layers.items():
        values |= {name: layer} if isinstance(layer, Tensor) else layer.state_dict(prefix=f"{name}.")
    return values


def state_of(detector: Any, seed: int = 1) -> State:
    """What torchvision would have for a detector of this size, of random weights."""
    generator = torch.Generator().manual_seed(seed)
    state = values_of(detector.torchvision_layers())
    return {name: torch.rand(value.shape, generator=generator).to(value.dtype) for name, value in state.items()}


@pytest.fixture
def small(make_detector: Make) -> Any:
    return make_detector("retinanet_r50", "width=0.125", "num_classes=3")


# Names and shapes


@pytest.mark.parametrize("name", DETECTORS)
def test_every_entry_of_torchvisions_detector_has_its_place(make_detector: Make, name: str) -> None:
    with torch.device("meta"):
        theirs = DETECTORS[name](weights=None, weights_backbone=None).state_dict()
    detector = make_detector(name, f"num_classes={num_classes(name)}")
    ours = values_of(detector.torchvision_layers())
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}
    places = {value.data_ptr() for value in ours.values()}
    assert [key for key, value in detector.named_parameters() if value.data_ptr() not in places] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", DETECTORS)
def test_torchvisions_detectors_are_loaded_whole(make_detector: Make, name: str) -> None:
    torch.manual_seed(1)
    state = DETECTORS[name](weights=None, weights_backbone=None).state_dict()
    detector = make_detector(name, f"num_classes={num_classes(name)}")
    torchvision.load(detector, state)
    found = values_of(detector.torchvision_layers())
    assert all(torch.equal(found[key], value) for key, value in state.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_torchvisions_classifiers_are_loaded_into_the_backbone(make_detector: Make, name: str) -> None:
    torch.manual_seed(1)
    state = getattr(reference.models, CLASSIFIERS[name])(weights=None).state_dict()
    detector = make_detector(name)
    backbone = {id(value) for value in detector.backbone.parameters()}
    before = {key: value.clone() for key, value in detector.named_parameters() if id(value) not in backbone}
    torchvision.load(detector, state)
    found = values_of(detector.backbone.torchvision_layers())
    expected = {key: value for key, value in state.items() if not key.startswith(("fc.", "classifier."))}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    after = dict(detector.named_parameters())
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_every_tensor_of_a_state_arrives(small: Any) -> None:
    state = state_of(small)
    torchvision.load(small, state)
    found = values_of(small.torchvision_layers())
    assert all(torch.equal(found[key], value) for key, value in state.items())


def test_batch_norms_counters_may_be_absent(small: Any) -> None:
    state = {key: value for key, value in state_of(small).items() if "num_batches" not in key}
    torchvision.load(small, state)
    assert torch.equal(small.backbone.stem[1].running_mean, state["backbone.body.bn1.running_mean"])


def test_names_from_before_torchvision_0_13_are_understood(small: Any) -> None:
    """As in the published retinanet_resnet50_fpn: towers count their activations, pyramids have bare convolutions."""

    def old_name(name: str) -> str:
        name = re.sub(r"\.conv\.(\d)\.0\.", lambda at: f".conv.{2 * int(at[1])}.", name)
        return re.sub(r"_blocks\.(\d)\.0\.", r"_blocks.\1.", name)

    state = state_of(small)
    old = {old_name(name): value for name, value in state.items()}
    assert {"head.regression_head.conv.6.bias", "backbone.fpn.inner_blocks.2.weight"} <= set(old)
    torchvision.load(small, old)
    assert torch.equal(small.head.box_tower[3][0].bias, state["head.regression_head.conv.3.0.bias"])
    assert torch.equal(small.neck.lateral[2].weight, state["backbone.fpn.inner_blocks.2.0.weight"])


# Another number of classes


def test_another_number_of_classes_gives_all_but_the_output_layers(
    small: Any, make_detector: Make, caplog: pytest.LogCaptureFixture
) -> None:
    state = state_of(make_detector("retinanet_r50", "width=0.125", "num_classes=91"))
    born = small.head.class_out.weight.clone()
    with caplog.at_level(logging.WARNING, "onestage"):
        torchvision.load(small, state)
    assert [record.getMessage() for record in caplog.records] == [
        f"detector.weights: the state dict is of another number of classes ({LAST}.weight has 819 channels, "
        "the detector 27): all but the output layers is loaded"
    ]
    assert torch.equal(small.head.class_out.weight, born)
    assert torch.equal(small.head.box_out.weight, state["head.regression_head.bbox_reg.weight"])
    assert torch.equal(small.backbone.stem[0].weight, state["backbone.body.conv1.weight"])


def test_the_same_number_of_classes_warns_of_nothing(small: Any, caplog: pytest.LogCaptureFixture) -> None:
    torchvision.load(small, state_of(small))
    assert caplog.records == []


# Weights of another net


WRONG = {
    "2 entries are missing, the first backbone.body.layer3.1.bn2.weight": lambda state: [
        state.pop(f"backbone.body.layer3.1.bn2.{key}") for key in ("weight", "bias")
    ],
    "1 entries are unexpected, the first backbone.body.layer5.weight": lambda state: state.update(
        {"backbone.body.layer5.weight": torch.zeros(1)}
    ),
    "1 entries are of another shape, the first backbone.body.conv1.weight ([64, 3, 7, 7] where the detector has "
    "[8, 3, 7, 7])": lambda state: state.update({"backbone.body.conv1.weight": torch.zeros(64, 3, 7, 7)}),
    f"1 entries are missing, the first {LAST}.bias": lambda state: state.pop(f"{LAST}.bias"),
    f"1 entries are of another shape, the first {LAST}.weight ([27, 64, 3, 3] where the detector has [27, 32, 3, 3])": (
        lambda state: state.update({f"{LAST}.weight": torch.zeros(27, 64, 3, 3)})
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_weights_of_another_net_are_refused_and_change_nothing(small: Any, message: str) -> None:
    state = state_of(small)
    WRONG[message](state)
    before = {key: value.clone() for key, value in small.state_dict().items()}
    with pytest.raises(InputError) as error:
        torchvision.load(small, state)
    assert str(error.value) == f"detector.weights: the state dict holds weights of another net: {message}"
    assert all(torch.equal(small.state_dict()[key], value) for key, value in before.items())


def test_a_classifier_of_another_depth_is_refused(small: Any, make_detector: Make) -> None:
    deeper = make_detector("retinanet_r101", "width=0.125")
    with pytest.raises(InputError, match=r"another net: 306 entries are unexpected, the first layer3.6.conv1.weight"):
        torchvision.load(small, values_of(deeper.backbone.torchvision_layers()))


def test_an_empty_state_is_refused(small: Any) -> None:
    with pytest.raises(InputError, match=r"another net: 265 entries are missing, the first conv1.weight$"):
        torchvision.load(small, {})


# Files and names


@pytest.mark.parametrize("kind", ["safetensors", "pth", "legacy"])
def test_files_named_in_the_config_are_loaded(make_detector: Make, small: Any, tmp_path: Path, kind: str) -> None:
    state, file = state_of(small), tmp_path / ("some.safetensors" if kind == "safetensors" else "some.pth")
    if kind == "safetensors":
        save_file(state, file)
    else:
        torch.save(state, file, _use_new_zipfile_serialization=kind == "pth")
    detector = make_detector("retinanet_r50", "width=0.125", "num_classes=3", f"weights={file}")
    found = values_of(detector.torchvision_layers())
    assert all(torch.equal(found[key], value) for key, value in state.items())
    file.write_bytes(b"")  # the detector holds copies, not the file
    assert all(torch.equal(found[key], value) for key, value in state.items())


def test_a_file_of_another_net_is_named(small: Any, tmp_path: Path) -> None:
    torch.save({"backbone.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match=rf"^detector.weights: {tmp_path}/other.pth holds weights of another net: "):
        torchvision.load_file(small, tmp_path / "other.pth")


def test_a_file_that_is_not_there_is_refused(small: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"^detector.weights: no file {tmp_path}/none.pth$"):
        torchvision.load_file(small, tmp_path / "none.pth")


@pytest.mark.parametrize("name", ["some.safetensors", "some.pth"])
@pytest.mark.parametrize("content", [b"", b"hello", b"\x00" * 100, b"PK\x03\x04 torn", b"\x80\x02}q\x00."])
def test_a_file_of_another_kind_is_refused_in_one_line(small: Any, tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        torchvision.load_file(small, tmp_path / name)
    start = f"detector.weights: {tmp_path}/{name} is neither a .safetensors nor a torch file"
    assert str(error.value).startswith(start) and "\n" not in str(error.value)


@pytest.mark.parametrize("value", [{"model": {"weight": torch.zeros(1)}, "epoch": 3}, [torch.zeros(1)]])
def test_a_torch_file_of_something_else_is_refused(small: Any, tmp_path: Path, value: Any) -> None:
    torch.save(value, tmp_path / "checkpoint.pth")
    with pytest.raises(InputError, match=r"checkpoint.pth holds no state dict, which has nothing but tensors by their"):
        torchvision.load_file(small, tmp_path / "checkpoint.pth")


def test_a_darknet_file_is_told_as_such(small: Any, tmp_path: Path) -> None:
    (tmp_path / "yolov3.weights").write_bytes(b"\0" * 40)
    with pytest.raises(InputError, match=r"yolov3.weights is for Darknet's YOLOs, this detector takes torchvision's"):
        torchvision.load_file(small, tmp_path / "yolov3.weights")


def test_a_file_that_would_run_code_is_refused(small: Any, tmp_path: Path) -> None:
    torch.save({"weight": Path("anything but tensors")}, tmp_path / "foreign.pth")
    with pytest.raises(InputError, match=r"foreign.pth is neither a .safetensors nor a torch file of tensors alone$"):
        torchvision.load_file(small, tmp_path / "foreign.pth")


def test_an_unknown_name_is_refused_with_the_known(small: Any) -> None:
    with pytest.raises(
        InputError, match=r"^detector.weights: no torchvision://resnet18; there are: torchvision://ssd3"
    ):
        torchvision.load_file(small, "torchvision://resnet18")


def test_a_name_is_fetched_safely_and_loaded(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    state, asked = state_of(small), {}

    def download(url: str, **options: Any) -> State:
        asked.update(options, url=url)
        return state

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    torchvision.load_file(small, "torchvision://retinanet_resnet50_fpn")
    assert asked["url"] == detection.RetinaNet_ResNet50_FPN_Weights.COCO_V1.url
    assert asked["weights_only"] is asked["check_hash"] is True
    assert torch.equal(small.head.class_out.bias, state[f"{LAST}.bias"])


@pytest.mark.parametrize("error", [URLError("no network"), RuntimeError("invalid hash value"), TimeoutError("late")])
def test_what_cannot_be_fetched_is_one_error(small: Any, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def download(url: str, **options: Any) -> State:
        raise error

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    with pytest.raises(InputError, match=r"^detector.weights: torchvision://resnet50 cannot be had from https://downl"):
        torchvision.load_file(small, "torchvision://resnet50")


def test_addresses_are_torchvisions() -> None:
    expected = {
        "ssd300_vgg16": detection.SSD300_VGG16_Weights.COCO_V1,
        "retinanet_resnet50_fpn": detection.RetinaNet_ResNet50_FPN_Weights.COCO_V1,
        "retinanet_resnet50_fpn_v2": detection.RetinaNet_ResNet50_FPN_V2_Weights.COCO_V1,
        "resnet50": reference.models.ResNet50_Weights.IMAGENET1K_V1,
        "resnet50_v2": reference.models.ResNet50_Weights.IMAGENET1K_V2,
        "resnet101": reference.models.ResNet101_Weights.IMAGENET1K_V1,
        "vgg16": reference.models.VGG16_Weights.IMAGENET1K_V1,
        "vgg16_features": reference.models.VGG16_Weights.IMAGENET1K_FEATURES,
    }
    assert {name: weights.url for name, weights in expected.items()} == torchvision.URLS
