"""Tensors made under ``torch.inference_mode``, as ones that autograd may keep.

ComfyUI runs every node under inference_mode, so weights, prompts and latents that a node made are inference tensors for good, and
autograd refuses to save them. A new tensor on the same storage, made outside of that mode, is an ordinary one: nothing is copied.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from memhook.adapting.tensors import map_tensors

_lock = threading.RLock()


def thawed(tensor: Tensor) -> Tensor:
    """The tensor itself, or an ordinary one on the same memory."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(mode=False), torch.no_grad():
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
            return tensor.clone()  # quantized weights and the like know themselves how
        alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return alias.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def thawed_tree(tree: Any) -> Any:
    """`thawed` for every tensor in nested containers; a container without one that needs it is kept as it is."""
    needed: list[bool] = []

    def look(tensor: Tensor) -> Tensor:
        needed.append(tensor.is_inference())
        return tensor

    map_tensors(tree, look)
    return map_tensors(tree, thawed) if any(needed) else tree


def with_tensors(held: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy of a conditioning object (comfy.conds.CONDRegular and its kin) whose tensors are changed."""
    if not hasattr(held, "cond"):
        return held
    changed = copy.copy(held)
    changed.cond = map_tensors(held.cond, change)
    return changed


@contextlib.contextmanager
def thawed_modules(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Parameters, buffers and other tensors of the modules are ordinary tensors inside the block, and the old objects after it."""
    undo: list[tuple[dict[str, Any], str, Any]] = []
    with _lock:
        try:
            for module in modules:
                for part in module.modules():
                    # The tables themselves: setattr would not put an old object back as it was.
                    tables: tuple[dict[str, Any], ...] = (part._parameters, part._buffers, part.__dict__)
                    for table in tables:
                        for name, value in list(table.items()):
                            if isinstance(value, Tensor) and value.is_inference():
                                undo.append((table, name, value))
                                alias = thawed(value)
                                table[name] = nn.Parameter(alias, requires_grad=False) if isinstance(value, nn.Parameter) else alias
            yield
        finally:
            for table, name, value in reversed(undo):
                table[name] = value
