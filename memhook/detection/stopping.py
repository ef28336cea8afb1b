"""Looking at a run after every evaluation, and stopping it, without raising the false-positive rate by looking often."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from memhook.capture.prompts import per_prompt, prompt_mean
from memhook.detection.calibration import Calibration
from memhook.detection.verdict import Detection
from memhook.errors import CalibrationError, MemhookError

if TYPE_CHECKING:
    from memhook.capture.trace import Trace


@dataclass(frozen=True, eq=False)
class StopRule:
    """Flag a prompt at the first of several looks at which its standardized score is above one common threshold.

    Made by `stop_rule`. Call it as ``watch(..., stop_when=rule)``, give it to `memhook.guard` in place of a calibration, or ask `judge`.

    Attributes:
        looks: ``(k,)``: after how many evaluations it looks, rising.
        center: ``(k,)``: mean score of the first half of the calibration prompts at each look.
        spread: ``(k,)``: its standard deviation.
        maxima: Calibration for the largest standardized score over all looks, made of the second half.
        calibration: What it was made from; its setting is what a run is checked against.
        fpr: The false-positive rate of the whole rule, over all looks together.
    """

    looks: np.ndarray
    center: np.ndarray
    spread: np.ndarray
    maxima: Calibration
    calibration: Calibration
    fpr: float

    def __call__(self, trace: Trace) -> Detection | None:
        """For ``stop_when``: the verdict once a prompt is flagged, None before that and between looks. Waits for the device at each look.

        Raises:
            MemhookError: A prediction is NaN or infinite, so that nothing can be said.
            CalibrationMismatchError: The run's setting is not the calibration's.
        """
        if len(trace) not in self.looks:
            return None
        detection = self.judge(trace)
        if detection.undecided.any():
            raise MemhookError(
                f"the predictions of the prompts {np.flatnonzero(detection.undecided).tolist()} are NaN or infinite after {len(trace)} evaluations, "
                "so the rule cannot decide; run the model in a wider dtype"
            )
        return detection if detection.memorized.any() else None

    def judge(self, trace: Trace) -> Detection:
        """The verdict after the looks that ``trace`` is long enough for.

        Returns:
            A `Detection` whose scores are the largest standardized scores so far. Stopping at the first look where one is above the
            threshold flags the same prompts as looking at the largest of all, so the p-values are valid whenever the run is stopped.

        Raises:
            MemhookError: The trace is shorter than the first look.
            CalibrationMismatchError: The run's setting is not the calibration's.
        """
        made = int((self.looks <= len(trace)).sum())
        if not made:
            raise MemhookError(f"the run had {len(trace)} evaluations; this rule looks for the first time after {self.looks[0]}")
        last = int(self.looks[made - 1])
        name = self.calibration.score_of(trace)
        used = trace.used(last, name=name)
        groups = trace.groups
        standardized = (_running(per_prompt(used, groups), trace.has_score(name), self.looks[:made]) - self.center[:made]) / self.spread[:made]
        largest = standardized.max(axis=1)  # NaN where any is
        undecided = ~np.isfinite(largest)
        threshold = self.maxima.threshold(self.fpr)
        memorized = (largest > threshold) & ~undecided
        # A fingerprint reads the model: not at every look.
        accepted = self.calibration.using(last).check(trace) if made in (1, len(self.looks)) or memorized.any() else ()
        return Detection(
            largest, self.maxima.p_value(largest), memorized, undecided, self.fpr, threshold, groups, len(self.maxima),
            statistic=f"largest standardized score of {made} look{'s' if made > 1 else ''}", accepted_mismatches=accepted,
        )  # fmt: skip


def stop_rule(calibration: Calibration, *, fpr: float = 0.01, evaluations: int | None = None, seed: int = 0) -> StopRule:
    """A rule that may look after each of the first evaluations and keeps its false-positive rate over all of them.

    Comparing each look with a threshold of its own at rate ``fpr`` realizes several times ``fpr``. Here the score after every look is
    standardized by the mean and standard deviation of one half of the calibration prompts; the largest over the looks is compared with
    the largest of each prompt of the other half (split-conformal), so one rate holds for the whole.

    Args:
        calibration: Made from traces, over at least as many evaluations.
        fpr: The share of prompts that are not memorized but flagged at any look.
        evaluations: Look after each of the first so many; the calibration's ``first`` (else all) where None. Looks at which the run had
            no unconditional prediction are left out.
        seed: Of the division into halves.

    Raises:
        CalibrationError: The calibration was made of bare scores, has too few evaluations, or its second half too few prompts.

    >>> import numpy as np
    >>> magnitudes = np.random.default_rng(0).gamma(9.0, 0.1, (400, 10)).astype(np.float32)
    >>> rule = stop_rule(Calibration(magnitudes, None, {"host": "record"}), fpr=0.01)
    >>> rule.looks.tolist(), len(rule.maxima)
    ([1, 2, 3, 4, 5, 6, 7, 8, 9, 10], 200)
    """
    known = calibration.magnitudes.shape[1]
    wanted = evaluations if evaluations is not None else calibration.first if calibration.first is not None else known
    if not calibration.setting:
        raise CalibrationError("this calibration was made of bare scores, one a prompt; a rule with several looks needs one made from traces")
    if not 1 <= wanted <= known:
        raise CalibrationError(f"evaluations is {wanted}; this calibration has the magnitudes of {known}, so expected 1 to {known}")
    magnitudes = calibration.magnitudes[:, :wanted]
    present = ~np.isnan(magnitudes).all(axis=0)
    looks = np.flatnonzero(present) + 1
    if not len(looks):
        raise CalibrationError(f"none of the first {wanted} evaluations had an unconditional prediction; use more of them")
    if len(calibration) < 4:
        raise CalibrationError(
            f"the calibration has {len(calibration)} prompts; a rule needs two halves of at least 2, and 198 in all for a rate of 1%"
        )
    running = _running(magnitudes, present, looks)
    order = np.random.default_rng(seed).permutation(len(running))
    first, second = running[order[: len(order) // 2]], running[order[len(order) // 2 :]]
    center, spread = first.mean(axis=0, dtype=np.float64).astype(np.float32), first.std(axis=0, ddof=1, dtype=np.float64).astype(np.float32)
    if not (spread > 0).all():
        raise CalibrationError("the calibration scores of some evaluation are all equal, so they cannot be standardized; use more prompts")
    maxima = Calibration(((second - center) / spread).max(axis=1)[:, None])
    try:
        maxima.threshold(fpr)
    except CalibrationError as error:
        raise CalibrationError(f"half of the calibration prompts give the rule its threshold, and {error}") from error
    return StopRule(looks, center, spread, maxima, calibration, fpr)


def _running(magnitudes: np.ndarray, present: np.ndarray, looks: np.ndarray) -> np.ndarray:
    """The score of ``(n, s)`` magnitudes after each look, ``(n, k)``, as a calibration averages it."""
    return np.stack([prompt_mean(magnitudes[:, :look].T, present[:look]) for look in looks], axis=1)
