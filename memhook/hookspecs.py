"""The whole plugin contract: what an adapter is, and the one hook that offers it.

An adapter knows one host (a library or application that runs a guided sampler) and no method. It turns the host's calls
of the denoiser into `Evaluation` objects and hands them to a `Watcher`. ``adapters/README.md`` shows a whole one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import pluggy

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager

    from memhook.capture.intervention import Intervention
    from memhook.capture.prediction import Evaluation
    from memhook.capture.rows import Row

PROJECT = "memhook"  # also the entry-point group

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class Watcher(Protocol):
    """What the core hands to an adapter."""

    @property
    def listening(self) -> bool:
        """Whether a call that happens now belongs to this watch; ask first in every hook (other threads, replays)."""

    @property
    def wants_evaluations(self) -> bool:
        """Whether roles must be decided now and calls kept; otherwise only numbers are wanted."""

    def emit(self, evaluation: Evaluation, row: Row | None = None) -> Intervention | None:
        """Hand over one guided evaluation. May raise, to stop the run: let it pass.

        The answer is None unless somebody wants to change the run, which is asked only of adapters that say ``intervenes = True``.
        """

    def missing(self, reason: str) -> None:
        """Say why evaluations without an unconditional prediction have none, and what the user can do about it."""


@runtime_checkable
class Adapter(Protocol):
    """One host object, ready to be watched.

    An adapter that honors the `Intervention` that `Watcher.emit` may answer says so with a class attribute ``intervenes = True``.
    """

    host: str
    """The host's name, such as ``"diffusers"``."""

    def attach(self, watcher: Watcher) -> AbstractContextManager[None]:
        """Hook the host for the time of a ``with`` block; leave nothing behind, however the block ends."""

    def describe(self) -> Mapping[str, Any]:
        """The setting that a calibration must agree with, as JSON values by field name.

        Asked when the block ends, after `attach` has, and when somebody reads the setting inside of it. An adapter for which that
        would wait for a device may offer ``snapshot()`` as well, which takes the setting and answers a function that reads it later.
        """


@hookspec
def memhook_adapt(target: object) -> Adapter | None:
    """Offer an adapter for ``target``, or None if this plugin does not know its kind.

    Be strict: two plugins that claim one target are an error. Find the host through ``sys.modules`` instead of importing it.
    """
