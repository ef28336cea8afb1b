"""Small tensor helpers: nested arguments, rows of a batch, exact fingerprints."""

from __future__ import annotations

import contextlib
import math
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def map_tensors(tree: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to every tensor in nested tuples, lists and dicts; everything else is kept as it is."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return like(tree, {key: map_tensors(value, function) for key, value in tree.items()})
    if isinstance(tree, (list, tuple)):
        return like(tree, [map_tensors(value, function) for value in tree])
    return tree


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


def leaves(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[tuple[int | str, ...], Tensor]]:
    """Every tensor among a call's arguments, with where it stands."""

    def walk(value: Any, path: tuple[int | str, ...]) -> Iterator[tuple[tuple[int | str, ...], Tensor]]:
        if isinstance(value, Tensor):
            yield path, value
        elif isinstance(value, Mapping):
            for key, item in value.items():
                yield from walk(item, (*path, key))
        elif isinstance(value, (list, tuple)):
            for key, item in enumerate(value):
                yield from walk(item, (*path, key))

    for position, value in enumerate(args):
        yield from walk(value, (position,))
    for name, value in kwargs.items():
        yield from walk(value, (name,))


def like(tree: Any, items: dict[Any, Any] | list[Any]) -> Any:
    """The items in a container of the kind of ``tree``; in a plain one where that kind cannot be made of its items."""
    kind = type(tree)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return kind(*items)
    try:
        return kind(items)
    except TypeError:
        return tuple(items) if isinstance(tree, tuple) else items


def take_rows(tree: Any, rows: slice | Tensor, *, of: int) -> Any:
    """The rows of every tensor whose batch axis has ``of`` rows; other tensors are shared by all rows and kept whole."""
    return map_tensors(tree, lambda tensor: tensor[rows] if tensor.ndim > 0 and tensor.shape[0] == of else tensor)


def full_precision(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """No autocast inside the block, whatever mode the host runs in: products of predictions need all their digits."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def version(tensor: Tensor) -> int | None:
    """How often the tensor was changed in place; None for tensors made under inference_mode, which do not count."""
    return None if tensor.is_inference() else tensor._version


_copies: Any = WeakIdKeyDictionary()  # tensor -> its version, and a weak reference to the copy made of it then
_copies_lock = threading.Lock()


def copy_of(tensor: Tensor) -> Tensor:
    """A copy that later changes in place do not reach; still the same copy while the tensor was not changed.

    So a text embedding that a host passes to every evaluation is stored once. The copy may take part in autograd even if the
    tensor was made under inference_mode.
    """
    now = version(tensor)
    with _copies_lock:
        seen, reference = _copies.get(tensor, (None, None))
        copy: Tensor | None = reference() if reference is not None and seen == now else None
        if copy is None:
            with torch.inference_mode(mode=False), torch.no_grad():
                copy = tensor.detach().clone()
            if now is not None:
                _copies[tensor] = now, weakref.ref(copy)
    return copy


@torch.no_grad()
def row_hash(tensor: Tensor) -> Tensor:
    """A 64-bit fingerprint of every row's bits, ``(r, ...) -> (r,)`` int64, without leaving the device.

    Integer arithmetic, hence exact and the same for equal rows wherever they stand. Equal fingerprints mean equal rows
    but for chance (about 2**-64 for a pair).
    """
    flat = tensor.detach().reshape(tensor.shape[0], math.prod(tensor.shape[1:]))
    if flat.is_complex():
        flat = torch.view_as_real(flat).flatten(1)
    if flat.dtype is torch.bool:
        flat = flat.to(torch.int8)
    bits = flat.contiguous().view(_INTEGERS[flat.element_size()]).to(torch.int64)
    places = torch.arange(1, bits.shape[1] + 1, device=bits.device, dtype=torch.int64)
    # The finalizer of splitmix64, in int64 arithmetic that wraps. Without mixing, a sum of multiples would not tell float64 rows
    # from their negatives: an even number of flipped highest bits cancels.
    mixed = bits + places * -7046029254386353131
    mixed = (mixed ^ _shift(mixed, 30)) * -4658895280553007687
    mixed = (mixed ^ _shift(mixed, 27)) * -7723592293110705685
    return (mixed ^ _shift(mixed, 31)).sum(dim=1)


def _shift(values: Tensor, by: int) -> Tensor:
    """Shift right, filling with zeros; torch's own shift of signed integers repeats the sign."""
    return (values >> by) & ((1 << (64 - by)) - 1)
