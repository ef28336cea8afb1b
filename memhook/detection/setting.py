"""The setting that a calibration holds for, and whether a run was made in it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from memhook.adapting.fingerprint import difference, is_fingerprint, same_fingerprint
from memhook.capture.texts import are_texts, same_texts
from memhook.errors import CalibrationError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from memhook.capture.trace import Trace

_FINGERPRINTS = ("model", "text_encoder", "text_encoder_2", "text_encoder_3")
_LEVELS = ("timesteps", "sigmas")
_BY_EVALUATION = (*_LEVELS, "guided_evaluations")
_WHERE_ABSENT = {"patches": "none"}  # what it means that a setting does not have the field
_LATER_ONLY = ("sampler", "guidance_scale")  # fields without influence on the first evaluation


def run_setting(trace: Trace) -> dict[str, Any]:
    """The setting of a recorded run: what the adapter describes, and what can be read off the trace."""
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
    }
    return {key: value for key, value in found.items() if value is not None}


def _known(levels: np.ndarray) -> list[float] | None:
    """Noise levels as JSON numbers; None where the host does not count in this unit."""
    return [float(f"{level:.6g}") for level in levels.tolist()] if np.isfinite(levels).all() else None


def first_part(setting: Mapping[str, Any], first: int | None) -> dict[str, Any]:
    """What of a setting matters for a score over the first so many evaluations; None for all."""
    part = {key: value[:first] if key in _BY_EVALUATION else value for key, value in setting.items()}
    return {key: value for key, value in part.items() if first != 1 or key not in _LATER_ONLY}


def differences(calibrated: Mapping[str, Any], seen: Mapping[str, Any], *, first: int | None) -> dict[str, str]:
    """The fields that differ, each with a sentence that gives both values. Fields that only one side knows are not compared."""
    calibrated, seen = first_part(calibrated, first), first_part(seen, first)
    absent = {key: value for key, value in _WHERE_ABSENT.items() if key in calibrated or key in seen}
    calibrated, seen = {**absent, **calibrated}, {**absent, **seen}
    return {
        key: f"the setting differs in {key}: {_sentence(key, calibrated[key], seen[key])}"
        for key in sorted(calibrated.keys() & seen.keys())
        if not _same(key, calibrated[key], seen[key])
    }


def _sentence(key: str, expected: Any, value: Any) -> str:
    if key == "unconditional_text":
        return (
            f"the calibration was made with {_texts(expected)}, this run used {_texts(value)}, which are encoded otherwise. The unconditional "
            "text is the negative prompt, or the empty one; use that of the calibration"
        )
    both = f"the calibration was made with {brief(expected)}, this run used {brief(value)}"
    return f"{both}. Of the {key}, {difference(expected, value)}" if key in _FINGERPRINTS else both


def _texts(value: Any) -> str:
    sizes = ", ".join(f"one of {text['tokens']} tokens and size {text['parts'][-1][0]:.3g}" for text in value[:3])
    return f"{len(value)} text{'s' if len(value) > 1 else ''} ({sizes})"


def _same(key: str, expected: Any, value: Any) -> bool:
    if key == "unconditional_text":
        return same_texts(expected, value)
    if key in _FINGERPRINTS:
        return same_fingerprint(expected, value)
    if key in _LEVELS:
        return len(expected) == len(value) and bool(np.allclose(expected, value, rtol=1e-3, atol=1e-6))
    if key == "guidance_scale":
        return math.isclose(expected, value, rel_tol=0.02)
    return bool(expected == value)


def check_setting(setting: Mapping[str, Any]) -> None:
    """Raise where a field that is compared in its own way does not have the form for it; a file may hold anything."""
    for key, value in setting.items():
        if key in _FINGERPRINTS:
            fits = is_fingerprint(value)
        elif key == "unconditional_text":
            fits = are_texts(value)
        elif key in _LEVELS:
            fits = isinstance(value, list) and all(type(level) in (int, float) for level in value)
        elif key in _BY_EVALUATION:
            fits = isinstance(value, list)
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
