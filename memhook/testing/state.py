"""What a host looks like from outside: the hook tables and instance attributes that a watch must leave as they were."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

_TABLES = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_DEPTH = 3  # of attributes of attributes that are looked into


def snapshot(target: object) -> dict[str, Any]:
    """Everything on ``target`` and its parts that an adapter could have left something on, by readable name.

    Looks at every module inside the target, at its hook tables and at the methods that were replaced on an instance, and at the
    same of other objects (schedulers, guiders) a few attributes deep.
    """
    found: dict[str, Any] = {}
    for name, part in _parts(target, type(target).__name__, _DEPTH, set()):
        if isinstance(part, nn.Module):
            for table in _TABLES:
                found[f"{name}.{table}"] = sorted(getattr(part, table))
            found[f"{name} grad"] = [parameter for parameter, value in part.named_parameters(recurse=False) if value.grad is not None]
            found[f"{name} frozen"] = [parameter for parameter, value in part.named_parameters(recurse=False) if not value.requires_grad]
        found[f"{name}.__class__"] = type(part)
        replaced = [key for key, value in vars(part).items() if callable(value) and hasattr(type(part), key)]
        found[f"{name} methods"] = sorted((key, id(vars(part)[key])) for key in replaced)
    return found


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What differs between two snapshots, as readable lines."""
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return [f"{key}: {before.get(key)} before, {after.get(key)} after" for key in keys]


def _parts(value: Any, name: str, depth: int, seen: set[int]) -> Iterator[tuple[str, Any]]:
    if id(value) in seen or not hasattr(value, "__dict__") or isinstance(value, (type, torch.Tensor)):
        return
    seen.add(id(value))
    if isinstance(value, nn.Module):
        for path, module in value.named_modules():
            seen.add(id(module))
            yield f"{name}.{path}" if path else name, module
        return
    yield name, value
    if depth:
        for key, attribute in list(vars(value).items()):
            for item_name, item in _items(key, attribute):
                yield from _parts(item, f"{name}.{item_name}", depth - 1, seen)


def _items(key: str, value: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [(f"{key}[{inner!r}]", item) for inner, item in list(value.items())[:64]]
    if isinstance(value, (list, tuple)):
        return [(f"{key}[{inner}]", item) for inner, item in enumerate(value[:64])]
    return [(key, value)]
