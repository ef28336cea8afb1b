"""`watch` a run, or `probe` its first evaluations."""

from __future__ import annotations

import contextlib
import itertools
from contextvars import ContextVar
from typing import TYPE_CHECKING, Literal

from memhook.capture.intervention import Intervention
from memhook.capture.scoring import check_needs
from memhook.capture.trace import Row, Trace
from memhook.capture.unrecorded import replaying
from memhook.errors import MemhookError, MemorizationDetectedError
from memhook.plugins import find_adapter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from memhook.capture.prediction import Evaluation
    from memhook.errors import Verdict
    from memhook.hookspecs import Adapter, Score

# The watches that the current thread or task is inside of. A context variable, because a hook on a module sees the calls
# of every thread: only calls made from inside a watch's own block may be recorded by it.
_inside: ContextVar[frozenset[int]] = ContextVar("memhook_inside", default=frozenset())
_numbers = itertools.count()


class _Watcher:
    """The core's side of `memhook.hookspecs.Watcher`."""

    def __init__(
        self,
        trace: Trace,
        *,
        wants_evaluations: Callable[[], bool],
        on_evaluation: Callable[[Evaluation], Intervention | None] | None,
        stop_when: Callable[[Trace], Verdict | None] | None,
        may_intervene: bool,
    ) -> None:
        self.number = next(_numbers)
        self.trace = trace
        self._wants_evaluations = wants_evaluations
        self._on_evaluation = on_evaluation
        self._stop_when = stop_when
        self._may_intervene = may_intervene

    @property
    def listening(self) -> bool:
        return self.number in _inside.get() and not replaying()

    @property
    def wants_evaluations(self) -> bool:
        return self._wants_evaluations() or self.trace.scoring.wants_calls()

    @property
    def wants_roles(self) -> bool:
        return self.wants_evaluations or self.trace.scoring.wants_roles()

    def emit(self, evaluation: Evaluation, row: Row | None = None) -> Intervention | None:
        self.trace.add(evaluation, row)
        answer = self._on_evaluation(evaluation) if self._on_evaluation is not None else None
        if self._stop_when is not None:
            detection = self._stop_when(self.trace)
            if detection is not None:
                raise MemorizationDetectedError(f"stopped after {len(self.trace)} evaluations: {detection}", trace=self.trace, detection=detection)
        if not isinstance(answer, Intervention):  # callbacks are free to return anything else
            return None
        if not self._may_intervene:
            raise MemhookError(cannot_intervene(self.trace.host))
        answer.check(evaluation)
        return answer

    def missing(self, reason: str) -> None:
        self.trace.missing(reason)


def cannot_intervene(host: str) -> str:
    """The message for adapters that only watch."""
    return f"the adapter for {host} only watches and cannot change a run; stop the run instead, or watch its denoiser with memhook.ModuleAdapter"


@contextlib.contextmanager
def attached(
    adapter: Adapter,
    trace: Trace,
    *,
    wants_evaluations: Callable[[], bool],
    on_evaluation: Callable[[Evaluation], Intervention | None] | None,
    stop_when: Callable[[Trace], Verdict | None] | None = None,
) -> Iterator[None]:
    """Fill ``trace`` while the block runs, and keep its setting when it ends; what `watch` and `memhook.guard` share."""
    watcher = _Watcher(
        trace,
        wants_evaluations=wants_evaluations,
        on_evaluation=on_evaluation,
        stop_when=stop_when,
        may_intervene=bool(getattr(adapter, "intervenes", False)),
    )
    check_needs(trace.scoring.scores, adapter)
    with _setting_kept(adapter, trace), adapter.attach(watcher):
        _inside.set(_inside.get() | {watcher.number})
        try:
            yield
        finally:
            _inside.set(_inside.get() - {watcher.number})
            trace.scoring.forget()


@contextlib.contextmanager
def _setting_kept(adapter: Adapter, trace: Trace) -> Iterator[None]:
    """Keep the setting once the block has ended, however it does, if there is a run that it could be asked for."""
    try:
        yield
    except GeneratorExit:  # abandoned, and closed by the garbage collector: no time for more than that
        raise
    except BaseException:
        _keep_setting(adapter, trace)
        raise
    _keep_setting(adapter, trace)


def _keep_setting(adapter: Adapter, trace: Trace) -> None:
    if len(trace):
        trace.keep_setting(getattr(adapter, "snapshot", None))


@contextlib.contextmanager
def watch(
    target: object,
    *,
    adapter: Adapter | None = None,
    keep: Literal["scalars", "calls"] = "scalars",
    score: Score | str | Iterable[Score | str] | None = None,
    on_evaluation: Callable[[Evaluation], Intervention | None] | None = None,
    stop_when: Callable[[Trace], Verdict | None] | None = None,
) -> Iterator[Trace]:
    """Watch every guided evaluation that runs inside the block. The host's results do not change by a bit.

    By default ``b`` numbers are kept per evaluation, no prediction, and the device is never waited for until a number is
    read. Hooks are removed when the block ends, however it ends. Only calls made by the thread (or task) that entered
    the block are seen.

    Args:
        target: What runs the guided sampler: a diffusers pipeline, or whatever an installed adapter knows.
        adapter: The adapter to use, for targets that none claims (see `memhook.ModuleAdapter`).
        keep: ``"calls"`` also keeps predictions and what `Evaluation.replay` needs, one call's tensors an evaluation.
        score: What to compute while the run goes on, beside the magnitude: a score or several, by name (``memhook methods``) or as they
            are (`memhook.hookspecs.Score`). Read them as `Trace.scores`; the first is what `calibrate` takes.
        on_evaluation: Called with every `Evaluation` while the run goes on. May answer an `Intervention`, which changes the run.
        stop_when: Called with the trace after every evaluation; answers a `Detection` to stop the run.

    Yields:
        The `Trace`, filled while the run goes on and readable at any time.

    Raises:
        NoAdapterError: No adapter knows the target.
        MemorizationDetectedError: ``stop_when`` answered; carries trace and detection.
        MemhookError: There is no such score, or it needs what the host cannot give.
    """
    if keep not in ("scalars", "calls"):
        raise MemhookError(f'keep is {keep!r}; expected "scalars" or "calls"')
    adapter = adapter if adapter is not None else find_adapter(target)
    del target  # the block must not keep it alive
    trace = Trace(host=adapter.host, keep_evaluations=keep == "calls", describe=adapter.describe, score=score)
    keeps = keep == "calls" or on_evaluation is not None
    with attached(adapter, trace, wants_evaluations=lambda: keeps, on_evaluation=on_evaluation, stop_when=stop_when):
        yield trace


class EnoughSeen(BaseException):
    """Ends a probed run; not an `Exception`, so that hosts which catch those let it pass."""


def probe(
    target: object,
    run: Callable[[], object],
    *,
    evaluations: int = 1,
    adapter: Adapter | None = None,
    score: Score | str | Iterable[Score | str] | None = None,
) -> Trace:
    """Run a sampler only as far as its first guided evaluations, keeping their calls.

    Args:
        target: What to watch, as in `watch`.
        run: Starts the sampler, such as ``lambda: pipeline("a prompt", generator=...)``. It is interrupted by an exception
            once enough was seen (its result is lost), and returns by itself if it ends earlier.
        evaluations: How many evaluations to see; 1 or more. Those without an unconditional prediction count too.
        adapter: As in `watch`.
        score: As in `watch`.

    Returns:
        A `Trace` with `Trace.evaluations`.
    """
    if evaluations < 1:
        raise MemhookError(f"evaluations is {evaluations}; expected 1 or more")

    seen = itertools.count(1)

    def stop_in_time(_: Evaluation) -> None:
        if next(seen) >= evaluations:
            raise EnoughSeen

    with contextlib.suppress(EnoughSeen), watch(target, adapter=adapter, keep="calls", score=score, on_evaluation=stop_in_time) as trace:
        run()
    return trace
