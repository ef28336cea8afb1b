"""Detect, explain and mitigate memorization in diffusion models, on any guided sampler.

    with memhook.watch(pipeline) as trace:
        images = pipeline("a prompt", num_images_per_prompt=4).images
    print(memhook.detect(trace, calibration))

The method is that of Wen, Liu, Chen and Lyu, *Detecting, Explaining, and Mitigating Memorization in Diffusion Models*, ICLR 2024.
"""

from typing import TYPE_CHECKING

from memhook.exports import lazy_exports

if TYPE_CHECKING:
    from memhook.adapting.module import ModuleAdapter
    from memhook.attribution.gradient import TokenAttribution, attribute_tokens
    from memhook.attribution.left_out import LeaveOneOut, leave_one_out
    from memhook.attribution.maps import DifferenceMap, difference_map
    from memhook.attribution.tokens import Tokens, prompt_tokens
    from memhook.capture.intervention import Intervention
    from memhook.capture.prediction import Evaluation, magnitude
    from memhook.capture.scoring import score
    from memhook.capture.trace import Trace
    from memhook.capture.watching import probe, watch
    from memhook.detection.calibration import Calibration, calibrate
    from memhook.detection.stopping import StopRule, stop_rule
    from memhook.detection.verdict import Detection, detect
    from memhook.errors import (
        AmbiguousAdapterError,
        CalibrationError,
        CalibrationMismatchError,
        GuidanceLayoutError,
        MemhookError,
        MemorizationDetectedError,
        NoAdapterError,
        NoGuidanceError,
        ReplayError,
    )
    from memhook.hookspecs import hookimpl
    from memhook.mitigation.edits import Edits, suggest_edits
    from memhook.mitigation.embedding import OptimizedEmbedding, optimize_embedding, per_sample_target
    from memhook.mitigation.guard import guard, mitigate
    from memhook.mitigation.guard_report import Guard
    from memhook.scores.spectrum import CleanSpectrum
    from memhook.training.filter import training_filter
    from memhook.training.masking import keep_mask, masked_mean
else:  # nothing of torch until one of these is used
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "memhook.adapting.module": ["ModuleAdapter"],
            "memhook.attribution.maps": ["DifferenceMap", "difference_map"],
            "memhook.attribution.gradient": ["TokenAttribution", "attribute_tokens"],
            "memhook.attribution.left_out": ["LeaveOneOut", "leave_one_out"],
            "memhook.attribution.tokens": ["Tokens", "prompt_tokens"],
            "memhook.capture.intervention": ["Intervention"],
            "memhook.capture.prediction": ["Evaluation", "magnitude"],
            "memhook.capture.scoring": ["score"],
            "memhook.capture.trace": ["Trace"],
            "memhook.capture.watching": ["probe", "watch"],
            "memhook.detection.calibration": ["Calibration", "calibrate"],
            "memhook.detection.stopping": ["StopRule", "stop_rule"],
            "memhook.detection.verdict": ["Detection", "detect"],
            "memhook.errors": [
                "AmbiguousAdapterError",
                "CalibrationError",
                "CalibrationMismatchError",
                "GuidanceLayoutError",
                "MemhookError",
                "MemorizationDetectedError",
                "NoAdapterError",
                "NoGuidanceError",
                "ReplayError",
            ],
            "memhook.hookspecs": ["hookimpl"],
            "memhook.mitigation.edits": ["Edits", "suggest_edits"],
            "memhook.mitigation.embedding": ["OptimizedEmbedding", "optimize_embedding", "per_sample_target"],
            "memhook.mitigation.guard": ["guard", "mitigate"],
            "memhook.mitigation.guard_report": ["Guard"],
            "memhook.scores.spectrum": ["CleanSpectrum"],
            "memhook.training.filter": ["training_filter"],
            "memhook.training.masking": ["keep_mask", "masked_mean"],
        },
    )

__version__ = "0.1.0"

__all__ = [
    "AmbiguousAdapterError",
    "Calibration",
    "CalibrationError",
    "CalibrationMismatchError",
    "CleanSpectrum",
    "Detection",
    "DifferenceMap",
    "Edits",
    "Evaluation",
    "Guard",
    "GuidanceLayoutError",
    "Intervention",
    "LeaveOneOut",
    "MemhookError",
    "MemorizationDetectedError",
    "ModuleAdapter",
    "NoAdapterError",
    "NoGuidanceError",
    "OptimizedEmbedding",
    "ReplayError",
    "StopRule",
    "TokenAttribution",
    "Tokens",
    "Trace",
    "attribute_tokens",
    "calibrate",
    "detect",
    "difference_map",
    "guard",
    "hookimpl",
    "keep_mask",
    "leave_one_out",
    "magnitude",
    "masked_mean",
    "mitigate",
    "optimize_embedding",
    "per_sample_target",
    "probe",
    "prompt_tokens",
    "score",
    "stop_rule",
    "suggest_edits",
    "training_filter",
    "watch",
]
