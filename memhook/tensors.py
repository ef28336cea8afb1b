"""Small tensor helpers: nested arguments, rows of a batch, exact fingerprints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def map_tensors(tree: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to every tensor in nested tuples, lists and dicts; everything else is kept as it is."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        changed = {key: map_tensors(value, function) for key, value in tree.items()}
        return changed if type(tree) is dict else _rebuild(tree, changed)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_tensors(value, function) for value in tree))
    if isinstance(tree, (list, tuple)):
        return type(tree)(map_tensors(value, function) for value in tree)
    return tree


def _rebuild(tree: Mapping[Any, Any], changed: dict[Any, Any]) -> Any:
    try:
        return type(tree)(changed)  # type: ignore[call-arg]
    except TypeError:
        return changed


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and dicts."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from tensors_in(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from tensors_in(value)


def take_rows(tree: Any, rows: slice, *, of: int) -> Any:
    """The rows of every tensor whose batch axis has ``of`` rows; other tensors are shared by all rows and kept whole."""
    return map_tensors(tree, lambda tensor: tensor[rows] if tensor.ndim > 0 and tensor.shape[0] == of else tensor)


@torch.no_grad()
def row_hash(tensor: Tensor) -> Tensor:
    """A 64-bit fingerprint of every row's bits, ``(r, ...) -> (r,)`` int64, without leaving the device.

    Integer arithmetic, hence exact and the same for equal rows wherever they stand. Equal fingerprints mean equal rows
    but for chance (about 2**-64 for a pair).
    """
    flat = tensor.detach().reshape(tensor.shape[0], -1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).flatten(1)
    if flat.dtype is torch.bool:
        flat = flat.to(torch.int8)
    bits = flat.contiguous().view(_INTEGERS[flat.element_size()]).to(torch.int64)
    places = torch.arange(1, bits.shape[1] + 1, device=bits.device, dtype=torch.int64)
    factors = places * -7046029254386353131  # odd constant of splitmix64; int64 arithmetic wraps
    factors = ((factors ^ (factors >> 30)) * -4658895280553007687) | 1
    return (bits * factors).sum(dim=1)
