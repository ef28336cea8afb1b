"""Hooks that see every call of a module inside a block, and leave nothing behind."""

from __future__ import annotations

import contextlib
import dis
import gc
import sys
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from memhook.adapting.copies import CleanCopies, How
from memhook.adapting.listeners import Listeners

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

    All blocks around one module share one hook in torch's table, at the place that the first of them took: only the
    first to begin and the last to end change the table. Copies of the module are made without it.
    """
    with _hooked(module, _AFTER, on_call):
        del module  # the block must not keep it alive
        yield


@contextlib.contextmanager
def hook_arguments(module: nn.Module, on_arguments: OnArguments) -> Iterator[None]:
    """Let ``on_arguments(args, kwargs)`` change the arguments of every forward pass of ``module`` inside the block. Shared as in `hook_calls`."""
    with _hooked(module, _BEFORE, on_arguments):
        del module
        yield


_AFTER = ("_forward_hooks", "_forward_hooks_with_kwargs")
_BEFORE = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")

_MARK = "_of_memhook"

# Held only while tables change; reentrant, since the collector may close a block wherever memory is allocated.
_lock = threading.RLock()
_shared: dict[tuple[int, str], _SharedHook] = {}


class _Block:
    """One block's listener, and the hook that calls it."""

    def __init__(self, listener: Callable[..., Any]) -> None:
        self.listener = listener
        self.hook: _SharedHook | None = None


class _SharedHook:
    """The hook that all blocks around a module share."""

    def __init__(self, module: nn.Module, tables: tuple[str, str]) -> None:
        self.key = id(module), tables[0]
        self.module = weakref.ref(module)
        self.blocks: Listeners[_Block] = Listeners()
        # Held strongly, the module not: torch's own handle loses its tables to the collector before a block that is
        # in one reference cycle with the module, and then removes nothing.
        self.table, self.with_kwargs = (getattr(module, name) for name in tables)
        self._id = RemovableHandle(self.table).id
        self._copies = CleanCopies(type(module), _without_hooks)
        self._function = _undisturbed((_called_after if tables is _AFTER else _called_before)(self))
        setattr(self._function, _MARK, True)

    def put_in(self, *, at_once: bool) -> bool:
        """Put the hook into torch's tables; False where this is not the moment."""
        self._copies.begin()
        self.with_kwargs[self._id] = True  # first, so that no call of another thread sees the one without the other
        if not at_once and _collecting():
            return False
        self.table[self._id] = self._function
        _shared[self.key] = self
        return True

    def take_out(self, *, at_once: bool) -> bool:
        """Take the hook out of torch's tables; False where this is not the moment."""
        if self._id in self.table and not at_once and _collecting():
            return False
        self.table.pop(self._id, None)
        self.with_kwargs.pop(self._id, None)
        self._copies.end()
        if _shared.get(self.key) is self:
            _shared.pop(self.key, None)
        return True


@contextlib.contextmanager
def _hooked(module: nn.Module, tables: tuple[str, str], listener: Callable[..., Any]) -> Iterator[None]:
    block = _Block(listener)
    try:
        try:
            _begin(module, tables, block)
            del module
            yield
        finally:
            _end(block)
    finally:
        _end(block)  # once more: a signal may have interrupted the first


def _begin(module: nn.Module, tables: tuple[str, str], block: _Block) -> None:
    fresh = _SharedHook(module, tables)
    for at_once in _Attempts():
        with _lock:
            hook = _shared.get(fresh.key)
            known = hook is not None and hook.module() is module
            block.hook = hook = hook if known and hook is not None else fresh
            hook.blocks.add(block)
            if (known or hook.put_in(at_once=at_once)) and _shared.get(fresh.key) is hook:
                return
            hook.blocks.remove(block)  # not now; or its last block has ended in between


def _end(block: _Block) -> None:
    if block.hook is not None:
        block.hook.blocks.remove(block)
        _leave(block.hook)


def _leave(hook: _SharedHook) -> None:
    """Take the hook out of torch's tables if no block is left."""
    closed = sys.exc_info()[0] is GeneratorExit  # perhaps by the collector, whose end nobody can wait for in here
    for at_once in _Attempts(0.0 if closed else _PATIENCE):
        with _lock:
            # Where that happens in the middle of torch's copying, the hook leaves at its next call.
            if hook.blocks.now or _copying_here(hook.module()) or hook.take_out(at_once=at_once):
                return


def _called_after(shared: _SharedHook) -> Callable[..., Any]:
    @torch.no_grad()
    def hook(module: nn.Module, args: tuple[Any, ...], *rest: Any) -> Any:
        # torch keeps the note that a hook wants keywords in a table of its own. A call that another thread, or another
        # hook, makes while this one is being added or removed comes without them; it is not a call of this block.
        if len(rest) != 2 or not _active(shared, module._forward_hooks):
            return None
        kwargs, output = rest
        replaced = None  # None: the module's own object
        for block in shared.blocks.now:
            answer = block.listener(module, args, kwargs, output)
            if isinstance(answer, Replaced):
                replaced = output = answer.output
        return replaced

    return hook


def _called_before(shared: _SharedHook) -> Callable[..., Any]:
    @torch.no_grad()
    def hook(module: nn.Module, args: tuple[Any, ...], *rest: Any) -> Any:
        if len(rest) != 1 or not _active(shared, module._forward_pre_hooks):  # as in _called_after
            return None
        kwargs = rest[0]
        for block in shared.blocks.now:
            args, kwargs = block.listener(args, kwargs)
        return args, kwargs

    return hook


def _active(shared: _SharedHook, table: Any) -> bool:
    """Whether the hook is called where it belongs and by blocks that still are; else it leaves."""
    if table is not shared.table:  # the class copied its state in a way of its own
        table.pop(shared._id, None)
        return False
    if not shared.blocks.now:
        _leave(shared)
        return False
    return True


def _without_hooks(_: nn.Module, reduced: tuple[Any, ...], how: How) -> tuple[Any, ...]:
    """What a copy of a module is made of, without hooks of memhook's."""
    if how == "copy":
        return reduced  # a shallow copy shares its tables with the original, so it is clean when that is
    return tuple(_cleaned(part) if index < 3 else part for index, part in enumerate(reduced))


def _cleaned(part: Any) -> Any:
    """A state dictionary, alone or in a tuple, with other tables where they hold a hook of memhook's."""
    if isinstance(part, tuple):
        return tuple(_cleaned(item) for item in part) if type(part) is tuple else part
    if type(part) is not dict or _AFTER[0] not in part:
        return part
    part = dict(part)
    for name, with_kwargs in (_AFTER, _BEFORE):
        table = part.get(name)
        if isinstance(table, dict):
            ours = [key for key, hook in list(table.items()) if getattr(hook, _MARK, False)]
            for changed in (name, with_kwargs) if ours else ():
                part[changed] = OrderedDict((key, value) for key, value in list(part[changed].items()) if key not in ours)
    return part


# torch copies a module's tables of hooks at every call. Up to Python 3.11 the collector may run in the middle of that, and with it
# whatever it closes, and other threads; a table that changes then ends the call with an error. From 3.12 on it runs between instructions only.
_COLLECTS_ANYWHERE = sys.version_info < (3, 12)
_PATIENCE = 5.0  # seconds
_MODULE_FILE = nn.Module.__call__.__code__.co_filename
_COPY = dis.opmap["LIST_EXTEND"]


class _Attempts:
    """Attempts at changing a table: whether to do it at once, or only while no collection goes on in another thread.

    No generator: one that is dropped half-way is closed by the interpreter, which swallows a signal that arrives just then.
    """

    def __init__(self, patience: float = _PATIENCE) -> None:
        self._until = time.monotonic() + patience
        self._again = False

    def __iter__(self) -> _Attempts:
        return self

    def __next__(self) -> bool:
        if time.monotonic() >= self._until:
            return True
        if self._again:
            time.sleep(0)
        self._again = True
        return not _COLLECTS_ANYWHERE or threading.active_count() == 1


def _collecting() -> bool:
    before = gc.get_stats()[0]["collections"]
    gc.collect(0)  # does nothing while another one goes on
    return bool(gc.get_stats()[0]["collections"] == before)


def _copying_here(module: nn.Module | None) -> bool:
    """Whether this thread is in the middle of copying the module's tables."""
    frame = sys._getframe() if _COLLECTS_ANYWHERE and module is not None else None
    while frame is not None:
        code = frame.f_code
        if code.co_filename == _MODULE_FILE and code.co_code[frame.f_lasti] == _COPY and frame.f_locals.get("self") is module:
            return True
        frame = frame.f_back
    return False


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
