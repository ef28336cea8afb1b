"""What a score can need, and what every host gives."""

from __future__ import annotations

from typing import Literal

Need = Literal["pair", "previous", "first", "history", "sample gradient", "attention", "decoded"]
"""See `memhook.hookspecs.Score.needs`."""

GIVEN_BY_ALL: frozenset[str] = frozenset({"pair", "previous", "first", "history"})
"""What every adapter gives. An adapter that gives more says so with a class attribute ``gives``."""
