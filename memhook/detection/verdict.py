"""The decision: is a prompt's score too high for a prompt that is not memorized?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from memhook.capture.prompts import per_prompt, prompt_mean

if TYPE_CHECKING:
    from memhook.capture.trace import Trace
    from memhook.detection.calibration import Calibration


@dataclass(frozen=True, eq=False)
class Detection:
    """The verdict on the ``p`` prompts of a run.

    Attributes:
        scores: ``(p,)`` float32, mean magnitude (or another score) over evaluations and over the prompt's samples; larger is more memorized.
        p_values: ``(p,)``: the chance of a score this high if the prompt is *not* memorized; NaN where the score is not finite.
        memorized: ``(p,)`` bool: the p-value is at most ``fpr``.
        undecided: ``(p,)`` bool: the score is NaN or infinite, so nothing can be said; never taken for clean.
        fpr: The false-positive rate that was asked for.
        threshold: Scores above it are flagged.
        groups: ``(b,)``: to which prompt each sample belongs.
        calibration_size: The number of clean prompts behind the p-values.
        statistic: What the scores are, in words.
        accepted_mismatches: In what the run differs from the calibration's setting, where `Calibration.accepting` allowed it.
    """

    scores: np.ndarray
    p_values: np.ndarray
    memorized: np.ndarray
    undecided: np.ndarray
    fpr: float
    threshold: float
    groups: np.ndarray
    calibration_size: int
    statistic: str = "mean magnitude"
    accepted_mismatches: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        raise TypeError("a Detection holds a verdict for each prompt; ask detection.memorized.any() or detection.memorized[i]")

    def __str__(self) -> str:
        flagged, unsure, count = int(self.memorized.sum()), int(self.undecided.sum()), len(self.scores)
        rate = f"at a false-positive rate of {self.fpr:g} (calibrated on {self.calibration_size} clean prompts)"
        rate += f"; accepted: {', '.join(self.accepted_mismatches)}" if self.accepted_mismatches else ""
        undecided = f"; {unsure} undecided, since a prediction was NaN or infinite" if unsure else ""
        if unsure == count:
            return f"undecided: all of {count} prompts had a prediction that was NaN or infinite"
        if not flagged:
            return f"none of {count - unsure} prompts looks memorized {rate}{undecided}"
        worst = int(np.argmax(np.where(self.memorized, self.scores, -np.inf)))
        return (
            f"{flagged} of {count} prompts {'look' if flagged > 1 else 'looks'} memorized {rate}{undecided}: "
            f"prompt {worst} scores {self.scores[worst]:.3g}, threshold {self.threshold:.3g}, p = {self.p_values[worst]:.2g}"
        )


def detect(trace: Trace, calibration: Calibration, *, fpr: float = 0.01) -> Detection:
    """Decide for each prompt of a watched run whether it looks memorized.

    Args:
        trace: The run. Samples that share one conditioning are one prompt, and their magnitudes are averaged.
        calibration: Of the magnitude, or of another score that the run was watched with; made in the same setting, with the same number
            of samples a prompt.
        fpr: The false-positive rate: the share of prompts that are not memorized but flagged all the same.

    Raises:
        CalibrationMismatchError: The run's setting is not the calibration's.
        CalibrationError: The calibration has too few prompts for this rate.
        NoGuidanceError: The run had no unconditional prediction.
    """
    threshold = calibration.threshold(fpr)
    name = calibration.score_of(trace)
    used = trace.used(calibration.first, name=name)
    accepted = calibration.check(trace)
    groups = trace.groups
    # In the order in which the calibration averages, so that a score equal to a calibration score is equal to the last bit.
    scores = prompt_mean(per_prompt(used, groups).T, trace.has_score(name)[: len(used)])
    undecided = ~np.isfinite(scores)
    memorized = (scores > threshold) & ~undecided
    return Detection(
        scores, calibration.p_value(scores), memorized, undecided, fpr, threshold, groups, len(calibration),
        statistic=f"mean {name}", accepted_mismatches=accepted,
    )  # fmt: skip
