"""How a pipeline weighted its predictions, by least squares on what it gave to the scheduler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from memhook_diffusers.evidence import Observed

_LEAST_DIFFERENCE = 1e-6  # of two predictions, relative to the first; below it they are the same but for rounding
_LEAST_EXPLAINED = 0.25  # share of what their mean leaves of the model output that the predictions have to explain
_CLEAR_FIT = 0.99
_CLEARLY_LESS = 0.5  # of what the predictions alone leave unexplained, if the noisy sample is a part of the combination
_LEAST_WEIGHT = 1e-3  # relative to the largest; below it a prediction was not used
_LEAST_TOTAL = 1e-3  # of the weights' sum, relative to the largest
_NEARLY = 5e-3  # how far a sum of weights may be from -1
_ALONG = 0.2  # cosine between the model output and the mean prediction from which on their directions agree


@dataclass(frozen=True, eq=False)
class Fit:
    """The weights of the predictions in what the scheduler was given."""

    weights: np.ndarray  # (samples that can tell, n), their sum is 1
    quality: float  # the worst sample's
    usable: np.ndarray  # (b,) bool: the samples that can tell

    def matters(self, index: int) -> bool:
        """Whether the pipeline used this prediction at all."""
        return bool((np.abs(self.weights[:, index]) > _LEAST_WEIGHT * np.abs(self.weights).max(1)).any())


def fit_weights(observed: Observed) -> Fit | None:
    """Weights by least squares; None where they cannot be told."""
    if not observed.ordered:
        return _fit_moments(observed)
    count = observed.predictions
    with_noise = observed.products.shape[1] == count + 2
    plain: list[tuple[np.ndarray, float, float] | None] = []
    for extra in (False, True) if with_noise else (False,):
        fits = [_fit_one(products, count, with_noise=extra) for products in observed.products]
        usable = [fit for fit in fits if fit is not None]
        worst = min((quality for _, quality, _ in usable), default=0.0)
        if worst == -np.inf:
            return None
        both = [(fit, before) for fit, before in zip(fits, plain, strict=True) if fit is not None and before is not None] if extra else []
        if any(fit[2] > _CLEARLY_LESS * before[2] for fit, before in both):
            return None  # the noisy sample is no part of it
        if worst >= _LEAST_EXPLAINED:
            weights = np.stack([weights for weights, _, _ in usable])
            return Fit(weights, worst, np.array([fit is not None for fit in fits]))
        plain = fits
    return None


def _fit_one(products: np.ndarray, count: int, *, with_noise: bool) -> tuple[np.ndarray, float, float] | None:
    """Weights, which share of the model output they explain, and what they leave of it; None where there is nothing to explain."""
    if not np.isfinite(products).all():
        return None
    lengths = np.sqrt(np.diag(products))
    if with_noise and lengths[count] == 0:
        return None  # read in a place where there is no noise, such as an empty picture beside it
    used = [index for index in range(count) if lengths[index] > _LEAST_DIFFERENCE * lengths[0]] + ([count] if with_noise else [])
    if lengths[0] == 0 or lengths[-1] == 0 or len(used) < 2:
        return None
    system, right = products[np.ix_(used, used)], products[used, -1]
    scales = lengths[used]
    coefficients = np.linalg.lstsq(system / np.outer(scales, scales), right / scales, rcond=1e-12)[0] / scales
    residual = products[-1, -1] - coefficients @ right
    # What the mean of the predictions (and the noisy sample) alone leaves unexplained.
    mean = np.zeros(len(products))
    mean[0], mean[1:count] = 1.0, 1.0 / count
    null = [mean] + ([np.eye(len(products))[count]] if with_noise else [])
    basis = np.stack(null)
    left = products[-1, -1] - (basis @ products[:, -1]) @ np.linalg.lstsq(basis @ products @ basis.T, basis @ products[:, -1], rcond=1e-12)[0]
    if left <= 1e-12 * products[-1, -1]:
        return None
    spread = np.zeros(count)
    for index, value in zip(used, coefficients, strict=True):
        if index < count:
            spread[index] = value
    weights = np.array([spread[0] - spread[1:].sum(), *spread[1:]])
    total = _orientation(float(spread[0]), weights, mean, products, with_noise=with_noise)
    quality = 1.0 - residual / left
    if total == 0:
        # The fit is right but its orientation is not clear, which makes the other samples' doubtful too; or it is not right.
        return weights, -np.inf if quality > _CLEAR_FIT else 0.0, residual
    return weights / total, quality, residual


def _orientation(total: float, weights: np.ndarray, mean: np.ndarray, products: np.ndarray, *, with_noise: bool) -> float:
    """What to divide the weights by, so that the conditional one is positive; 0 where it cannot be told.

    Weights that sum to 1 are guidance, and to -1 guidance negated. Renormalized guidance has some other positive sum. A negative
    one that is not -1 is either negated too, or guidance whose part along the conditional prediction was removed (adaptive
    projected guidance): then the model output still points where the predictions do. Where that is not clear nothing is decided.
    """
    least = _LEAST_TOTAL * float(np.abs(weights).max())
    if total > least or abs(total + 1) < _NEARLY or (with_noise and total < -least):
        return total
    output = products[:, -1]
    along = float(mean @ output) / float(np.sqrt(mean @ products @ mean * output[-1]))
    if along > _ALONG:
        return 1.0
    vectors = np.eye(len(products))[: len(weights)]
    vectors[1:, 0] = 1.0  # every prediction is the first plus its difference
    against = float(vectors[int(weights.argmax())] @ output) < 0
    return total if along < -_ALONG and total < 0 and against else 0.0


def _fit_moments(observed: Observed) -> Fit | None:
    """Two predictions whose order of elements is lost on the way to the scheduler: sums and lengths do not depend on it.

    For a combination ``a m + k d`` of mean and difference with ``a`` = 1 or -1, the sum gives ``k`` and the length confirms it.
    """
    if observed.predictions != 2 or not np.isfinite(observed.products).all():
        return None
    p, s = observed.products, observed.sums
    mean_sum, mean_mean = s[:, 0] + s[:, 1] / 2, p[:, 0, 0] + p[:, 0, 1] + p[:, 1, 1] / 4
    mean_difference = p[:, 0, 1] + p[:, 1, 1] / 2
    with np.errstate(all="ignore"):
        for sign in (1, -1):
            k = (s[:, -1] - sign * mean_sum) / s[:, 1]
            predicted = mean_mean + 2 * sign * k * mean_difference + k**2 * p[:, 1, 1]
            error = np.abs(predicted - p[:, -1, -1]) / np.abs(k * k * p[:, 1, 1])
            if np.isfinite(k).all() and (error < 0.05).all() and (np.abs(k) > 0.25).all():
                return Fit(np.stack([0.5 - sign * k, 0.5 + sign * k], axis=1), 1.0 - float(error.max()), np.ones(len(k), bool))
    return None
