"""Telling several runs of the sampler apart in one trace."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence


def run_starts(samples: Sequence[int], timesteps: np.ndarray, sigmas: np.ndarray, *, continues: Sequence[bool]) -> list[int]:
    """Where runs of the sampler start: where the number of samples changes, or the noise level jumps back up.

    Args:
        samples: Samples of each evaluation, in order.
        timesteps: ``(s,)``, NaN where the host has none.
        sigmas: ``(s,)``, used where timesteps are missing.
        continues: For each evaluation, whether the host says that it belongs to the run of the one before.

    Returns:
        Indices of first evaluations; empty where there are none.
    """
    if not samples:
        return []
    levels = timesteps if np.isfinite(timesteps).all() else sigmas
    noise = _falling(levels) if np.isfinite(levels).all() else None
    starts = [0]
    for index in range(1, len(samples)):
        begin = starts[-1]
        if continues[index] and samples[index] == samples[begin]:
            continue
        if samples[index] != samples[begin] or (noise is not None and _starts_again(noise[begin:index], noise[index])):
            starts.append(index)
    return starts


def _falling(levels: np.ndarray) -> np.ndarray:
    """Noise levels such that they fall in a run; the time of some flow models rises from 0 to 1."""
    changes = np.sign(np.diff(levels))
    rising = changes.sum() > 0 or (changes.sum() == 0 and len(changes) > 0 and changes[0] > 0)
    return levels.max() - levels if rising else levels


def _starts_again(run: np.ndarray, level: float) -> bool:
    """Whether a noise level is the first of a new run, after those of a run so far.

    Within a run levels repeat (Heun), all but the first, and rise a little (Heun with churn: by a factor of up to 1.42).
    """
    if level > 2 * run[-1]:
        return True
    return bool(level >= run[0] and (level > run[-1] or len(run) == 1))
