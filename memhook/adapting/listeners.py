"""Who listens, as a list that may change at any moment: from other threads, from signals, from the garbage collector."""

from __future__ import annotations

from typing import Generic, TypeVar

T = TypeVar("T")


class Listeners(Generic[T]):
    """An immutable tuple that is exchanged for another one.

    The garbage collector may close an abandoned block, which removes its listener, wherever memory is allocated: also while
    another listener is being added in the same thread, where no lock helps. So what is new is built first, and takes
    its place only if nothing has happened meanwhile. Between this comparison and the assignment CPython runs no other code.
    """

    def __init__(self) -> None:
        self.now: tuple[T, ...] = ()

    def add(self, listener: T) -> None:
        while True:
            before = self.now
            after = (*before, listener)
            if self.now is before:
                self.now = after
                return

    def remove(self, listener: T) -> None:
        """Remove it if it is there; equality is identity."""
        while True:
            before = self.now
            after = tuple(other for other in before if other is not listener)
            if self.now is before:
                self.now = after
                return
