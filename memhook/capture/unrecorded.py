"""Calls that no watch may record: those that memhook makes itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

_replaying: ContextVar[bool] = ContextVar("memhook_replaying", default=False)


def replaying() -> bool:
    """Whether the current thread is inside a replay, whose calls no watch may record."""
    return _replaying.get()


@contextlib.contextmanager
def unrecorded() -> Iterator[None]:
    """Calls inside the block are recorded by no watch."""
    token = _replaying.set(True)
    try:
        yield
    finally:
        _replaying.reset(token)
