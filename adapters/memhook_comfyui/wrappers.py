"""ComfyUI's patcher extension: functions around its own, added for a time."""

from __future__ import annotations

import contextlib
import itertools
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

Wrapper = Callable[..., Any]
"""``wrapper(executor, *args, **kwargs)``; ``executor(*args, **kwargs)`` goes on."""

# The values of comfy.patcher_extension.WrappersMP and CallbacksMP, 0.3.64.
OUTER_SAMPLE = "outer_sample"
PREDICT_NOISE = "predict_noise"
CALC_COND_BATCH = "calc_cond_batch"
ON_CLONE = "on_clone"

_numbers = itertools.count()


def new_key() -> str:
    """A key of one's own: several watches of one model do not remove each other's wrappers."""
    return f"memhook-{next(_numbers)}"


def has_wrappers(patcher: Any) -> bool:
    """Whether this version of ComfyUI has the patcher extension (it came in December 2024)."""
    return all(hasattr(patcher, name) for name in ("add_wrapper_with_key", "remove_wrappers_with_key", "wrappers", "callbacks"))


@contextlib.contextmanager
def on_patcher(patcher: Any, kind: str, wrapper: Wrapper) -> Iterator[None]:
    """Wrap every run of ``patcher`` and of its clones that are made inside the block; leave nothing on any of them."""
    key = new_key()
    seen: list[weakref.ref[Any]] = [weakref.ref(patcher)]
    patcher.add_wrapper_with_key(kind, key, wrapper)
    patcher.add_callback_with_key(ON_CLONE, key, lambda _, clone: seen.append(weakref.ref(clone)))
    del patcher  # the block must not keep it alive
    try:
        yield
    finally:
        for reference in seen:
            wrapped = reference()
            if wrapped is not None:
                _remove(wrapped.wrappers, kind, key)
                _remove(wrapped.callbacks, ON_CLONE, key)


@contextlib.contextmanager
def on_run(guider: Any, wrappers: dict[str, Wrapper]) -> Iterator[None]:
    """Wrap what a guider calls in the run that it is in the middle of, by the options that it made for this run alone."""
    key = new_key()
    tables = guider.model_options.setdefault("transformer_options", {}).setdefault("wrappers", {})
    with contextlib.ExitStack() as stack:
        for kind, wrapper in wrappers.items():
            if kind == PREDICT_NOISE and not _wraps_predictions():
                stack.enter_context(_on_method(guider, "predict_noise", wrapper))
            else:
                tables.setdefault(kind, {}).setdefault(key, []).append(wrapper)
                stack.callback(_remove, tables, kind, key)
        yield


def _wraps_predictions() -> bool:
    """Whether there is a wrapper around a guider's evaluations: it came in August 2025, after all others."""
    extension = sys.modules.get("comfy.patcher_extension")
    return extension is None or hasattr(extension.WrappersMP, "PREDICT_NOISE")


@contextlib.contextmanager
def _on_method(owner: Any, name: str, wrapper: Wrapper) -> Iterator[None]:
    """The same by a method of one object, for a time."""
    own, before = getattr(owner, name), vars(owner).get(name)
    setattr(owner, name, lambda *args, **kwargs: wrapper(own, *args, **kwargs))
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def _remove(tables: dict[str, dict[str | None, list[Wrapper]]], kind: str, key: str) -> None:
    table = tables.get(kind, {})
    table.pop(key, None)
    if not table:
        tables.pop(kind, None)
