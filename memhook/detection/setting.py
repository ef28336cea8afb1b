"""The setting that a calibration holds for, and whether a run was made in it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from memhook.adapting.fingerprint import difference, is_fingerprint, same_fingerprint
from memhook.capture.scoring import MAGNITUDE
from memhook.capture.texts import are_texts, same_texts
from memhook.detection.causes import SHARED, WHOLE, adapters_differ, are_adapters, listed, named_differ
from memhook.errors import CalibrationError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from memhook.capture.trace import Trace

_FINGERPRINTS = ("model", "text_encoder", "text_encoder_2", "text_encoder_3")
_LEVELS = ("timesteps", "sigmas")
_BY_EVALUATION = (*_LEVELS, "guided_evaluations")
# What it means that a setting does not have the field, in files of before as well.
_WHERE_ABSENT: dict[str, Any] = {"patches": "none", "adapters": [], "quantization": {}, "patched": {}}
_CAUSES = ("adapters", "quantization", "patched", "patches", "inputs", "processors")  # said first: what else differs follows from them
# Fields without influence on the first evaluation.
_LATER_ONLY = ("sampler", "guidance_scale", "scheduler_arguments", "pipeline_arguments", "guiders")
_READ_OFF = {"float32": 0.0, "float64": 0.0, "float16": 0.02}  # what rounding adds to the error of a guidance scale that was read off
_AS_ASKED = 0.15  # how near it lies to what the pipeline was asked for, if that is what acts


def can_differ(setting: Mapping[str, Any]) -> set[str]:
    """The fields in which a run may differ from this setting."""
    return {*setting, *_WHERE_ABSENT, "inputs"} if setting else set()


def run_setting(trace: Trace, score: str = MAGNITUDE) -> dict[str, Any]:
    """The setting of a recorded run: what the adapter describes, and what can be read off the trace.

    The score is part of it; that of the magnitude, which files of before there were others do not name, goes without saying.
    """
    counts = np.bincount(trace.groups)
    if len(set(counts)) != 1:
        raise CalibrationError(f"the prompts of this trace have {sorted(set(counts.tolist()))} samples; a score needs the same number for each")
    scale = trace.guidance_scale
    found = {
        **trace.setting,
        "shape": list(trace.shape) if trace.shape is not None else None,
        "timesteps": _known(trace.timesteps),
        "sigmas": _known(trace.sigmas),
        "guided_evaluations": trace.has_guidance.tolist(),
        "images_per_prompt": int(counts[0]),
        "unconditional_text": trace.unconditional_texts or None,
        "guidance_scale": None if scale is None else float(f"{np.nanmedian(scale):.3g}"),
        "score": None if score == MAGNITUDE else trace.scored(score).describe(),
    }
    return {key: value for key, value in found.items() if value is not None and (value or key not in (*_WHERE_ABSENT, *WHOLE, *SHARED))}


def _known(levels: np.ndarray) -> list[float] | None:
    """Noise levels as JSON numbers; None where the host does not count in this unit."""
    return [float(f"{level:.6g}") for level in levels.tolist()] if np.isfinite(levels).all() else None


def first_part(setting: Mapping[str, Any], first: int | None) -> dict[str, Any]:
    """What of a setting matters for a score over the first so many evaluations; None for all."""
    part = {key: value[:first] if key in _BY_EVALUATION else value for key, value in setting.items()}
    if first != 1:
        return part
    if isinstance(part.get("scheduler"), dict):  # how it steps comes later; what it takes a prediction for does not
        part["scheduler"] = {name: value for name, value in part["scheduler"].items() if name.endswith("prediction_type")}
    return {key: value for key, value in part.items() if key not in _LATER_ONLY}


def differences(calibrated: Mapping[str, Any], seen: Mapping[str, Any], *, first: int | None) -> dict[str, str]:
    """The fields that differ, each with a sentence that gives both values. Fields that only one side knows are not compared."""
    calibrated, seen = first_part(calibrated, first), first_part(seen, first)
    absent = {key: value for key, value in _WHERE_ABSENT.items() if key in calibrated or key in seen}
    if all("moments" in setting.get("model", {}) for setting in (calibrated, seen)):  # older files did not say this
        absent["inputs"] = {}
    calibrated, seen = {**absent, **calibrated}, {**absent, **seen}
    guidance = _guidance(calibrated, seen)
    shared = sorted(calibrated.keys() & seen.keys(), key=lambda key: (_CAUSES.index(key) if key in _CAUSES else len(_CAUSES), key))
    found = {
        key: _sentence(key, calibrated[key], seen[key]) for key in shared if key != "guidance_scale" and not _same(key, calibrated[key], seen[key])
    }
    if guidance is not None:
        found["guidance_scale"] = "the calibration was made with {}, this run used {}".format(*guidance)
    return {key: f"the setting differs in {key}: {sentence}" for key, sentence in found.items()}


def _guidance(calibrated: Mapping[str, Any], seen: Mapping[str, Any]) -> tuple[float, float] | None:
    """The two guidance scales, if they differ.

    What a pipeline was asked for is exact, if it acts as asked. What was read off its predictions is as good as their dtype:
    with the two predictions close together, rounding moves it by some hundredths in bfloat16.
    """
    asked = [setting.get("pipeline_arguments", {}).get("guidance_scale") for setting in (calibrated, seen)]
    read = [setting.get("guidance_scale") for setting in (calibrated, seen)]
    if None in read:
        return None
    expected, value = (float(scale) for scale in read if scale is not None)
    if None not in asked and all(math.isclose(a, b, rel_tol=_AS_ASKED) for a, b in zip(asked, (expected, value), strict=True)):
        return None if math.isclose(*asked, rel_tol=1e-6) else (asked[0], asked[1])
    coarse = max(_READ_OFF.get(str(setting.get("model", {}).get("dtype", "float32")).split(", ")[0], 0.1) for setting in (calibrated, seen))
    return None if math.isclose(expected, value, rel_tol=0, abs_tol=0.02 * max(expected, value) + coarse) else (expected, value)


def _causes(key: str, expected: Any, value: Any) -> list[str] | None:
    """What differs in a field that holds names and values; None for other fields."""
    if key == "adapters":
        return adapters_differ(expected, value)
    return named_differ(key, expected, value) if key in (*WHOLE, *SHARED) else None


def _sentence(key: str, expected: Any, value: Any) -> str:
    causes = _causes(key, expected, value)
    if causes is not None:
        return listed(causes)
    if key == "unconditional_text":
        return (
            f"the calibration was made with {_texts(expected)}, this run used {_texts(value)}, which are encoded otherwise. The unconditional "
            "text is the negative prompt, or the empty one; use that of the calibration"
        )
    both = f"the calibration was made with {brief(expected)}, this run used {brief(value)}"
    return f"{both}. Of the {key}, {difference(expected, value)}" if is_fingerprint(expected) and is_fingerprint(value) else both


def _texts(value: Any) -> str:
    sizes = ", ".join(f"one of {text['tokens']} tokens and size {text['parts'][-1][0]:.3g}" for text in value[:3])
    return f"{len(value)} text{'s' if len(value) > 1 else ''} ({sizes})"


def _same(key: str, expected: Any, value: Any) -> bool:
    causes = _causes(key, expected, value)
    if causes is not None:
        return not causes
    if key == "unconditional_text":
        return same_texts(expected, value)
    if is_fingerprint(expected) and is_fingerprint(value):
        return same_fingerprint(expected, value)
    if key in _LEVELS:
        return len(expected) == len(value) and bool(np.allclose(expected, value, rtol=1e-3, atol=1e-6))
    return bool(expected == value)


def check_setting(setting: Mapping[str, Any]) -> None:
    """Raise where a field that is compared in its own way does not have the form for it; a file may hold anything."""
    for key, value in setting.items():
        if key in _FINGERPRINTS:
            fits = is_fingerprint(value)
        elif key == "adapters":
            fits = are_adapters(value)
        elif key in (*WHOLE, *SHARED):
            fits = isinstance(value, dict) and (key != "pipeline_arguments" or all(type(number) in (int, float) for number in value.values()))
        elif key == "unconditional_text":
            fits = are_texts(value)
        elif key in _LEVELS:
            fits = isinstance(value, list) and all(type(level) in (int, float) for level in value)
        elif key in _BY_EVALUATION:
            fits = isinstance(value, list)
        elif key == "score":
            fits = isinstance(value, dict) and isinstance(value.get("name"), str) and isinstance(value.get("parameters"), dict)
        else:
            fits = key != "guidance_scale" or type(value) in (int, float)
        if not fits:
            raise CalibrationError(f"the setting of this calibration is damaged: its field {key!r} is {brief(value)}. Make it again")


def brief(value: Any) -> str:
    """A value of a setting, short enough for an error message."""
    if is_fingerprint(value):
        return f"fingerprint {value['structure'][:16]!r} / {hash(tuple(value['values'])) & 0xFFFF:04x}"
    if isinstance(value, list) and len(value) > 4:
        return f"[{', '.join(repr(item)[:20] for item in value[:3])}, ... {repr(value[-1])[:20]}] ({len(value)})"
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
