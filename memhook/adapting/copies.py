"""What copies and pickles of an object are made of while memhook is attached to it: without memhook."""

from __future__ import annotations

import copy
import copyreg
import sys
import threading
from collections.abc import Callable
from typing import Any, Literal

from memhook.adapting.listeners import Listeners

How = Literal["copy", "deepcopy", "pickle"]

Edit = Callable[[Any, tuple[Any, ...], How], tuple[Any, ...]]
"""``edit(original, reduced, how)``: what the copy is to be made of, in the form of ``object.__reduce__``."""

_lock = threading.RLock()
_reducers: dict[type, _Reducer] = {}
_WAYS: dict[Any, How] = {copy.copy.__code__: "copy", copy.deepcopy.__code__: "deepcopy"}


class CleanCopies:
    """From `begin` to `end`, copies of objects of exactly this class are made of what ``edit`` makes of their parts.

    Both may be called again without harm, and in the middle of each other: by a signal, or by the garbage collector.
    """

    def __init__(self, kind: type, edit: Edit) -> None:
        self._kind, self.edit = kind, edit

    def begin(self) -> None:
        while True:
            fresh = _Reducer(self._kind)
            with _lock:
                reducer = _reducers.setdefault(self._kind, fresh)
                reducer.edits.add(self)
                copyreg.dispatch_table[self._kind] = reducer
                if _reducers.get(self._kind) is reducer:  # else the last of the others has left in between
                    return
                reducer.edits.remove(self)

    def end(self) -> None:
        with _lock:
            reducer = _reducers.get(self._kind)
            if reducer is None:
                return
            reducer.edits.remove(self)
            if not reducer.edits.now:
                previous = reducer.previous
                if copyreg.dispatch_table.get(self._kind) is not reducer:
                    pass  # somebody put theirs around ours, which passes everything through
                elif previous is None:
                    copyreg.dispatch_table.pop(self._kind, None)
                else:
                    copyreg.dispatch_table[self._kind] = previous
                _reducers.pop(self._kind, None)  # last: what a signal interrupts before that is done again


class _Reducer:
    """Stands in `copyreg.dispatch_table`, which `copy` and `pickle` ask before they ask the object."""

    def __init__(self, kind: type) -> None:
        self.edits: Listeners[CleanCopies] = Listeners()
        self.previous: Callable[[Any], Any] | None = copyreg.dispatch_table.get(kind)

    def __call__(self, original: Any) -> Any:
        how = _WAYS.get(sys._getframe(1).f_code, "pickle")
        reduced = original.__reduce_ex__(2) if self.previous is None else self.previous(original)
        if isinstance(reduced, tuple):  # a string names a global
            for edit in dict.fromkeys(block.edit for block in self.edits.now):
                reduced = edit(original, reduced, how)
        return reduced
