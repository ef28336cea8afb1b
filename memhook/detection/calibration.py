"""Scores of prompts known not to be memorized, and what they say about a new score."""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from memhook.capture.prompts import per_prompt, prompt_mean
from memhook.capture.scoring import MAGNITUDE
from memhook.capture.trace import Trace
from memhook.detection.setting import brief, can_differ, check_setting, differences, first_part, run_setting
from memhook.errors import CalibrationError, CalibrationMismatchError
from memhook.scores.stored import read_calibration_file

if TYPE_CHECKING:
    import os

    from numpy.typing import ArrayLike

_FORMAT = "memhook-calibration-1"


@dataclass(frozen=True, eq=False)
class Calibration:
    """Split-conformal calibration of the detection score.

    Attributes:
        magnitudes: ``(n, s)`` float32: for each of ``n`` clean prompts the magnitude (or another score) at each of ``s`` evaluations,
            averaged over the prompt's samples. NaN where an evaluation had none, infinite where one was broken.
        first: How many of the first evaluations the score averages; None for all.
        setting: What it holds for, by field name; empty if it was made of bare scores.
        accepted: Fields in which runs may differ from the setting; see `accepting`.

    >>> import memhook
    >>> calibration = memhook.calibrate([1.0, 1.2, 0.9, 1.1])
    >>> float(calibration.p_value(1.15)), float(calibration.p_value(5.0))
    (0.4, 0.2)
    """

    magnitudes: np.ndarray
    first: int | None = None
    setting: Mapping[str, Any] = field(default_factory=dict)
    accepted: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        m = self.magnitudes
        if m.ndim != 2 or len(m) == 0 or m.shape[1] == 0:
            raise CalibrationError(f"the magnitudes have shape {m.shape}; expected (prompts, evaluations), both at least 1")
        if self.first is not None and not (1 <= self.first <= m.shape[1] or (self._bare and self.first >= 1)):
            raise CalibrationError(f"first is {self.first}; expected 1 to {m.shape[1]}, the evaluations at hand, or None for all")
        bad = np.flatnonzero(~np.isfinite(self.scores))
        if len(bad):
            raise CalibrationError(
                f"the scores of {len(bad)} of {len(m)} prompts are not finite (the first is number {bad[0]}); a prediction was NaN or infinite"
                f"{self._blamed()}. "
                "Leave these prompts out, or run the model in a wider dtype"
            )

    @property
    def score(self) -> dict[str, Any] | None:
        """Which score it is of, as ``{"name": ..., "parameters": {...}}``; None where it was made of bare numbers."""
        return dict(self.setting.get("score", {"name": MAGNITUDE, "parameters": {}})) if self.setting else None

    def score_of(self, trace: Trace) -> str:
        """The name of the score in ``trace`` that this calibration judges; the trace's first where it was made of bare numbers.

        Raises:
            CalibrationMismatchError: The run was watched with other scores.
        """
        if self.score is None:
            return trace.scored().name
        name: str = self.score["name"]
        if name not in trace.scores:
            raise CalibrationMismatchError(
                f"the calibration is of the score {name!r}, and this run was watched with {', '.join(trace.scores)}; watch with score={name!r}, or "
                "calibrate the score that it has"
            )
        return name

    @property
    def _bare(self) -> bool:
        """Made of scores rather than of traces; what they average is known to the user alone."""
        return not self.setting and self.magnitudes.shape[1] == 1

    @property
    def scores(self) -> np.ndarray:
        """``(n,)`` float32: the clean prompts' scores."""
        present = self._present()
        if not present.any():
            what = f"a value of the score {self.setting['score']['name']!r}" if self._other else "an unconditional prediction"
            raise CalibrationError(f"none of the first {len(present)} evaluations had {what}; use more of them")
        return prompt_mean(self.magnitudes[:, : self.first].T, present)

    @property
    def _other(self) -> bool:
        return "score" in self.setting

    def _blamed(self) -> str:
        return f", or the score {self.setting['score']['name']!r} is" if self._other else ""

    def _present(self) -> np.ndarray:
        """``(first,)`` bool: the evaluations that had an unconditional prediction."""
        present: np.ndarray = ~np.isnan(self.magnitudes[:, : self.first]).all(axis=0)
        return present

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
        with np.errstate(over="ignore"):  # beyond float32 is infinite, hence NaN below
            values = np.asarray(scores).astype(np.float32)
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
        if confidence is not None and not 0 < confidence < 1:
            raise CalibrationError(f"confidence is {confidence}; expected a number between 0 and 1, such as 0.95")
        rank = _largest_rank(n, fpr) if confidence is None else _largest_safe_rank(n, fpr, confidence)
        if rank < 1:
            sure = "" if confidence is None else f" with {confidence:.4g} confidence"
            needed = _fewest(fpr, confidence)
            raise CalibrationError(
                f"{n} calibration prompts cannot give a false-positive rate of {fpr:g}{sure}; calibrate with at least {needed:,}, or raise fpr"
            )
        return float(np.sort(self.scores)[::-1][rank - 1])

    def accepting(self, *fields: str) -> Calibration:
        """The same calibration for runs that differ from its setting in these fields, such as ``"guidance_scale"``.

        Its p-values are then no longer known to be valid; a `Detection` says which differences were accepted. Not saved with the file.

        Raises:
            CalibrationError: The setting has no such field.
        """
        unknown = sorted(set(fields) - can_differ(self.setting))
        if unknown:
            known = ", ".join(sorted(self.setting)) or "nothing, since it was made of bare scores"
            raise CalibrationError(f"there is no setting {', '.join(unknown)} to accept a difference in; this calibration knows {known}")
        return replace(self, accepted=tuple(sorted({*self.accepted, *fields})))

    def check(self, trace: Trace) -> tuple[str, ...]:
        """Compare the setting of ``trace`` with this calibration's.

        Returns:
            The differences that `accepting` allowed, as sentences.

        Raises:
            CalibrationMismatchError: Another field differs.
        """
        found = differences(self.setting, run_setting(trace, self.score_of(trace)), first=self.first) if self.setting else {}
        for key, problem in found.items():
            if key not in self.accepted:
                raise CalibrationMismatchError(
                    f"{problem}. Run in the calibration's setting, calibrate again in this one, or accept it: calibration.accepting({key!r})"
                )
        return tuple(found.values())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one ``.safetensors`` file: the magnitudes, and the setting as JSON metadata. Replaces the file at once."""
        from safetensors.numpy import save

        target = Path(path)
        about = {"format": _FORMAT, "first": None if self.first is None else int(self.first), "setting": dict(self.setting)}
        data = save({"magnitudes": np.ascontiguousarray(self.magnitudes, np.float32)}, metadata={"memhook": json.dumps(about, sort_keys=True)})
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
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
        about, arrays = read_calibration_file(
            path, form=_FORMAT, names=("magnitudes",), noun="calibration", made_with="`memhook calibrate` or Calibration.save"
        )
        magnitudes = arrays["magnitudes"]
        first, setting = about.get("first"), about.get("setting")
        if magnitudes.dtype != np.float32 or not isinstance(setting, dict) or not (first is None or type(first) is int):
            raise CalibrationError(
                f"{path} is damaged: its magnitudes are {magnitudes.dtype}, its setting is {brief(setting)} and first is {brief(first)}"
            )
        check_setting(setting)
        return Calibration(magnitudes, first, setting)


def calibrate(traces_or_scores: Iterable[Trace] | Trace | ArrayLike, *, first: int | None = None, score: str | None = None) -> Calibration:
    """Calibrate the score on prompts known not to be memorized.

    Args:
        traces_or_scores: Traces of clean prompts, all recorded in one setting, with the same number of samples a prompt (several
            prompts in one trace are told apart by `Trace.groups`); or bare scores ``(n,)``, which carry no setting.
        first: Score over the first so many evaluations; None for all.
        score: The name of the score, one that the runs were watched with; the first of these where None, which is the magnitude by default.

    Raises:
        CalibrationError: Nothing was given, scores are not finite, or the traces differ in their setting.
    """
    if isinstance(traces_or_scores, Trace):
        return _from_traces([traces_or_scores], first, score)
    items: Any = traces_or_scores
    if isinstance(items, Iterable) and not hasattr(items, "__array__"):
        items = list(items)
        traces = [item for item in items if isinstance(item, Trace)]
        if traces and len(traces) < len(items):
            raise CalibrationError(f"{len(traces)} of {len(items)} items are traces and the others are not; expected traces, or scores")
        if traces:
            return _from_traces(traces, first, score)
    if score is not None:
        raise CalibrationError(f"score is {score!r}, and bare numbers were given, which are what they are; leave score out, or give traces")
    try:
        with np.errstate(over="ignore"):  # beyond float32 is infinite, and refused as such
            scores = np.asarray(items).astype(np.float32)
    except (TypeError, ValueError) as error:
        raise CalibrationError(f"these are not scores: {error}; expected traces, or one number a clean prompt") from error
    if scores.ndim != 1 or len(scores) == 0:
        raise CalibrationError(f"the scores have shape {scores.shape}; expected one score a clean prompt, (n,), at least one")
    return Calibration(np.where(np.isnan(scores), np.float32(np.inf), scores)[:, None], first)


def _from_traces(traces: list[Trace], first: int | None, score: str | None) -> Calibration:
    name = traces[0].scored().name if score is None else score
    lacking = next((number for number, trace in enumerate(traces) if name not in trace.scores), None)
    if lacking is not None:
        raise CalibrationError(
            f"trace {lacking} has no score {name!r} (it has {', '.join(traces[lacking].scores)}); watch every run with score={name!r}"
        )
    settings = [run_setting(trace, name) for trace in traces]
    # Runs that are alike up to `first` only are good for a score over these, and what came later is left out.
    kept = None if _first_difference(settings, None) is None else first
    error = _first_difference(settings, kept)
    if error is not None:
        raise error
    return Calibration(np.concatenate([_prompts(trace, kept, name) for trace in traces]), first, first_part(settings[0], kept))


def _first_difference(settings: list[dict[str, Any]], first: int | None) -> CalibrationError | None:
    for number, setting in enumerate(settings):
        for problem in differences(settings[0], setting, first=first).values():
            return CalibrationError(f"trace {number} was recorded in another setting than trace 0: {problem}")
    return None


def _prompts(trace: Trace, first: int | None, score: str) -> np.ndarray:
    """``(prompts, s)``: NaN for missing predictions only, infinite for broken ones."""
    magnitudes = per_prompt(trace.used(first, name=score), trace.groups)
    broken = np.isnan(magnitudes) & trace.has_score(score)[: magnitudes.shape[1]]
    return np.where(broken, np.float32(np.inf), magnitudes)


def _largest_rank(n: int, fpr: float) -> int:
    """The largest k with ``k / (n + 1) <= fpr``, to the last bit as the p-values are computed."""
    rank = math.floor((n + 1) * fpr)
    return next(k for k in (rank + 1, rank, rank - 1) if k / (n + 1) <= fpr)


def _largest_safe_rank(n: int, fpr: float, confidence: float) -> int:
    """The largest k for which the realized rate, Beta(k, n + 1 - k), is at most ``fpr`` with the given confidence."""
    try:
        from scipy.stats import beta
    except ImportError as error:
        raise CalibrationError("a threshold with confidence needs scipy; install the extra `eval`") from error
    ranks = np.arange(1, _largest_rank(n, fpr) + 1)
    safe = ranks[beta.ppf(confidence, ranks, n + 1 - ranks) <= fpr] if len(ranks) else ranks
    return int(safe.max()) if len(safe) else 0


def _fewest(fpr: float, confidence: float | None) -> int:
    """The least number of calibration prompts for which there is a threshold."""
    fewest = math.ceil(1 / fpr) - 1
    fewest = next(n for n in range(max(1, fewest - 1), fewest + 3) if _largest_rank(n, fpr) >= 1)
    return fewest if confidence is None else max(fewest, math.ceil(math.log1p(-confidence) / math.log1p(-fpr)))
