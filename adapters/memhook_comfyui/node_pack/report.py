"""The node that says what was seen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

import memhook
from memhook.capture.prompts import per_prompt

from . import inputs
from .host import CATEGORY, shown
from .pictures import lines
from .runs import RUNS

if TYPE_CHECKING:
    from memhook.detection.calibration import Calibration

_UNIT = {"flow": "the velocity", "eps": "the noise"}


class Report:
    """LATENT in; score, p-value, chart and text out."""

    CATEGORY = CATEGORY
    DESCRIPTION = "Tells how strongly the prompt pulled while this latent was made, and whether that looks like a memorized picture."
    RETURN_TYPES: ClassVar = ("IMAGE", "STRING", "FLOAT", "FLOAT")
    RETURN_NAMES: ClassVar = ("chart", "text", "score", "p_value")
    OUTPUT_TOOLTIPS: ClassVar = (
        "How strongly the prompt pulled, step by step.",
        "The same in words.",
        "The mean pull, of the prompt that pulled hardest.",
        "Chance of such a score if the prompt is not memorized. Not a number without a calibration.",
    )
    FUNCTION = "report"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 -- ComfyUI's name
        """ComfyUI's description of the inputs."""
        return {
            "required": {
                "latent": ("LATENT", {"tooltip": "Straight from a sampler whose model went through Memhook Watch or Memhook Guard."}),
                "evaluations": inputs.evaluations(
                    "Score over so many of the first steps; 0 for all. A calibration knows it itself.", least=0, most=10000
                ),
                "false_alarms": inputs.false_alarms(),
            },
            "optional": {"calibration": inputs.calibration()},
        }

    def report(self, latent: dict[str, Any], evaluations: int, false_alarms: float, calibration: Calibration | None = None) -> dict[str, Any]:
        """Look the run up by its latent, and judge it."""
        run = RUNS.find(latent["samples"])
        trace = run.trace
        threshold, p_value = None, float("nan")
        if calibration is not None:
            detection = memhook.detect(trace, calibration, fpr=false_alarms)
            first, scores, threshold = calibration.first, detection.scores, detection.threshold
            p_value = float(np.nanmin(detection.p_values)) if np.isfinite(detection.p_values).any() else float("nan")
            verdict = str(detection)
        else:
            first = evaluations or None
            scores = np.array([trace.score(first)[trace.groups == group].mean() for group in range(trace.groups.max() + 1)])
            verdict = "without a calibration (Memhook Calibrate) a score cannot be judged"
        over = f"the first {first} of {len(trace)}" if first is not None else f"all {len(trace)}"
        missing = int((~trace.has_guidance).sum())
        score = float(scores.max())
        about = [
            f"score {score:.3g}: mean pull of the prompt over {over} evaluations, in units of {_UNIT.get(trace.space or '', 'the prediction')}",
            *([f"p-value {p_value:.2g}: the chance of such a score if the prompt is not memorized"] if calibration is not None else []),
            verdict,
            *([f"{missing} evaluations had no unconditional prediction"] if missing else []),
            *(f"guard: {note}" for note in run.notes),
        ]
        picture = lines(per_prompt(trace.magnitudes, trace.groups), trace.magnitudes.T, first=first, threshold=threshold, captions=about)
        return shown("\n".join(about), picture, "memhook_report", score, p_value)
