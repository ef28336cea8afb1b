"""The whole plugin contract: what an adapter and a score are, and the hooks that offer them.

An adapter knows one host (a library or application that runs a guided sampler) and no method. It turns the host's calls
of the denoiser into `Evaluation` objects and hands them to a `Watcher`. ``adapters/README.md`` shows a whole one.

A score knows no host. It makes one number a sample of an `Evaluation`. ``docs/scores.md`` shows a whole one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import pluggy

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from contextlib import AbstractContextManager

    from torch import Tensor

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

    @property
    def wants_roles(self) -> bool:
        """Whether roles must be decided now, so that somebody can tell the two predictions apart; calls need not be kept."""

    def emit(self, evaluation: Evaluation, row: Row | None = None) -> Intervention | None:
        """Hand over one guided evaluation. May raise, to stop the run: let it pass.

        The answer is None unless somebody wants to change the run, which is asked only of adapters that say ``intervenes = True``.
        """

    def missing(self, reason: str) -> None:
        """Say why evaluations without an unconditional prediction have none, and what the user can do about it."""


@runtime_checkable
class Adapter(Protocol):
    """One host object, ready to be watched.

    An adapter that honors the `Intervention` that `Watcher.emit` may answer says so with a class attribute ``intervenes = True``; one whose
    evaluations have more than scores can count on everywhere, with one ``gives``, such as ``frozenset({"attention"})``.
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


@runtime_checkable
class Score(Protocol):
    """A way of turning evaluations into one number a sample; larger is more memorized. A frozen dataclass, or a function.

    A dataclass has its parameters as fields, and the rest as class attributes; `memhook.score` gives them to a function. It may also say
    ``at``: the number of the one evaluation of a run that it is about, from 0; ``paper``: where it was published;
    ``symmetric = True``: it is the same whichever of the two predictions is the conditional one.
    """

    name: str
    needs: str | tuple[str, ...]
    """What it is made of: any of ``"pair"`` (both predictions), ``"previous"`` (the evaluation before), ``"first"`` (the run's first),
    ``"history"`` (the run's magnitudes so far, ``(k, b)``), or what an adapter says that it
    ``gives``: ``"sample gradient"``, ``"attention"``, ``"decoded"``."""

    def __call__(self, evaluation: Evaluation, /, *others: Any) -> Tensor | None:
        """``(b,)`` on the device of the predictions, without waiting for it; None where there is none for this evaluation.

        ``others`` are the previous evaluation, the first and the history, as far as ``needs`` names them, in its order.
        """


@hookspec
def memhook_scores() -> Iterable[Score]:  # type: ignore[empty-body]
    """Offer scores, which are then known by name in `memhook.watch`, in the commands and in ``memhook methods``."""
