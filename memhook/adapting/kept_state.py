"""What a model keeps between its calls (caches of attention and of blocks), put aside while a call is made again.

A replay is a call that the host does not know of. Whatever a cache would take from it, or give to it, belongs to the run: inside
`set_aside` every cache is empty, so that everything is computed, and afterwards it is as it was.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

_DEPTH = 4  # of functions around functions in which a helper object is looked for
_CONTEXT = "memhook"


@contextlib.contextmanager
def set_aside(module: nn.Module) -> Iterator[None]:
    """Inside the block the caches in ``module`` are empty; afterwards they hold what they held before.

    Known are diffusers' caches (pyramid attention broadcast, FasterCache, first-block cache, TaylorSeer, MagCache and others: the state
    of the hooks in ``module._diffusers_hook``), and helper objects of replaced ``forward`` methods (DeepCache), whose attributes
    are restored.
    """
    holders = [*_hook_states(module), *_helpers(module)]
    before = [(holder, dict(vars(holder)), {name: _shallow(value) for name, value in vars(holder).items()}) for holder, _ in holders]
    try:
        for holder, is_hook_state in holders:
            if is_hook_state:
                _empty(holder)
        yield
    finally:
        for holder, same, contents in before:
            for name, value in same.items():
                _refill(value, contents[name])
            vars(holder).update(same)
            for name in vars(holder).keys() - same.keys():
                del vars(holder)[name]


def keeps_state(module: nn.Module) -> bool:
    """Whether the model has a cache that `set_aside` knows."""
    return any(True for _ in _hook_states(module)) or any(True for _ in _helpers(module))


def _hook_states(module: nn.Module) -> Iterator[tuple[Any, bool]]:
    """State objects of diffusers' model hooks, each once; a manager's own states are its contents."""
    seen = set()
    for part in module.modules():
        registry = getattr(part, "_diffusers_hook", None)
        for hook in getattr(registry, "hooks", {}).values():
            for value in list(vars(hook).values()):
                is_state = hasattr(value, "_state_cache") or (type(value).__name__.endswith("State") and callable(getattr(value, "reset", None)))
                if is_state and hasattr(value, "__dict__") and id(value) not in seen:
                    seen.add(id(value))
                    yield value, True


def _helpers(module: nn.Module) -> Iterator[tuple[Any, bool]]:
    """Objects that replaced ``forward`` methods close over, each once. accelerate's and diffusers' own replacements keep nothing there."""
    seen: set[int] = set()
    for part in module.modules():
        forward = vars(part).get("forward")
        if forward is None or hasattr(part, "_hf_hook") or hasattr(part, "_diffusers_hook"):
            continue
        for found in _closed_over(forward, _DEPTH):
            if id(found) not in seen:
                seen.add(id(found))
                yield found, False


def _closed_over(function: Any, depth: int) -> Iterator[Any]:
    if depth == 0:
        return
    if isinstance(function, MethodType):
        values = [function.__self__, function.__func__]
    elif isinstance(function, FunctionType):
        values = [cell.cell_contents for cell in function.__closure__ or () if _filled(cell)]
    else:
        values = [getattr(function, "func", None), *getattr(function, "args", ())]  # functools.partial
    for value in values:
        if isinstance(value, (FunctionType, MethodType)):
            yield from _closed_over(value, depth - 1)
        elif not isinstance(value, (nn.Module, Tensor, type)) and not inspect.ismodule(value) and hasattr(value, "__dict__"):
            yield value


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018 -- asked for its error
    except ValueError:
        return False
    return True


def _empty(state: Any) -> None:
    """Make a state what it is before the first call; one that is shared by name gets a name of its own."""
    if not hasattr(state, "_state_cache"):
        state.reset()
        return
    state._state_cache = {}
    if hasattr(state, "_context"):
        context = getattr(sys.modules.get(type(state).__module__), "CacheContext", None)
        state._context = context(_CONTEXT) if context is not None else _CONTEXT
    elif hasattr(state, "_current_context"):  # diffusers below 0.40
        state._current_context = _CONTEXT


def _shallow(value: Any) -> Any:
    """The contents of a dict or list (no subclass: those may refuse changes), which may be changed in place."""
    if type(value) is dict:
        return {key: _shallow(item) if type(item) in (dict, list) else item for key, item in value.items()}
    if type(value) is list:
        return [_shallow(item) if type(item) in (dict, list) else item for item in value]
    return value


def _refill(container: Any, contents: Any) -> None:
    """Put the contents back into the same dict or list."""
    if type(container) is dict:
        kept = {key: container.get(key) for key in contents}
        inner = {key: kept[key] if type(item) in (dict, list) and type(kept[key]) is type(item) else item for key, item in contents.items()}
        for key, item in contents.items():
            _refill(inner[key], item)
        container.clear()
        container.update(inner)
    elif type(container) is list:
        container[:] = contents
