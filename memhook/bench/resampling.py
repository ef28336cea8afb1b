"""Bootstrap intervals that draw whole families of prompts, since captions of one picture are not independent of each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from memhook.evaluation.roc import Interval, draw_families

DRAWS = 2000


class Estimate(Interval):
    """A figure with its 95% interval, as these pages print it."""

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def family_weights(families: Sequence[str], *, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """How often each of ``n`` rows is in each of ``draws`` bootstrap samples of the families, ``(1 + draws, n)``; the first has each once."""
    return np.concatenate([np.ones((1, len(families)), int), draw_families(families, draws, np.random.default_rng(seed))])


def weighted_means(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The mean of ``(n,)`` values in each bootstrap sample, ``(1 + draws,)``."""
    means: np.ndarray = (weights @ values) / weights.sum(axis=1)
    return means


def estimate(replicates: np.ndarray) -> Estimate:
    """The first number, which is that of all rows, with the middle 95% of the others."""
    low, high = np.quantile(replicates[1:], [0.025, 0.975])
    return Estimate(float(replicates[0]), float(low), float(high))
