"""From magnitudes of samples to those of prompts."""

from __future__ import annotations

import numpy as np


def per_prompt(magnitudes: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Average ``(s, b)`` magnitudes over each prompt's samples: ``(prompts, s)`` float32."""
    return np.stack([magnitudes[:, groups == group].mean(axis=1, dtype=np.float64) for group in range(groups.max() + 1)]).astype(np.float32)


def prompt_mean(magnitudes: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Mean of ``(s, n)`` magnitudes over the evaluations that are present, ``(n,)``; a NaN among those stays a NaN."""
    with np.errstate(invalid="ignore"):  # infinities of both signs make a NaN
        mean: np.ndarray = magnitudes[present].mean(axis=0, dtype=np.float64).astype(np.float32)
    return mean


def numbered(keys: np.ndarray) -> np.ndarray:
    """Keys as numbers from 0 on, in the order in which they first appear."""
    seen: dict[int, int] = {}
    return np.array([seen.setdefault(int(key), len(seen)) for key in keys])
