"""Hooks that see every call of a module inside a block, and leave nothing behind."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

OnCall = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]
"""``on_call(module, args, kwargs, output)``; answers a `Replaced` where the caller is to get something else than the output."""

OnArguments = Callable[[tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]
"""``on_arguments(args, kwargs)``: the arguments that the module is to get."""


@dataclass(frozen=True, eq=False)
class Replaced:
    """An output in the place of a module's own."""

    output: Any


@contextlib.contextmanager
def hook_calls(module: nn.Module, on_call: OnCall) -> Iterator[None]:
    """Call ``on_call(module, args, kwargs, output)`` after every forward pass of ``module`` inside the block.

    A forward hook, not a replaced ``forward``: offloading libraries replace that themselves, and either would lose the
    other. Hooks are state of the module, so every thread's calls arrive here; the caller has to tell them apart.
    """

    def hook(module: nn.Module, args: tuple[Any, ...], *rest: Any) -> Any:
        # torch keeps the note that a hook wants keywords in a table of its own. A call that another thread, or another
        # hook, makes while this one is being added or removed comes without them; it is not a call of this block.
        if len(rest) != 2:
            return None
        kwargs, output = rest
        with torch.no_grad():
            answer = on_call(module, args, kwargs, output)
        return answer.output if isinstance(answer, Replaced) else None  # None: the module's own object

    hook = _undisturbed(hook)
    handle = module.register_forward_hook(hook, with_kwargs=True)
    del module  # the block must not keep it alive
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def hook_arguments(module: nn.Module, on_arguments: OnArguments) -> Iterator[None]:
    """Let ``on_arguments(args, kwargs)`` change the arguments of every forward pass of ``module`` inside the block."""

    def hook(module: nn.Module, args: tuple[Any, ...], *rest: Any) -> Any:  # noqa: ARG001 -- torch's signature
        if len(rest) != 1:  # as in hook_calls
            return None
        with torch.no_grad():
            return on_arguments(args, rest[0])

    handle = module.register_forward_pre_hook(_undisturbed(hook), with_kwargs=True)
    del module
    try:
        yield
    finally:
        handle.remove()


def _undisturbed(hook: Callable[..., Any]) -> Callable[..., Any]:
    """The hook as a compiled module may carry it."""
    # Dynamo would compile the hook into the graph and recompile at every call, since it keeps state; the function itself
    # must carry the mark (a function that calls a disabled one breaks the graph). Marking imports Dynamo, which takes
    # seconds, and nothing can have been compiled where it is not loaded yet; a process whose very first compilation is
    # made inside the block gets right numbers, but recompiles up to Dynamo's limit. torch 2.13.
    if "torch._dynamo" in sys.modules:
        marked: Callable[..., Any] = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
        return marked
    return hook
