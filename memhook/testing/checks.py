"""The checks of the conformance suite: what has to hold for every adapter, one function each.

Each raises `AssertionError` with what was seen, what was expected, and which mistake usually causes it.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from memhook.capture.prediction import Evaluation, magnitude
from memhook.capture.watching import watch
from memhook.errors import GuidanceLayoutError, MemhookError, NoGuidanceError
from memhook.testing.state import changes, snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from memhook.capture.trace import Trace
    from memhook.hookspecs import Adapter

_TOLERANCE = 1e-3  # relative; batches of another size take other kernels


class Run(Protocol):
    """Runs the host's sampler once."""

    def __call__(self, prompts: Sequence[str], *, guided: bool = True) -> Tensor:
        """One sample per prompt, all from the same initial noise; returns what the host returns, as a tensor.

        The empty prompt stands for the unconditional one: as a prompt it must be conditioned exactly like the
        unconditional branch. With ``guided=False`` the run is made without classifier-free guidance.
        """


@dataclass(frozen=True)
class Case:
    """A host to try an adapter on.

    Attributes:
        target: What is watched.
        run: Runs its sampler.
        evaluations: How many guided evaluations one guided run makes.
        adapter: Makes the adapter for the target; None to have it found through its entry point.
        replayable: Whether evaluations can be replayed.
        prompts: Two prompts that differ.
        imports: ``(adapter's module, host's module)``: importing the first must not import the second. None to skip.
    """

    target: object
    run: Run
    evaluations: int
    adapter: Callable[[object], Adapter] | None = None
    replayable: bool = True
    prompts: tuple[str, str] = ("a lighthouse at dusk", "two red apples")
    imports: tuple[str, str] | None = None

    def watch(self, **options: Any) -> Any:
        """`memhook.watch` on the target."""
        return watch(self.target, adapter=None if self.adapter is None else self.adapter(self.target), **options)

    def trace(self, prompts: Sequence[str], *, guided: bool = True, **options: Any) -> Trace:
        """Watch one run."""
        with self.watch(**options) as trace:
            self.run(prompts, guided=guided)
        found: Trace = trace
        return found


def outputs_identical(case: Case) -> None:
    """Watching changes no bit of what the host returns, however much is kept."""
    plain, again = case.run(case.prompts), case.run(case.prompts)
    _require(torch.equal(plain, again), "two unwatched runs differ, so nothing can be said about a watched one; fix the noise in `run`")
    for keep in ("scalars", "calls"):
        with case.watch(keep=keep):
            watched = case.run(case.prompts)
        _require(
            torch.equal(plain, watched),
            f"a run watched with keep={keep!r} returns something else than an unwatched one; touch no output, draw no random number",
        )


def nothing_left_behind(case: Case) -> None:
    """Hooks and replaced methods are gone when the block ends: normally, by an exception in it, or by one from inside the run."""

    class Stop(BaseException):
        pass

    def stop(_: Evaluation) -> None:
        raise Stop

    before = snapshot(case.target)
    case.trace(case.prompts)
    _same_state(before, snapshot(case.target), "a normal run")
    try:
        with case.watch():
            raise Stop  # noqa: TRY301 -- the exception is the point
    except Stop:
        pass
    _same_state(before, snapshot(case.target), "an exception inside the block")
    try:
        case.trace(case.prompts, on_evaluation=stop)
    except Stop:
        pass
    else:
        raise AssertionError("an exception raised at an evaluation did not come out of the run; an adapter must let pass what `emit` raises")
    _same_state(before, snapshot(case.target), "an exception from inside the run")


def evaluations_counted(case: Case) -> None:
    """There is one row per guided evaluation, with finite, positive magnitudes that agree with the kept predictions."""
    trace = case.trace(case.prompts, keep="calls")
    shape, expected = trace.magnitudes.shape, (case.evaluations, len(case.prompts))
    _require(
        shape == expected,
        f"the trace has shape {shape}; expected (evaluations, samples) = {expected}. Evaluations are lost, doubled, or split at the wrong place",
    )
    _require(
        bool((trace.magnitudes > 0).all()),
        f"magnitudes are not all positive: {trace.magnitudes}; the two predictions of a pair may be one and the same",
    )
    for index, evaluation in enumerate(trace.evaluations):
        again = magnitude(evaluation.pred_cond, evaluation.pred_uncond).cpu().numpy()  # type: ignore[arg-type]
        _close(again, trace.magnitudes[index], f"evaluation {index}: the magnitude of the kept predictions differs from the recorded one")


def watches_agree(case: Case) -> None:
    """A watch inside a watch, and a second run, see the same numbers."""
    with case.watch() as outer, case.watch() as inner:
        case.run(case.prompts)
    _close(inner.magnitudes, outer.magnitudes, "two nested watches disagree; state of a watch must not live on the adapter's class or on the host")
    _close(case.trace(case.prompts).magnitudes, outer.magnitudes, "a second watch of the same run disagrees with the first")


def other_threads_ignored(case: Case) -> None:
    """A run in another thread is not recorded by a watch of this one."""
    with case.watch() as trace:
        thread = threading.Thread(target=case.run, args=(case.prompts,))
        thread.start()
        thread.join()
    _require(len(trace) == 0, f"{len(trace)} evaluations of another thread's run were recorded; ask `watcher.listening` in every hook")


def batch_is_its_samples(case: Case) -> None:
    """A batch of two prompts gives each the numbers that it has alone: rows go to the right sample."""
    together = case.trace(case.prompts).magnitudes
    alone = np.concatenate([case.trace([prompt]).magnitudes for prompt in case.prompts], axis=1)
    _close(
        together,
        alone,
        "a batch of two prompts and two batches of one give different magnitudes; rows are paired across samples, or split at the wrong place",
    )


def no_guidance_is_missing(case: Case) -> None:
    """Without guidance there is no number: rows are NaN, or the run is refused with the reason. Never zero."""
    try:
        magnitudes = case.trace(case.prompts, guided=False).magnitudes
    except (NoGuidanceError, GuidanceLayoutError) as error:
        _require(len(str(error)) > 20, f"{type(error).__name__} says only {str(error)!r}; it has to give the reason and the remedy")
        return
    _require(
        bool(np.isnan(magnitudes).all()),
        f"a run without guidance gave magnitudes {magnitudes}; expected NaN or NoGuidanceError. Nothing may stand in for a missing prediction",
    )


def replay_reproduces(case: Case) -> None:
    """Replaying the captured embedding gives the captured conditional prediction, for every evaluation."""
    for index, evaluation in enumerate(case.trace(case.prompts, keep="calls").evaluations):
        embedding, pred_cond = _embedding(evaluation), evaluation.pred_cond
        _require(evaluation.replay is not None, "the evaluation has no replay; set replayable=False if this host can have none")
        predicted = evaluation.replay(embedding)  # type: ignore[misc]
        error = float((predicted - pred_cond).norm() / pred_cond.norm())
        _require(
            error < _TOLERANCE,
            f"evaluation {index}: replaying the captured embedding is off by {error:.2g}; it has other arguments or rows than the capture",
        )


def uncond_replay_is_zero(case: Case) -> None:
    """Replaying the unconditional embedding makes the magnitude zero: this is what catches an adapter that swaps the roles."""
    unconditional = _embedding(case.trace(["", ""], keep="calls").evaluations[0])
    for index, evaluation in enumerate(case.trace(case.prompts, keep="calls").evaluations):
        captured = float(evaluation.objective(_embedding(evaluation)).detach().mean())
        zero = float(evaluation.objective(unconditional).detach().mean())
        _require(
            zero < _TOLERANCE * captured,
            f"evaluation {index}: replaying the unconditional embedding gives a magnitude of {zero:.3g} instead of 0 (captured: {captured:.3g}). "
            "The conditional and the unconditional prediction are swapped, or they come from different calls",
        )


def gradient_reaches_embedding(case: Case) -> None:
    """The objective is differentiable in the embedding, sample by sample, and leaves no gradient on parameters."""
    evaluation = case.trace(case.prompts, keep="calls").evaluations[0]
    before = snapshot(case.target)
    embedding = _embedding(evaluation).clone().requires_grad_()
    (gradient,) = torch.autograd.grad(evaluation.objective(embedding)[0], embedding)
    _require(
        bool(gradient[0].abs().sum() > 0),
        "the gradient of the first sample's magnitude with respect to its embedding is zero; the replay detaches it",
    )
    _require(bool((gradient[1:] == 0).all()), "the first sample's magnitude depends on the second sample's embedding; the replay mixes rows")
    _same_state(before, snapshot(case.target), "a replay")


def import_is_light(case: Case) -> None:
    """Importing the adapter does not import its host, so that an installed adapter costs nobody anything."""
    if case.imports is None:
        return
    adapter, host = case.imports
    code = f"import sys; import {adapter}; sys.exit({host!r} in sys.modules)"
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False, capture_output=True, text=True)  # noqa: S603 -- our own interpreter, the author's module names
    _require(not result.stderr, f"importing {adapter} failed: {result.stderr}")
    _require(result.returncode == 0, f"importing {adapter} imports {host}; find the host through sys.modules, and import it where it is used")


def replay_refused(case: Case) -> None:
    """Where a host cannot be replayed, asking for it is an error that says why."""
    evaluation = case.trace(case.prompts, keep="calls").evaluations[0]
    try:
        evaluation.objective(evaluation.embedding if evaluation.embedding is not None else torch.zeros(2, 1, 1))
    except MemhookError:
        return
    raise AssertionError("the case says replayable=False, but the replay works; say replayable=True to have it checked")


_ALWAYS = (
    outputs_identical,
    nothing_left_behind,
    evaluations_counted,
    watches_agree,
    other_threads_ignored,
    batch_is_its_samples,
    no_guidance_is_missing,
    import_is_light,
)
_REPLAY = (replay_reproduces, uncond_replay_is_zero, gradient_reaches_embedding)
CHECKS: tuple[Callable[[Case], None], ...] = (*_ALWAYS, *_REPLAY, replay_refused)
"""All checks. `applies` says which of them hold for a case."""


def applies(check: Callable[[Case], None], case: Case) -> bool:
    """Whether a check is meant for this case."""
    return case.replayable if check in _REPLAY else not case.replayable if check is replay_refused else True


def _require(condition: bool, message: str) -> None:  # noqa: FBT001 -- reads like assert
    if not condition:
        raise AssertionError(message)


def _close(found: np.ndarray, expected: np.ndarray, message: str) -> None:
    same = found.shape == expected.shape and np.allclose(found, expected, rtol=_TOLERANCE, atol=0, equal_nan=True)
    _require(same, f"{message}: {found} and {expected}")


def _embedding(evaluation: Evaluation) -> Tensor:
    if evaluation.embedding is None:
        raise AssertionError(
            "the evaluation has no embedding, so nothing can be replayed; find it among the call's arguments, or set replayable=False"
        )
    return evaluation.embedding


def _same_state(before: dict[str, Any], after: dict[str, Any], when: str) -> None:
    different = changes(before, after)
    _require(not different, f"something is left on the host after {when}; undo everything in a `finally`. " + "; ".join(different[:5]))
