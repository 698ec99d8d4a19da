"""torchvision's state dicts: of its detectors whole, or of its ImageNet classifiers for the backbone alone."""

import logging
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file as read_safetensors
from torch import Tensor, nn

from onestage.errors import InputError

SCHEME: Final = "torchvision://"
URLS: Final = {
    name: f"https://download.pytorch.org/models/{file}"
    for name, file in {
        "ssd300_vgg16": "ssd300_vgg16_coco-b556d3b4.pth",
        "retinanet_resnet50_fpn": "retinanet_resnet50_fpn_coco-eeacb38b.pth",
        "retinanet_resnet50_fpn_v2": "retinanet_resnet50_fpn_v2_coco-5905b1c5.pth",
        "resnet50": "resnet50-0676ba61.pth",
        "resnet50_v2": "resnet50-11ad3fa6.pth",  # the same network, trained better
        "resnet101": "resnet101-63fe2227.pth",
        "vgg16": "vgg16-397923af.pth",
        "vgg16_features": "vgg16_features-amdegroot-88682ab5.pth",  # for inputs scaled as SSD's are
    }.items()
}
COUNTER: Final = "num_batches_tracked"  # of batch norm, which torchvision's frozen one leaves out
CLASSIFIERS: Final = ("fc.", "classifier.")
OLD_NAMES: Final = (  # before torchvision 0.13: towers counted their activations, pyramids had bare convolutions
    (re.compile(r"_head\.conv\.(\d+)\.(weight|bias)$"), lambda m: f"_head.conv.{int(m[1]) // 2}.0.{m[2]}"),
    (re.compile(r"(inner|layer)_blocks\.(\d+)\.(weight|bias)$"), lambda m: f"{m[1]}_blocks.{m[2]}.0.{m[3]}"),
)

log = logging.getLogger(__name__)


class TorchvisionDetector(Protocol):
    """A detector that torchvision's weights fit; its backbone has ``torchvision_layers`` of a classifier, too."""

    backbone: nn.Module

    def torchvision_layers(self) -> Mapping[str, nn.Module | nn.Parameter]: ...

    def output_layers(self) -> list[nn.Module]: ...


def load_file(detector: TorchvisionDetector, path_or_name: str | Path) -> None:
    """Loads a ``.safetensors`` file, another file by torch, or a name such as ``torchvision://resnet50``.

    A name is downloaded once, into torch's cache. Raises InputError for a name or file that is not there, for a file
    that holds no weights, and for what ``load`` refuses.
    """
    source = str(path_or_name)
    load(detector, _download(source) if source.startswith(SCHEME) else _read(Path(path_or_name)), source=source)


@torch.no_grad()
def load(detector: TorchvisionDetector, state_dict: Mapping[str, Tensor], *, source: str = "the state dict") -> None:
    """Copies the state dict of torchvision's own detector into ``detector``, or a classifier's into its backbone.

    Weights for another number of classes give all but the output layers, with a warning. Raises InputError, with
    ``detector`` as it was, where an entry is missing, unexpected or of another shape: weights of another net.
    """
    given = {_renamed(name): value for name, value in state_dict.items()}
    if any(name.startswith("backbone.") for name in given):
        wanted = _entries(detector.torchvision_layers())
    else:
        given = {name: value for name, value in given.items() if not name.startswith(CLASSIFIERS)}
        wanted = _entries(detector.backbone.torchvision_layers())  # type: ignore[operator]
    wanted = {name: value for name, value in wanted.items() if name in given or not name.endswith(COUNTER)}
    other_classes = _of_other_classes(detector, given, wanted)
    if other_classes:
        name = other_classes[0]
        log.warning(
            f"detector.weights: {source} is of another number of classes ({name} has {len(given[name])} channels, "
            f"the detector {len(wanted[name])}): all but the output layers is loaded"
        )
        given = {name: value for name, value in given.items() if name not in other_classes}
        wanted = {name: value for name, value in wanted.items() if name not in other_classes}
    _check(given, wanted, source)
    for name, value in wanted.items():
        value.copy_(given[name])


def _entries(layers: Mapping[str, nn.Module | nn.Parameter]) -> dict[str, Tensor]:
    """What the layers hold, by torchvision's names; writing to it writes to them."""
    entries: dict[str, Tensor] = {}
    for name, layer in layers.items():
        entries |= layer.state_dict(prefix=f"{name}.") if isinstance(layer, nn.Module) else {name: layer}
    return entries


def _renamed(name: str) -> str:
    for pattern, new in OLD_NAMES:
        name = pattern.sub(new, name)
    return name


def _of_other_classes(
    detector: TorchvisionDetector, given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> list[str]:
    """The entries of all output layers, if some differ in their channels and in nothing else."""
    outputs = {id(layer) for layer in detector.output_layers()}
    prefixes = tuple(f"{name}." for name, layer in detector.torchvision_layers().items() if id(layer) in outputs)
    names = [name for name in wanted if name in given and name.startswith(prefixes)]
    shapes = [(given[name].shape, wanted[name].shape) for name in names]
    same_inputs = all(theirs[1:] == ours[1:] for theirs, ours in shapes)
    return names if same_inputs and any(theirs != ours for theirs, ours in shapes) else []


def _check(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], source: str) -> None:
    missing = [name for name in wanted if name not in given]
    unexpected = [name for name in given if name not in wanted]
    misshapen = [
        f"{name} ({list(given[name].shape)} where the detector has {list(value.shape)})"
        for name, value in wanted.items()
        if name in given and given[name].shape != value.shape
    ]
    for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen)):
        if names:
            raise InputError(
                f"detector.weights: {source} holds weights of another net: "
                f"{len(names)} entries are {kind}, the first {names[0]}"
            )


def _read(file: Path) -> Mapping[str, Tensor]:
    if not file.is_file():
        raise InputError(f"detector.weights: no file {file}")
    if file.suffix == ".weights":
        raise InputError(
            f"detector.weights: {file} is for Darknet's YOLOs, this detector takes torchvision's state dicts"
        )
    try:
        found: Any
        if file.suffix == ".safetensors":
            found = read_safetensors(file)
        else:
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:  # torch's own words advise to load it all the same
        what = "neither a .safetensors nor a torch file of tensors alone"
        raise InputError(f"detector.weights: {file} is {what}") from error
    except (SafetensorError, RuntimeError, EOFError, KeyError, ValueError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"detector.weights: {file} is neither a .safetensors nor a torch file: {reason}") from error
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise InputError(f"detector.weights: {file} holds no state dict, which has nothing but tensors by their names")
    return found


def _download(source: str) -> Mapping[str, Tensor]:
    name = source.removeprefix(SCHEME)
    if name not in URLS:
        raise InputError(f"detector.weights: no {source}; there are: {', '.join(SCHEME + known for known in URLS)}")
    try:
        found: Mapping[str, Tensor] = torch.hub.load_state_dict_from_url(
            URLS[name], map_location="cpu", progress=False, check_hash=True, weights_only=True
        )
    except (OSError, RuntimeError) as error:
        raise InputError(f"detector.weights: {source} cannot be had from {URLS[name]}: {error}") from error
    return found
