"""Darknet ``.weights`` files.

int32 major, minor, revision; images seen, as uint64 from version 0.2 on, before as uint32; then float32, little-endian,
layer by layer in the order of the cfg. A convolution with batch norm holds biases, scales, rolling means, rolling
variances, weights (out, in, kh, kw); one without holds biases, weights. A connected layer holds biases, weights
(out, in), then scales, means and variances if it is normalised; a local layer biases (out, h, w), weights
(h * w, out, in, k, k).
"""

import logging
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from onestage.errors import InputError

VERSION: Final = (0, 2, 5)
TRANSPOSED_ABOVE: Final = 1000  # major or minor version, parser.c
MAX_SEEN: Final = 2**63 - 1
KINDS: Final = {2: "connected layer", 3: "local layer", 4: "convolution"}  # by the dimensions of the weights
PARTIAL: Final = ".conv."  # Darknet names a file of the first N layers NAME.conv.N

log = logging.getLogger("onestage")


class DarknetDetector(Protocol):
    """A detector that a ``.weights`` file fits.

    ``darknet_outputs`` are the layers that grow with the number of classes, and by how many outputs for each class.
    """

    seen: Tensor
    num_classes: int

    def darknet_layers(self) -> list[nn.Module]: ...

    def darknet_outputs(self) -> list[tuple[nn.Module, int]]: ...


class _Layer(NamedTuple):
    """A layer's tensors in the order of the file; ``floats_per_class`` more for every further class."""

    kind: str
    tensors: list[Tensor]
    floats_per_class: int

    @property
    def num_floats(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors)


def _layers(detector: DarknetDetector) -> list[_Layer]:
    """Every layer of weights in the order of the cfg, with its batch norm where it has one."""
    flat = [
        module
        for part in detector.darknet_layers()
        for module in part.modules()
        if any(True for _ in module.parameters(recurse=False))
    ]
    outputs_per_class = dict(detector.darknet_outputs())
    layers = []
    for module, after in zip(flat, [*flat[1:], None], strict=True):
        if not isinstance(module, _BatchNorm):
            weight = module.get_parameter("weight")
            tensors = _tensors(module, weight, after if isinstance(after, _BatchNorm) else None)
            floats_per_class = outputs_per_class.get(module, 0) * (1 + weight[0].numel())
            layers.append(_Layer(KINDS[weight.ndim], tensors, floats_per_class))
    return layers


def _tensors(module: nn.Module, weight: Tensor, norm: _BatchNorm | None) -> list[Tensor]:
    """A layer's tensors in the order of the file."""
    if norm is None:
        return [module.get_parameter("bias"), weight]
    normalised = [norm.weight, norm.get_buffer("running_mean"), norm.get_buffer("running_var")]
    return [norm.bias, weight, *normalised] if isinstance(module, nn.Linear) else [norm.bias, *normalised, weight]


@torch.no_grad()
def load(detector: DarknetDetector, path: str | Path) -> None:
    """Reads a ``.weights`` file into ``detector``, and ``seen`` with it.

    A file for another number of classes, told by its length, gives all but the layers that depend on it; one with
    ".conv." in its name may end after any layer. The rest of the detector stays as it is then, ``seen`` is 0, and one
    line of the log says so. Raises InputError, before anything is changed, for a file that is not there, or too short
    or too long for the detector (by how much, and at which layer), or has values that are not finite.
    """
    file = Path(path)
    seen, body = _read(file)
    layers, num_classes = _layers(detector), detector.num_classes
    ends = _ends(layers, more_classes=0)
    if PARTIAL in file.name and len(body) in (4 * end for end in ends):
        ends = ends[: ends.index(len(body) // 4) + 1]
    elif len(body) != 4 * ends[-1]:
        num_classes += _more_classes(layers, len(body))
        if num_classes == detector.num_classes or num_classes < 1:
            raise InputError(f"detector.weights: {file} {_misfit(layers, ends, len(body))}")
        ends = _ends(layers, more_classes=num_classes - detector.num_classes)
    values = body[: 4 * ends[-1]].view("<f4")
    kept = {
        number: values[end - layer.num_floats : end]
        for number, (layer, end) in enumerate(zip(layers, ends, strict=False))
        if num_classes == detector.num_classes or layer.floats_per_class == 0
    }
    for number, piece in kept.items():
        if not np.isfinite(piece).all():
            raise InputError(
                f"detector.weights: {file} has values that are not finite in {_place(layers, number)} of {len(layers)}"
            )
    for number, piece in kept.items():
        tensors = layers[number].tensors
        for tensor, part in zip(tensors, torch.from_numpy(piece).split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))
    detector.seen.fill_(seen if len(kept) == len(layers) else 0)
    if num_classes != detector.num_classes:
        log.warning(
            f"detector.weights: {file} is for {num_classes} classes, the detector for {detector.num_classes}: "
            f"loaded {len(kept)} of {len(layers)} layers, the others depend on the classes and start anew"
        )
    elif len(kept) < len(layers):
        log.warning(
            f"detector.weights: {file} ends early: loaded the first {len(kept)} of {len(layers)} layers, "
            "the others start anew"
        )


def _read(file: Path) -> tuple[int, npt.NDArray[np.uint8]]:
    """The images seen, and all bytes behind the header: mapped, so that a layer is read when it is copied."""
    if not file.is_file():
        raise InputError(f"detector.weights: no file {file}")
    size = file.stat().st_size
    with file.open("rb") as stream:
        header = stream.read(20)
    major, minor = np.frombuffer(header[:8].ljust(8, b"\0"), "<i4").tolist()
    start = 20 if major * 10 + minor >= 2 else 16
    if size < start:
        raise InputError(f"detector.weights: {file} has {size} bytes, less than a Darknet header")
    if max(major, minor) > TRANSPOSED_ABOVE:
        raise InputError(
            f"detector.weights: {file} is no Darknet file, or of version {major}.{minor}, whose connected layers are "
            "transposed: load and save it with a newer Darknet first"
        )
    seen = int.from_bytes(header[12:start], "little")
    if seen > MAX_SEEN:
        raise InputError(f"detector.weights: {file} is no Darknet file: its header counts {seen:,} images")
    return seen, np.memmap(file, np.uint8, mode="c", offset=start, shape=(size - start,))


def _ends(layers: Sequence[_Layer], *, more_classes: int) -> list[int]:
    """How many floats each layer and those before it have in a file of so many classes more than the detector."""
    return list(accumulate(layer.num_floats + more_classes * layer.floats_per_class for layer in layers))


def _more_classes(layers: Sequence[_Layer], num_bytes: int) -> int:
    """By how many classes more (or fewer) a file would have just ``num_bytes`` of values; 0 if by no number."""
    needed = 4 * sum(layer.num_floats for layer in layers)
    more, rest = divmod(num_bytes - needed, 4 * sum(layer.floats_per_class for layer in layers))
    return 0 if rest else more


def _misfit(layers: Sequence[_Layer], ends: Sequence[int], num_bytes: int) -> str:
    """How a file of ``num_bytes`` after its header differs from what the detector needs."""
    held, needed = num_bytes // 4, ends[-1]
    if held < needed:
        return (
            f"holds {held:,} floats, the detector needs {needed:,}: {needed - held:,} too few, "
            f"short at {_place(layers, bisect_right(ends, held))} of {len(layers)}"
        )
    return (
        f"holds {_floats(num_bytes)} floats, the detector needs {needed:,}: {_floats(num_bytes - 4 * needed)} too many "
        f"after {_place(layers, len(layers) - 1)}, the last"
    )


def _floats(num_bytes: int) -> str:
    """As in "1,000" and, where bytes are left over, "0.25"."""
    return f"{num_bytes // 4:,}" if num_bytes % 4 == 0 else f"{num_bytes / 4:,.2f}"


def _place(layers: Sequence[_Layer], number: int) -> str:
    """As in "convolution 13": layers are counted from 1, whatever their kind."""
    return f"{layers[number].kind} {number + 1}"


@torch.no_grad()
def save(detector: DarknetDetector, path: str | Path) -> None:
    """Writes ``detector`` as a ``.weights`` file that Darknet reads with the same cfg."""
    with Path(path).open("wb") as file:
        file.write(np.array(VERSION, "<i4").tobytes())
        file.write(np.array([int(detector.seen)], "<u8").tobytes())
        for layer in _layers(detector):
            for tensor in layer.tensors:
                file.write(tensor.detach().cpu().float().contiguous().numpy().astype("<f4", copy=False).data)
