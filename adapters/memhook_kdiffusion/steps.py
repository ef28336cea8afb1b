"""Numbering evaluations by the sampler's steps, through its callback."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memhook.capture.trace import Trace


def step_callback(trace: Trace, then: Callable[[Mapping[str, Any]], object] | None = None) -> Callable[[Mapping[str, Any]], None]:
    """A callback for k-diffusion's samplers that fills ``trace.steps``: the step of every evaluation, and its place in the step.

    Samplers call back after the first evaluation of a step; ``sample_dpm_adaptive`` does so when a step is over, accepted or not, and says how many
    evaluations there were.

    Args:
        trace: Of the watch around the sampler (for a guard, ``guard.trace``).
        then: Another callback, called after.
    """
    counted = 0

    def callback(info: Mapping[str, Any]) -> None:
        nonlocal counted
        step = int(info["i"])
        if "nfe" in info:  # so far in this run
            counted = counted if step else 0
            trace.number_step(step, evaluations=int(info["nfe"]) - counted)
            counted = int(info["nfe"])
        else:
            trace.number_step(step)
        if then is not None:
            then(info)

    return callback
