"""The scores that memhook offers by name, as a plugin like any other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memhook.capture.scoring import Magnitude
from memhook.hookspecs import hookimpl
from memhook.scores.dsm import Dsm
from memhook.scores.transition import TransitionPoint

if TYPE_CHECKING:
    from collections.abc import Iterable

PUBLISHED: tuple[Any, ...] = (Magnitude(), Dsm(), TransitionPoint())
"""Scores that need nothing but their published parameters; those that are made of something (a mask, a spectrum) are given as they are."""


@hookimpl
def memhook_scores() -> Iterable[Any]:
    """The published scores."""
    return PUBLISHED
