"""Scores of prompts known not to be memorized, and what they say about a new score."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from memhook.errors import CalibrationError, CalibrationMismatchError
from memhook.fingerprint import same_fingerprint
from memhook.trace import Trace, prompt_mean

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

_FORMAT = "memhook-calibration-1"
_LARGEST_FILE = 256 * 2**20  # bytes; ten million prompts at one evaluation are 40 MB
_FINGERPRINTS = ("model", "text_encoder", "text_encoder_2", "text_encoder_3")
_LATER_ONLY = ("sampler", "guidance_scale")  # fields without influence on the first evaluation


@dataclass(frozen=True, eq=False)
class Calibration:
    """Split-conformal calibration of the detection score.

    Attributes:
        magnitudes: ``(n, s)`` float32: for each of ``n`` clean prompts the magnitude at each of ``s`` evaluations, averaged
            over the prompt's samples. NaN where an evaluation had no unconditional prediction.
        first: How many of the first evaluations the score averages; None for all.
        setting: What it holds for, by field name; empty if it was made of bare scores.

    >>> import memhook
    >>> calibration = memhook.calibrate([1.0, 1.2, 0.9, 1.1])
    >>> float(calibration.p_value(1.15)), float(calibration.p_value(5.0))
    (0.4, 0.2)
    """

    magnitudes: np.ndarray
    first: int | None = None
    setting: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        m = self.magnitudes
        if m.ndim != 2 or len(m) == 0 or m.shape[1] == 0:
            raise CalibrationError(f"the magnitudes have shape {m.shape}; expected (prompts, evaluations), both at least 1")
        if self.first is not None and not 1 <= self.first <= m.shape[1]:
            raise CalibrationError(f"first is {self.first}; expected 1 to {m.shape[1]}, the evaluations at hand, or None for all")
        bad = np.flatnonzero(~np.isfinite(self.scores))
        if len(bad):
            raise CalibrationError(
                f"the scores of {len(bad)} of {len(m)} prompts are not finite (the first is number {bad[0]}); a prediction was NaN or infinite. Leave these prompts out, or run the model in a wider dtype"
            )

    @property
    def scores(self) -> np.ndarray:
        """``(n,)`` float32: the clean prompts' scores."""
        used = self.magnitudes[:, : self.first]
        present = ~np.isnan(used).all(axis=0)
        if not present.any():
            raise CalibrationError(f"none of the first {used.shape[1]} evaluations had an unconditional prediction; use more of them")
        return prompt_mean(used.T, present)

    def __len__(self) -> int:
        return len(self.magnitudes)

    def using(self, first: int | None) -> Calibration:
        """The same calibration for a score over another number of first evaluations."""
        return replace(self, first=first)

    def p_value(self, scores: ArrayLike) -> np.ndarray:
        """The conformal p-value ``(1 + #{c >= s}) / (n + 1)``: the chance of a score this high *if the prompt is not memorized*.

        It is not the chance that the prompt is memorized. Valid at every ``n`` if the prompt is exchangeable with the
        calibration prompts; never below ``1 / (n + 1)``.

        Args:
            scores: One score or an array of them.

        Returns:
            An array of the same shape; NaN where a score is not finite.
        """
        values = np.asarray(scores, np.float32)
        ordered = np.sort(self.scores)
        at_least = len(ordered) - np.searchsorted(ordered, values, side="left")
        return np.where(np.isfinite(values), (1 + at_least) / (len(ordered) + 1), np.nan)

    def threshold(self, fpr: float, confidence: float | None = None) -> float:
        """The score above which a prompt is flagged.

        Args:
            fpr: The wanted false-positive rate, in (0, 1). A prompt is flagged if its score is *greater* than the threshold,
                which is the same as a p-value of at most ``fpr``.
            confidence: None: the rate holds on average over calibration sets. A number in (0, 1): it holds for this very set with
                that confidence, which needs more prompts (299 for 1% at 95%). Needs scipy.

        Raises:
            CalibrationError: There are too few prompts for this rate; says how many are needed.
        """
        if not 0 < fpr < 1:
            raise CalibrationError(f"fpr is {fpr}; expected a rate between 0 and 1, such as 0.01")
        n = len(self)
        if confidence is None:
            rank = math.floor((n + 1) * fpr + 1e-9)
            needed = math.ceil(1 / fpr - 1e-9) - 1
        else:
            if not 0 < confidence < 1:
                raise CalibrationError(f"confidence is {confidence}; expected a number between 0 and 1, such as 0.95")
            rank = _largest_safe_rank(n, fpr, confidence)
            needed = math.ceil(math.log(1 - confidence) / math.log(1 - fpr))
        if rank < 1:
            raise CalibrationError(
                f"{n} calibration prompts cannot give a false-positive rate of {fpr:g}"
                f"{'' if confidence is None else f' with {confidence:.0%} confidence'}; calibrate with at least {needed}, or raise fpr"
            )
        return float(np.sort(self.scores)[::-1][rank - 1])

    def check(self, trace: Trace) -> None:
        """Raise `CalibrationMismatchError` where ``trace`` was recorded in another setting than this calibration."""
        if not self.setting:
            return
        compare_settings(self.setting, run_setting(trace), first=self.first)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one ``.safetensors`` file: the magnitudes, and the setting as JSON metadata. Replaces the file at once."""
        from safetensors.numpy import save

        target = Path(path)
        about = {"format": _FORMAT, "first": self.first, "setting": dict(self.setting)}
        data = save({"magnitudes": np.ascontiguousarray(self.magnitudes, np.float32)}, metadata={"memhook": json.dumps(about, sort_keys=True)})
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            temporary.write_bytes(data)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Calibration:
        """Read what `save` wrote. Nothing in the file is executed.

        Raises:
            CalibrationError: The file is missing, damaged, or not a calibration.
        """
        from safetensors import SafetensorError, safe_open

        source = Path(path)
        try:
            if not source.is_file():
                raise CalibrationError(f"there is no calibration file {source}; make one with `memhook calibrate` or Calibration.save")
            if source.stat().st_size > _LARGEST_FILE:
                raise CalibrationError(f"{source} has {source.stat().st_size:,} bytes; a calibration has at most {_LARGEST_FILE:,}")
            with safe_open(source, framework="numpy") as file:
                about = json.loads((file.metadata() or {}).get("memhook", "null"))
                if not isinstance(about, dict) or about.get("format") != _FORMAT:
                    raise CalibrationError(f"{source} is a safetensors file, but not a calibration of the format {_FORMAT}")
                magnitudes = file.get_tensor("magnitudes")
            first, setting = about.get("first"), about.get("setting")
            if magnitudes.dtype != np.float32 or not isinstance(setting, dict) or not (first is None or type(first) is int):
                raise CalibrationError(f"{source} is damaged: its magnitudes are {magnitudes.dtype}, its setting a {type(setting).__name__}, first={first!r}")
            return Calibration(magnitudes, first, setting)
        except (SafetensorError, OSError, ValueError, RecursionError, TypeError) as error:
            raise CalibrationError(f"{source} cannot be read as a calibration: {error}") from error


def calibrate(traces_or_scores: Sequence[Trace] | Trace | ArrayLike, *, first: int | None = None) -> Calibration:
    """Calibrate the score on prompts known not to be memorized.

    Args:
        traces_or_scores: Traces of clean prompts, all recorded in one setting, with the same number of samples a prompt (several
            prompts in one trace are told apart by `Trace.groups`); or bare scores ``(n,)``, which carry no setting.
        first: Score over the first so many evaluations; None for all.

    Raises:
        CalibrationError: Nothing was given, scores are not finite, or the traces differ in their setting.
    """
    if isinstance(traces_or_scores, Trace):
        traces_or_scores = [traces_or_scores]
    if isinstance(traces_or_scores, Sequence) and traces_or_scores and isinstance(traces_or_scores[0], Trace):
        return _from_traces([trace for trace in traces_or_scores if isinstance(trace, Trace)], first)
    scores = np.asarray(traces_or_scores, np.float32)
    if scores.ndim != 1 or len(scores) == 0:
        raise CalibrationError(f"the scores have shape {scores.shape}; expected one score a clean prompt, (n,), at least one")
    return Calibration(scores[:, None], first)


def _from_traces(traces: list[Trace], first: int | None) -> Calibration:
    setting = run_setting(traces[0])
    rows = []
    for number, trace in enumerate(traces):
        try:
            compare_settings(setting, run_setting(trace), first=first)
        except CalibrationMismatchError as error:
            raise CalibrationError(f"trace {number} was recorded in another setting than trace 0: {error}") from error
        rows.append(per_prompt(trace.used(None), trace.groups))
    return Calibration(np.concatenate(rows), first, setting)


def per_prompt(magnitudes: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Average ``(s, b)`` magnitudes over each prompt's samples: ``(prompts, s)``."""
    return np.stack([magnitudes[:, groups == group].mean(axis=1, dtype=np.float64) for group in range(groups.max() + 1)]).astype(np.float32)


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
        "images_per_prompt": int(counts[0]),
        "guidance_scale": None if scale is None else float(f"{np.nanmedian(scale):.3g}"),
    }
    return {key: value for key, value in found.items() if value is not None}


def _known(levels: np.ndarray) -> list[float] | None:
    """Noise levels as JSON numbers; None where the host does not count in this unit."""
    return [float(f"{level:.6g}") for level in levels.tolist()] if np.isfinite(levels).all() else None


def compare_settings(calibrated: Mapping[str, Any], seen: Mapping[str, Any], *, first: int | None) -> None:
    """Raise `CalibrationMismatchError` naming the first field that differs, and both values.

    Fields that only one side knows are not compared.
    """
    for key in calibrated.keys() & seen.keys():
        expected, value = calibrated[key], seen[key]
        if first == 1 and key in _LATER_ONLY:
            continue
        if key in _FINGERPRINTS:
            if not same_fingerprint(expected, value):
                raise CalibrationMismatchError(
                    f"the {key} differs: the calibration was made with {_brief(expected)}, this run used {_brief(value)}. Calibrate again with this {key.replace('_', ' ')}"
                )
            continue
        if key in ("timesteps", "sigmas"):
            expected, value = expected[:first], value[:first]
            same = len(expected) == len(value) and np.allclose(expected, value, rtol=1e-3, atol=1e-6)
        elif key == "guidance_scale":
            same = math.isclose(expected, value, rel_tol=0.02)
        else:
            same = expected == value
        if not same:
            raise CalibrationMismatchError(
                f"{key} differs: the calibration was made with {_brief(expected)}, this run used {_brief(value)}. Run with the calibration's setting, or calibrate again with this one"
            )


def _brief(value: Any) -> str:
    if isinstance(value, Mapping) and "structure" in value:
        return f"fingerprint {value['structure']} / {hash(tuple(value['values'])) & 0xFFFF:04x}"
    if isinstance(value, list) and len(value) > 4:
        return f"[{', '.join(map(str, value[:3]))}, ... {value[-1]}] ({len(value)})"
    return repr(value)


def _largest_safe_rank(n: int, fpr: float, confidence: float) -> int:
    """The largest k for which the realized rate, Beta(k, n + 1 - k), is at most ``fpr`` with the given confidence."""
    try:
        from scipy.stats import beta
    except ImportError as error:
        raise CalibrationError("a threshold with confidence needs scipy; install the extra `eval`") from error
    ranks = np.arange(1, math.floor((n + 1) * fpr) + 1)
    safe = ranks[beta.ppf(confidence, ranks, n + 1 - ranks) <= fpr] if len(ranks) else ranks
    return int(safe.max()) if len(safe) else 0
