"""The score that a calibration is of, as something that can be computed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memhook.capture.scoring import Magnitude, Scored, as_scored, with_parameters
from memhook.errors import CalibrationMismatchError

if TYPE_CHECKING:
    from memhook.detection.calibration import Calibration
    from memhook.hookspecs import Score


def score_for(calibration: Calibration, given: Score | str | None = None) -> Scored:
    """The score to watch a run with that this calibration is to judge.

    Args:
        calibration: Its setting names the score and its parameters.
        given: The score itself, where it is not installed by that name, or cannot be made of its parameters alone (a spectrum, a mask).

    Raises:
        CalibrationMismatchError: ``given`` is another one.
        MemhookError: Nothing was given, and no score of that name is installed.
    """
    known = calibration.score
    if given is None:
        return as_scored(Magnitude(), plugin="memhook") if known is None else with_parameters(as_scored(known["name"]), known)
    scored = as_scored(given)
    if known is not None and scored.describe() != known:
        if isinstance(given, str) and scored.name == known["name"]:
            return with_parameters(scored, known)
        raise CalibrationMismatchError(
            f"the calibration is of the score {_said(known)}, and {_said(scored.describe())} was given; calibrate this one, or give that one"
        )
    return scored


def _said(described: dict[str, object]) -> str:
    parameters = described["parameters"]
    inside = ", ".join(f"{key}={value!r}" for key, value in parameters.items()) if isinstance(parameters, dict) else ""
    return f"{described['name']!r} ({inside})" if inside else repr(described["name"])
