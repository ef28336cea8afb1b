"""Gradient checkpointing of any model's repeated blocks, for the time of a replay."""

from __future__ import annotations

import contextlib
import threading
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from memhook.errors import MemhookError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_wanted: ContextVar[list[nn.Module] | None] = ContextVar("memhook_checkpointing", default=None)
_lock = threading.RLock()


@contextlib.contextmanager
def checkpointing() -> Iterator[None]:
    """Replays inside the block recompute their blocks' activations.

    Raises:
        MemhookError: Nothing was replayed, so nothing was saved: the objective is not that of a captured call.
    """
    replayed: list[nn.Module] = []
    token = _wanted.set(replayed)
    try:
        yield
    finally:
        _wanted.reset(token)
    if not replayed:
        raise MemhookError(
            "checkpoint=True needs an objective that replays a captured call (Evaluation.objective); checkpoint inside your own function instead"
        )


@contextlib.contextmanager
def checkpointed(module: nn.Module, around: Callable[[], contextlib.AbstractContextManager[None]]) -> Iterator[None]:
    """Checkpoint the blocks of ``module`` inside the block if that was asked for, and leave it as it was.

    Args:
        module: The denoiser.
        around: The context that blocks are to run in; entered again when they are recomputed, long after the call.
    """
    replayed = _wanted.get()
    if replayed is None:
        yield
        return
    blocks = find_blocks(module)
    if not blocks:
        raise MemhookError(f"{type(module).__qualname__} has no list of repeated blocks (nn.ModuleList) to checkpoint; leave checkpoint=True out")
    replayed.append(module)
    with _lock, contextlib.ExitStack() as stack:
        for block in blocks:
            stack.enter_context(_checkpointed_block(block, around))
        yield


@contextlib.contextmanager
def _checkpointed_block(block: nn.Module, around: Callable[[], contextlib.AbstractContextManager[None]]) -> Iterator[None]:
    # Not a hook: no hook can keep a module from running its forward as it is. An offloading library's replacement of it is an
    # attribute of the instance as well; it is called through, and put back.
    own = block.__dict__.get("forward")
    forward = block.forward

    def again(*args: Any, **kwargs: Any) -> Any:
        with around():
            return forward(*args, **kwargs)

    def forward_checkpointed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(again, *args, use_reentrant=False, **kwargs)

    block.forward = forward_checkpointed
    try:
        yield
    finally:
        if own is None:
            del block.forward
        else:
            block.forward = own


def find_blocks(module: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a model: members of its module lists, the smallest that still are more than a layer or two.

    A UNet's stages hold lists of residual and attention blocks, which are taken; a transformer block holds lists of single layers
    (``to_out``), so it is taken whole.
    """
    found: list[nn.Module] = []
    for child in module.children():
        inner = find_blocks(child)
        if not inner and isinstance(module, nn.ModuleList) and _is_block(child):
            inner = [child]
        found += inner
    return found


def _is_block(module: nn.Module) -> bool:
    """Whether a module has at least three layers with parameters of their own."""
    layers = [part for part in module.modules() if part is not module and next(part.parameters(recurse=False), None) is not None]
    return len(layers) >= 3
