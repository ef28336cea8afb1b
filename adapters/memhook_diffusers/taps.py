"""Seeing what a host object's method is given, without leaving a trace on the object."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

OnUse = Callable[[Any, dict[str, Any]], dict[str, Any] | None]
"""``on_use(owner, arguments by name)``, called before the method itself; may answer arguments to replace, by name."""

_lock = threading.Lock()
_taps: weakref.WeakKeyDictionary[Any, dict[str, _Tap]] = weakref.WeakKeyDictionary()


class _Tap:
    """Stands in for one object's method while there are listeners. One tap serves nested watches and several threads."""

    def __init__(self, owner: Any, name: str, listeners: list[OnUse]) -> None:
        self.listeners = listeners
        self._owner, self._name = weakref.ref(owner), name
        self._replaced = owner.__dict__.get(name)  # somebody else's stand-in on the instance
        self.__signature__ = inspect.signature(getattr(owner, name))  # pipelines look at the signature of `step`
        self._names = [parameter.name for parameter in self.__signature__.parameters.values() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
        functools.update_wrapper(self, getattr(type(owner), name))
        owner.__dict__[name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        owner = self._owner()
        # A few pipelines (Stable Cascade) call with keywords only, and a few schedulers take other arguments in between.
        named = {**dict(zip(self._names, args, strict=False)), **kwargs}
        for listener in tuple(self.listeners):
            changes = listener(owner, named)
            if changes:
                named = {**named, **changes}
                args = tuple(changes.get(name, value) for name, value in zip(self._names, args, strict=False)) + args[len(self._names) :]
                kwargs = {name: changes.get(name, value) for name, value in kwargs.items()}
        method = self._replaced if self._replaced is not None else functools.partial(getattr(type(owner), self._name), owner)
        return method(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Tap:
        # Pipelines copy their scheduler within a run (LTX 2, SkyReels): the copy must step itself, not the original. Others copy
        # only the scheduler's __dict__ and put it back (Panorama).
        owner = self._owner()
        copied = memo.get(id(owner))
        if copied is None or self._replaced is not None:
            return self
        return _Tap(copied, self._name, self.listeners)

    def remove(self, owner: Any) -> None:
        # If somebody wrapped ours in the meantime, theirs stays and ours, without listeners, passes everything through.
        if owner.__dict__.get(self._name) is self:
            if self._replaced is None:
                del owner.__dict__[self._name]
            else:
                owner.__dict__[self._name] = self._replaced


@contextlib.contextmanager
def listen_to(owner: Any, name: str, on_use: OnUse) -> Iterator[None]:
    """Call ``on_use`` before every call of the method ``name`` of ``owner`` inside the block, from whichever thread."""
    with _lock:
        of_owner = _taps.setdefault(owner, {})
        tap = of_owner.get(name)
        if tap is None:
            tap = of_owner[name] = _Tap(owner, name, [])
        tap.listeners.append(on_use)
    del owner
    try:
        yield
    finally:
        with _lock:
            tap.listeners.remove(on_use)
            found = tap._owner()
            if not tap.listeners and found is not None:
                tap.remove(found)
                _taps[found].pop(name, None)
