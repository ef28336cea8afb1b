"""Deciding which predictions of an evaluation are the conditional and the unconditional one. Numbers only, no device.

The evidence, in this order: two predictions can be a pair only if they were made from the same noisy sample, and from different
conditioning (perturbed attention and skipped layers repeat the conditional one's). Among those, the weights that the
pipeline gave them in what it handed to the scheduler tell: guidance ``u + w (c - u)`` has ``w`` on the conditional and ``1 - w`` on
the unconditional prediction, and rescaled, negated or extended formulas keep that order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    from memhook.prediction import Roles
    from memhook_diffusers.evidence import Observed

_LEAST_DIFFERENCE = 1e-6  # of two predictions, relative to the first; below it they are the same but for rounding
_LEAST_EXPLAINED = 0.25  # share of what their mean leaves of the model output that the predictions have to explain
_CLEAR_FIT = 0.99
_LEAST_WEIGHT = 1e-3  # relative to the largest; below it a prediction was not used
_LEAST_TOTAL = 0.05  # of the weights' sum, relative to the largest


@dataclass(frozen=True, eq=False)
class Decision:
    """Which predictions are the pair.

    Attributes:
        reading: Which way of reading the outputs it holds for.
        cond: Index of the conditional prediction; None where there is no pair.
        uncond: Index of the unconditional prediction.
        roles: How it is known.
        scale: ``(b,)`` guidance scale in the convention ``u + w (c - u)``, where known.
        reason: Why there is no pair.
        quality: How much of the model output the pair's reading explains.
        final: Whether later evaluations cannot tell more.
    """

    reading: int = 0
    cond: int | None = None
    uncond: int | None = None
    roles: Roles = "assumed"
    scale: np.ndarray | None = None
    reason: str | None = None
    quality: float = 0.0
    final: bool = True


@dataclass(frozen=True, eq=False)
class _Fit:
    weights: np.ndarray  # (samples that can tell, n), their sum is 1
    quality: float  # the worst sample's
    usable: np.ndarray  # (b,) bool: the samples that can tell

    def matters(self, index: int) -> bool:
        """Whether the pipeline used this prediction at all."""
        return bool((np.abs(self.weights[:, index]) > _LEAST_WEIGHT * np.abs(self.weights).max(1)).any())


def decide(observations: Iterable[Observed], *, prior: tuple[int, int] | None, reading: int = 0) -> Decision:
    """The decision of the first observation that can tell; else by convention, where there are two predictions.

    Args:
        observations: Evaluations with the same calls, in order.
        prior: ``(cond, uncond)`` by convention; None where there is none.
        reading: Which way of reading the outputs these observations are of.
    """
    found = None
    for observed in observations:
        decision = _decide(observed, prior, reading)
        if decision.final:
            return decision
        found = found or decision
    return found or Decision(reading, reason="nothing was observed", final=False)


def _decide(observed: Observed, prior: tuple[int, int] | None, reading: int) -> Decision:
    count = observed.predictions
    fit = _fit(observed)
    classes = _classes(observed)
    best = [_heaviest(members, fit) for members in classes]  # one prediction per set of equal inputs
    pairs = [(i, j) for i in best for j in best if i < j and _same(observed.samples, i, j)]
    if len(pairs) > 1 and fit is not None and fit.quality > _CLEAR_FIT:  # calls of something else, before the guided ones
        pairs = [(i, j) for i, j in pairs if fit.matters(i) and fit.matters(j)]
    if not pairs:
        return _without_pair(observed, fit, prior, reading)
    if len(pairs) > 1:
        return _among_several(observed, fit, pairs, reading)
    if fit is not None:
        first, second = pairs[0]
        votes = fit.weights[:, first] - fit.weights[:, second]
        if (votes > 0).all() or (votes < 0).all():
            cond, uncond = (first, second) if votes[0] > 0 else (second, first)
            return Decision(reading, cond, uncond, "fitted", _scale(observed, fit, cond), quality=fit.quality)
    if count == 2 and prior is not None:
        return Decision(reading, *prior, final=False)
    if all(len(members) == 1 or best[index] == members[0] for index, members in enumerate(classes)) and prior is not None and count == len(best):
        return Decision(reading, *prior, final=False)
    return Decision(reading, reason=f"made {count} predictions, and how it combined them does not show which is the conditional one", final=False)


def _without_pair(observed: Observed, fit: _Fit | None, prior: tuple[int, int] | None, reading: int) -> Decision:
    count = observed.predictions
    same_noise = all(_same(observed.samples, 0, index) for index in range(count))
    if count == 2 and same_noise and prior is not None and _rounding_apart(observed):
        return Decision(reading, *prior, final=False)  # the prompt and the negative prompt are the same
    if not same_noise and count == 2 and fit is not None and fit.quality > _CLEAR_FIT and not _same(observed.text, 0, 1):
        votes = fit.weights[:, 0] - fit.weights[:, 1]  # some video models give the halves different frames to start from
        if (votes > 0).all() or (votes < 0).all():
            cond, uncond = (0, 1) if votes[0] > 0 else (1, 0)
            return Decision(reading, cond, uncond, "fitted", _scale(observed, fit, cond), quality=fit.quality)
    repeated = "the same conditioning (perturbed attention or skipped layers without classifier-free guidance)"
    what = repeated if same_noise else "different noisy samples"
    return Decision(reading, reason=f"made all its {count} predictions from {what}")


def _among_several(observed: Observed, fit: _Fit | None, pairs: list[tuple[int, int]], reading: int) -> Decision:
    members = sorted({index for pair in pairs for index in pair})
    alone = [i for i in members if not any(_same(observed.text, i, j) for j in members if j != i)]
    together = [i for i in members if i not in alone]
    if len(alone) == 1 and all(_same(observed.text, together[0], j) for j in together):
        lone = alone[0]
        if fit is not None and (fit.weights[:, lone] < 0).all():  # several predictions for the prompt, one without it
            cond = _heaviest(together, fit)
            if _same(observed.samples, lone, cond):
                return Decision(reading, cond, lone, "fitted", _scale(observed, fit, cond), quality=fit.quality)
        elif fit is None or (fit.weights[:, lone] > 0).all():
            # InstructPix2Pix: text and image, image alone, neither. The text's own effect is the difference of the first two.
            close = [j for j in together if _same(observed.whole_samples, lone, j)]
            if len(close) == 1:
                return Decision(reading, lone, close[0], "matched", None if fit is None else _scale(observed, fit, lone), quality=1.0)
    if fit is not None:
        weights = fit.weights[:, members]
        largest, negative = {members[i] for i in weights.argmax(1)}, (weights < 0).all(0)
        if len(largest) == 1 and negative.sum() == 1:
            uncond = members[int(np.flatnonzero(negative)[0])]
            return Decision(reading, largest.pop(), uncond, "fitted", quality=fit.quality)
    reason = f"made {observed.predictions} predictions with different conditioning, and how it combined them does not show which two are the pair"
    return Decision(reading, reason=reason, final=False)


def _classes(observed: Observed) -> list[list[int]]:
    """The predictions, grouped by what they were made from."""
    found: list[list[int]] = []
    for index in range(observed.predictions):
        for members in found:
            first = members[0]
            if (
                observed.modules[first] == observed.modules[index]
                and _same(observed.inputs, first, index)
                and _same(observed.whole_samples, first, index)
            ):
                members.append(index)
                break
        else:
            found.append([index])
    return found


def _same(hashes: np.ndarray, first: int, second: int) -> bool:
    return bool((hashes[first] == hashes[second]).all())


def _heaviest(members: list[int], fit: _Fit | None) -> int:
    return members[0] if fit is None else max(members, key=lambda index: fit.weights[:, index].mean())


def _scale(observed: Observed, fit: _Fit, cond: int) -> np.ndarray:
    alike = [index for index in range(observed.predictions) if _same(observed.text, cond, index)]
    scale = np.full(len(fit.usable), np.nan)
    scale[fit.usable] = fit.weights[:, alike].sum(1)
    return scale


def _rounding_apart(observed: Observed) -> bool:
    products = observed.products
    return bool((products[:, 1, 1] <= 1e-4**2 * products[:, 0, 0]).all())


def _fit(observed: Observed) -> _Fit | None:
    """Weights by least squares; None where they cannot be told."""
    if not observed.ordered:
        return _fit_moments(observed)
    count = observed.predictions
    with_noise = observed.products.shape[1] == count + 2
    for extra in (False, True) if with_noise else (False,):
        fits = [_fit_one(products, count, with_noise=extra) for products in observed.products]
        usable = [fit for fit in fits if fit is not None]
        if usable and min(quality for _, quality in usable) >= _LEAST_EXPLAINED:
            weights = np.stack([weights for weights, _ in usable])
            return _Fit(weights, min(quality for _, quality in usable), np.array([fit is not None for fit in fits]))
    return None


def _fit_one(products: np.ndarray, count: int, *, with_noise: bool) -> tuple[np.ndarray, float] | None:
    if not np.isfinite(products).all():
        return None
    lengths = np.sqrt(np.diag(products))
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
    total = spread[0]
    weights = np.array([total - spread[1:].sum(), *spread[1:]])
    if abs(total) < _LEAST_TOTAL * np.abs(weights).max():
        return None
    return weights / total, 1.0 - residual / left


def _fit_moments(observed: Observed) -> _Fit | None:
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
                return _Fit(np.stack([0.5 - sign * k, 0.5 + sign * k], axis=1), 1.0 - float(error.max()), np.ones(len(k), bool))
    return None
