"""Judging a run while it is still going on, and repairing or stopping it."""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from torch import Tensor

from memhook.capture.scoring import MAGNITUDE
from memhook.capture.trace import Trace
from memhook.capture.watching import attached, cannot_intervene
from memhook.detection.named import score_for
from memhook.detection.stopping import StopRule
from memhook.detection.verdict import Detection, detect
from memhook.errors import CalibrationError, MemhookError, MemorizationDetectedError
from memhook.mitigation.guard_report import Guard, Repair
from memhook.mitigation.in_flight import Settings, mitigate_samples
from memhook.plugins import find_adapter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from memhook.capture.intervention import Intervention
    from memhook.capture.prediction import Evaluation
    from memhook.capture.scoring import Scored
    from memhook.detection.calibration import Calibration
    from memhook.hookspecs import Adapter, Score

Action = Literal["mitigate", "stop", "warn"]


@contextlib.contextmanager
def guard(
    target: object,
    calibration: Calibration | StopRule,
    *,
    fpr: float | None = None,
    action: Action = "mitigate",
    target_magnitude: float | None = None,
    lr: float = 0.05,
    max_steps: int = 10,
    fixed_tokens: int = 1,
    adapter: Adapter | None = None,
    score: Score | None = None,
) -> Iterator[Guard]:
    """Judge the run inside the block at its first evaluations, and act on the samples of flagged prompts while it goes on.

    Costs nothing for a clean run but the decision, for which the device is waited for once (with a
    `StopRule`, at each look). The samples of prompts that are not flagged
    come out bit-identical to an unguarded run. One run of the sampler a block: a second one is an error, never unguarded.

    * ``"mitigate"`` moves the flagged samples' embeddings (`optimize_embedding`) until their magnitude at this evaluation is
      ``target_magnitude``, replaces the current prediction, and puts the new embeddings in all later calls.
    * ``"stop"`` raises `MemorizationDetectedError` out of the sampler, before anything is decoded.
    * ``"warn"`` warns and lets the run go on.

    Args:
        target: What runs the sampler, as in `memhook.watch`.
        calibration: For a score over the first ``k`` evaluations (``calibration.using(first=1)``), after which the guard decides. Or a
            `stop_rule`, with which it looks after each of the first evaluations and acts at the first one that shows enough.
            One of another score than the magnitude says by its name which one to compute.
        fpr: The share of prompts that are not memorized but flagged all the same; 0.01 where None. A rule has its own.
        action: What to do.
        target_magnitude: The magnitude to reach, per sample; a warning says where it was not. Where None, the median of the calibration's
            clean prompts is aimed at, and a warning says where a sample stayed above the threshold; a calibration of another score has
            none, so there it must be given.
        lr: Learning rate of the optimization.
        max_steps: Updates at most.
        fixed_tokens: As in `optimize_embedding`: 1 for encoders with a start token, 0 for those without.
        adapter: As in `memhook.watch`.
        score: The score that the calibration is of, where its name and parameters do not make it (a spectrum, a mask, one of your own).

    Yields:
        A `Guard`, which says what was found and done.

    Raises:
        MemorizationDetectedError: A prompt was flagged, and the action is ``"stop"``.
        CalibrationError: The calibration cannot decide in flight, or has too few prompts.
        CalibrationMismatchError: The run's setting is not the calibration's.
        MemhookError: A prediction was not finite, the block held another number of runs than one, or the adapter cannot change runs.

    >>> import memhook
    >>> from memhook.testing import tiny_unet, sample
    >>> unet = tiny_unet()
    >>> adapter = memhook.ModuleAdapter(unet, layout="uncond_first")
    >>> traces = [memhook.probe(unet, lambda: sample(unet, samples=1, seed=seed), adapter=adapter) for seed in range(20)]
    >>> calibration = memhook.calibrate(traces, first=1)
    >>> with memhook.guard(unet, calibration, fpr=0.05, action="stop", adapter=adapter) as guard:
    ...     latents = sample(unet, samples=1, seed=21)
    >>> print(guard)
    none of 1 prompts looks memorized at a false-positive rate of 0.05 (calibrated on 20 clean prompts)
    """
    if target_magnitude is not None and not target_magnitude >= 0:
        raise MemhookError(f"target_magnitude is {target_magnitude}; a magnitude is never negative, so expected 0 or more, or None")
    if action not in get_args(Action):
        raise MemhookError(f"action is {action!r}; expected one of {', '.join(get_args(Action))}")
    scored = score_for(calibration.calibration if isinstance(calibration, StopRule) else calibration, score)
    if action == "mitigate" and target_magnitude is None and scored.name != MAGNITUDE:
        raise MemhookError(
            f"the calibration is of {scored}, which is no magnitude, so it does not say which magnitude a flagged sample should be brought to; "
            "give target_magnitude, such as the median of a calibration of the magnitude"
        )
    judging = _judging(calibration, fpr)

    def judge(evaluation: Evaluation, report: Guard) -> Intervention | None:
        report.detection = detection = judging.verdict(report.trace)
        known = report.flagged if report.flagged is not None else np.zeros(len(detection.groups), bool)
        fresh = detection.memorized[detection.groups] & ~known
        report.flagged = known | fresh
        if detection.undecided.any():
            _undecided(detection, report, action)
        if not fresh.any():
            return None
        if action == "warn":
            warnings.warn(str(detection), stacklevel=2)
            return None
        if action == "stop":
            raise MemorizationDetectedError(f"stopped after {len(report.trace)} evaluations: {detection}", trace=report.trace, detection=detection)
        goal, tolerable = judging.goal(len(report.trace)) if target_magnitude is None else (target_magnitude, target_magnitude)
        return _mitigated(evaluation, report, fresh, Settings(goal, tolerable, lr, max_steps, fixed_tokens))

    with _guarding(target, adapter, judging.looks, judge, changes=action == "mitigate", scored=scored) as report:
        yield report


@contextlib.contextmanager
def mitigate(
    target: object,
    *,
    target_magnitude: float,
    lr: float = 0.05,
    max_steps: int = 10,
    fixed_tokens: int = 1,
    adapter: Adapter | None = None,
) -> Iterator[Guard]:
    """`guard` without a calibration: every sample whose magnitude at the first evaluation is above the target is mitigated.

    Args:
        target: What runs the sampler, as in `memhook.watch`.
        target_magnitude: The magnitude to reach, per sample; samples that are below it already come out bit-identical.
        lr: Learning rate of the optimization.
        max_steps: Updates at most.
        fixed_tokens: As in `optimize_embedding`.
        adapter: As in `memhook.watch`.

    Yields:
        A `Guard`, which says what was done.

    Raises:
        MemhookError: As `guard`.
    """
    if not target_magnitude >= 0:
        raise MemhookError(f"target_magnitude is {target_magnitude}; a magnitude is never negative, so expected 0 or more")
    settings = Settings(target_magnitude, target_magnitude, lr, max_steps, fixed_tokens)

    def judge(evaluation: Evaluation, report: Guard) -> Intervention | None:
        magnitudes = report.trace.used(1)[0]
        if not np.isfinite(magnitudes).all():
            raise MemhookError(
                f"the magnitude of the samples {np.flatnonzero(~np.isfinite(magnitudes)).tolist()} is not finite; run the model in a wider dtype"
            )
        report.flagged = flagged = magnitudes > target_magnitude
        if not flagged.any():
            return None
        return _mitigated(evaluation, report, flagged, settings)

    with _guarding(target, adapter, [1], judge, changes=True) as report:
        yield report


@contextlib.contextmanager
def _guarding(
    target: object,
    adapter: Adapter | None,
    looks: Sequence[int],
    judge: Callable[[Evaluation, Guard], Intervention | None],
    *,
    changes: bool,
    scored: Scored | None = None,
) -> Iterator[Guard]:
    """Watch a run, and ``judge`` it after each of so many evaluations."""
    adapter = adapter if adapter is not None else find_adapter(target)
    del target  # the block must not keep it alive
    if changes and not getattr(adapter, "intervenes", False):
        raise MemhookError(cannot_intervene(adapter.host))
    trace = Trace(host=adapter.host, describe=adapter.describe, score=scored)
    report = Guard(trace)
    first, last = looks[0], looks[-1]

    def on_evaluation(evaluation: Evaluation) -> Intervention | None:
        if len(trace) in looks:
            if len(trace) > first:
                _one_run(trace)  # the device is waited for anyway
            return judge(evaluation, report)
        if len(trace) > last and _known_without_waiting(evaluation):
            _one_run(trace)
        return None

    # Only calls that may be replayed are kept; before and after them numbers are enough, and nothing waits for the device.
    with attached(adapter, trace, wants_evaluations=lambda: len(trace) + 1 in looks, on_evaluation=on_evaluation):
        yield report
    if len(trace) < first:
        raise MemhookError(
            f"nothing was judged: the run had {len(trace)} evaluations, the guard decides after {first}. Run the sampler inside the block, "
            "with enough steps"
        )
    _one_run(trace)
    for repair in report.repairs:
        later = len(trace) - repair.evaluation
        if repair.substituted < later:
            warnings.warn(
                f"the new embeddings were put in only {repair.substituted} of {later} later evaluations: the host changes its embeddings on the way, "
                "so the mitigation is partial. Give it the optimized embedding from the start (memhook.optimize_embedding)",
                stacklevel=3,
            )


def _mitigated(evaluation: Evaluation, report: Guard, flagged: np.ndarray, settings: Settings) -> Intervention:
    intervention, optimized = mitigate_samples(evaluation, flagged, settings)
    report.repairs.append(Repair(len(report.trace), np.flatnonzero(flagged), optimized, intervention))
    now = report.trace.magnitudes[-1]
    if report.before is None or report.after is None:
        report.before, report.after = now.copy(), now.copy()
    report.before[flagged], report.after[flagged] = now[flagged], optimized.after
    return intervention


@dataclass(frozen=True, eq=False)
class _Judging:
    """When the guard judges, how, and to which magnitude it brings a flagged sample: ``(goal, tolerable)`` after so many evaluations."""

    looks: Sequence[int]
    verdict: Callable[[Trace], Detection]
    goal: Callable[[int], tuple[float, float]]


def _judging(calibration: Calibration | StopRule, fpr: float | None) -> _Judging:
    if isinstance(calibration, StopRule):
        if fpr is not None:
            raise MemhookError(f"fpr is {fpr}, and the stop rule has its own, {calibration.fpr}; leave fpr out")
        magnitudes, rate = calibration.calibration.magnitudes, calibration.fpr

        def of_clean_prompts(evaluations: int) -> tuple[float, float]:
            here = magnitudes[:, evaluations - 1]
            return float(np.median(here)), float(np.quantile(here, 1 - rate))

        return _Judging(calibration.looks.tolist(), calibration.judge, of_clean_prompts)
    rate = 0.01 if fpr is None else fpr
    first = _decides_after(calibration)
    threshold = calibration.threshold(rate)  # too few prompts: say so before the run
    goal = float(np.nanmedian(calibration.magnitudes[:, first - 1]))
    return _Judging([first], lambda trace: detect(trace, calibration, fpr=rate), lambda _: (goal, threshold))


def _undecided(detection: Detection, report: Guard, action: Action) -> None:
    """A prediction that is not finite is never taken for clean."""
    prompts = np.flatnonzero(detection.undecided).tolist()
    message = (
        f"the predictions of the prompts {prompts} are NaN or infinite after {len(report.trace)} evaluations, so nothing can be said about them; "
        "run the model in a wider dtype"
    )
    if action != "warn":
        raise MemhookError(message)
    warnings.warn(message, stacklevel=3)


def _decides_after(calibration: Calibration) -> int:
    if calibration.first is not None:
        return calibration.first
    evaluations = int(calibration.magnitudes.shape[1])
    if not calibration.setting:
        raise CalibrationError(
            "this calibration does not say over how many evaluations its scores were taken, so it is not known when to decide; "
            "use calibration.using(first=1)"
        )
    return evaluations


def _known_without_waiting(evaluation: Evaluation) -> bool:
    """Whether the noise level can be read without waiting for the device."""
    levels = [level for level in (evaluation.timestep, evaluation.sigma) if level is not None]
    return all(not isinstance(level, Tensor) or level.device.type == "cpu" for level in levels)


def _one_run(trace: Trace) -> None:
    if len(trace.runs) > 1:
        raise MemhookError("a second run of the sampler began inside the block, which the guard does not judge; give each run a guard of its own")
