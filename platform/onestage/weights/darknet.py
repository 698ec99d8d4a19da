"""Darknet ``.weights`` files.

int32 major, minor, revision; images seen, as uint64 from version 0.2 on, before as uint32; then float32, little-endian,
layer by layer in the order of the cfg. A convolution with batch norm holds biases, scales, rolling means, rolling
variances, weights (out, in, kh, kw); one without holds biases, weights.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from onestage.errors import InputError

VERSION = (0, 2, 5)


class DarknetDetector(Protocol):
    """A detector that a ``.weights`` file fits."""

    seen: Tensor
    num_classes: int

    def darknet_layers(self) -> list[nn.Module]: ...


def _convolutions(detector: DarknetDetector) -> Iterator[tuple[nn.Conv2d, nn.BatchNorm2d | None]]:
    """Every convolution in the order of the cfg, with its batch norm where it has one."""
    flat = [
        module
        for layer in detector.darknet_layers()
        for module in layer.modules()
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d)
    ]
    for module, after in zip(flat, [*flat[1:], None], strict=True):
        if isinstance(module, nn.Conv2d):
            yield module, after if isinstance(after, nn.BatchNorm2d) else None


def _values(convolution: nn.Conv2d, norm: nn.BatchNorm2d | None) -> list[Tensor]:
    """A layer's tensors in the order of the file."""
    if norm is None:
        assert convolution.bias is not None
        return [convolution.bias, convolution.weight]
    assert norm.running_mean is not None and norm.running_var is not None
    return [norm.bias, norm.weight, norm.running_mean, norm.running_var, convolution.weight]


@torch.no_grad()
def load(detector: DarknetDetector, path: str | Path) -> None:
    """Reads a ``.weights`` file into ``detector``, and ``seen`` with it.

    Raises InputError for a file that is not there, or too short or too long for the detector: by how much, and at which
    layer.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"detector.weights: no file {file}")
    data = file.read_bytes()
    major, minor = np.frombuffer(data[:8].ljust(8, b"\0"), "<i4")
    wide = major * 10 + minor >= 2
    if len(data) < (20 if wide else 16):
        raise InputError(f"detector.weights: {file} has {len(data)} bytes, less than a Darknet header")
    seen = int(np.frombuffer(data, "<u8" if wide else "<u4", count=1, offset=12)[0])
    body = memoryview(data)[20 if wide else 16 :]
    values = np.frombuffer(body[: len(body) // 4 * 4], "<f4")
    layers = [_values(*layer) for layer in _convolutions(detector)]
    needed = sum(tensor.numel() for layer in layers for tensor in layer)
    start = 0
    for number, layer in enumerate(layers, start=1):
        count = sum(tensor.numel() for tensor in layer)
        if start + count > len(values):
            raise InputError(
                f"detector.weights: {file} holds {len(values):,} floats, the detector needs {needed:,}: "
                f"{needed - len(values):,} too few, short at convolution {number} of {len(layers)}"
            )
        for tensor in layer:
            piece = torch.from_numpy(values[start : start + tensor.numel()].copy())
            tensor.copy_(piece.view_as(tensor))
            start += tensor.numel()
    if start != len(values) or len(body) % 4:
        raise InputError(
            f"detector.weights: {file} holds {len(body) / 4:,.2f} floats, the detector needs {needed:,}: "
            f"{len(body) / 4 - needed:,.2f} too many after convolution {len(layers)}, the last"
        )
    detector.seen.fill_(seen)


@torch.no_grad()
def save(detector: DarknetDetector, path: str | Path) -> None:
    """Writes ``detector`` as a ``.weights`` file that Darknet reads with the same cfg."""
    with Path(path).open("wb") as file:
        file.write(np.array(VERSION, "<i4").tobytes())
        file.write(np.array([int(detector.seen)], "<u8").tobytes())
        for layer in _convolutions(detector):
            for tensor in _values(*layer):
                file.write(tensor.detach().cpu().float().contiguous().numpy().astype("<f4").tobytes())
