"""What is kept of a tensor's values: its size and one projection, of all tensors of a model in one transfer."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

if TYPE_CHECKING:
    from collections.abc import Iterable

_ROW = 1021  # prime, so that rows and columns of usual widths do not fall on equal weights
_MOST = 1 << 20  # elements that are read of one tensor, in rows evenly spaced over it
_PROBED = 8  # elements by which a change behind torch's back is noticed


def plain(tensor: Tensor) -> list[Tensor]:
    """The tensors with storage that a parameter is made of: itself, or the parts of a subclass that wraps others (quantized weights)."""
    if is_traceable_wrapper_subclass(tensor):
        with contextlib.suppress(NotImplementedError, RuntimeError, TypeError, AttributeError):
            names, _ = tensor.__tensor_flatten__()
            return [part for name in names for part in plain(getattr(tensor, name))]
    return [tensor]


class Kept:
    """Numbers on their devices, which are read in one transfer a device once somebody asks; None for what could not be computed."""

    def __init__(self, numbers: Sequence[Tensor | None]) -> None:
        self._count = len(numbers)
        places: dict[torch.device, list[int]] = {}
        for place, number in enumerate(numbers):
            if number is not None:
                places.setdefault(number.device, []).append(place)
        self._places = list(places.values())
        self._stacked = [torch.stack([numbers[place] for place in of_device]) for of_device in self._places]  # type: ignore[misc]

    def read(self) -> list[Any]:
        """The numbers (each of them a list, where it is a vector)."""
        found: list[Any] = [None] * self._count
        for places, stacked in zip(self._places, self._stacked, strict=True):
            for place, value in zip(places, stacked.tolist(), strict=True):
                found[place] = value
        return found


@torch.no_grad()
def moments(tensor: Tensor) -> Tensor | None:
    """``(2,)`` float32, on its device: the root of the mean square, and a projection of the same unit.

    A change of one element moves both, but for chance. Large tensors are read in parts. None where there are no values to read
    (the meta device, a subclass that offers none).
    """
    return _tried(_moments, tensor)


@torch.no_grad()
def element(tensor: Tensor) -> Tensor | None:
    """``()`` float64 (float32 where there is none): the one element that fingerprints held before they had moments."""
    return _tried(lambda values: values[values.numel() // 3].to(_widest(values)), tensor)


@torch.no_grad()
def probe(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Some elements of every tensor, a vector for each device and dtype."""
    found: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        taken = _tried(lambda values: values[:: max(1, values.numel() // _PROBED)], tensor)
        if taken is not None:
            found.setdefault((taken.device, taken.dtype), []).append(taken)
    return [torch.cat(parts) for parts in found.values()]


def equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Whether two probes are one to the last bit; waits for the device."""
    pairs = list(zip(first, second, strict=False))
    return len(first) == len(second) and all(
        a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs
    )


def _tried(function: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor | None:
    if tensor.device.type == "meta" or tensor.numel() == 0:
        return None
    try:
        # Subclasses that only add attributes (bitsandbytes, GGUF) have a plain tensor's storage.
        with torch._C.DisableTorchFunctionSubclass():
            return function(tensor.detach().reshape(-1))
    except (NotImplementedError, RuntimeError, TypeError, AttributeError):  # a subclass that does not let its values be read
        return None


def _moments(values: Tensor) -> Tensor:
    count = values.numel()
    whole = count // _ROW
    rows = values[: whole * _ROW].view(whole, _ROW)[:: max(1, math.ceil(count / _MOST))]
    parts = [part for part in (rows, values[whole * _ROW :].view(1, -1)) if part.numel()]
    found = torch.stack([_sums(_real(part)) for part in parts]).sum(0)
    read = sum(part.numel() for part in parts)
    square, projection = found.unbind()
    return torch.stack([(square / read).sqrt(), projection / math.sqrt(read)])


def _sums(rows: Tensor) -> Tensor:
    """``(2,)``: the sum of squares, and that of the values with weights for row and column."""
    weights = _weights(rows.device)
    weighed = (rows * weights[: rows.shape[1]]).sum(1) * weights[: rows.shape[0]]
    return torch.stack([torch.linalg.vector_norm(rows, dim=1).square().sum(), weighed.sum()])


def _real(values: Tensor) -> Tensor:
    return (torch.view_as_real(values).flatten(1) if values.is_complex() else values).to(torch.float32)


@functools.cache
def _weights(device: torch.device) -> Tensor:
    """Numbers of mean 0 and mean square 1, the same on every machine: made in integers."""
    with torch.inference_mode(mode=False):
        places = torch.arange(1, 2 * _ROW + 1, dtype=torch.int64)  # a row of complex numbers has twice as many
        return (((places * places * 7919 + places * 104729) % 2003 - 1001).to(torch.float32) / 578.2).to(device)


def _widest(values: Tensor) -> torch.dtype:
    return torch.float32 if values.device.type == "mps" else torch.float64
