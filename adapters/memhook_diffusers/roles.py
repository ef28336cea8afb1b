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

    from memhook.capture.prediction import Roles
    from memhook_diffusers.evidence import Observed
from memhook_diffusers.claims import claimed_pair
from memhook_diffusers.fit import Fit, fit_weights

_CLEAR_FIT = 0.99  # share of the model output that is explained
_DECLARE = "Watch the denoiser itself with memhook.ModuleAdapter, and declare its layout"


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
        remedy: What to do then; empty for what makes the pipeline guide at all.
        quality: How much of the model output the pair's reading explains.
        final: Whether later evaluations cannot tell more.
    """

    reading: int = 0
    cond: int | None = None
    uncond: int | None = None
    roles: Roles = "assumed"
    scale: np.ndarray | None = None
    reason: str | None = None
    remedy: str = ""
    quality: float = 0.0
    final: bool = True


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
    fit = fit_weights(observed)
    claimed = claimed_pair(observed.claims, count)
    if claimed is not None:
        return Decision(reading, *claimed, "matched", None if fit is None else _scale(observed, fit, claimed[0]), quality=1.0)
    classes = _classes(observed)
    best = [_heaviest(members, fit) for members in classes]  # one prediction per set of equal inputs
    pairs = [(i, j) for i in best for j in best if i < j and _same(observed.samples, i, j)]
    found = _by_text(observed, fit, pairs, reading) if len(pairs) > 1 else None
    if found is not None:
        return found
    if len(pairs) > 1 and fit is not None and fit.quality > _CLEAR_FIT:  # calls of something else, before the guided ones
        pairs = [(i, j) for i, j in pairs if fit.matters(i) and fit.matters(j)]
    if len(pairs) != 1:
        return _among_several(observed, fit, pairs, reading) if pairs else _without_pair(observed, fit, prior, reading)
    if fit is not None:
        first, second = pairs[0]
        votes = fit.weights[:, first] - fit.weights[:, second]
        if (votes > 0).all() or (votes < 0).all():
            cond, uncond = (first, second) if votes[0] > 0 else (second, first)
            return Decision(reading, cond, uncond, "fitted", _scale(observed, fit, cond), quality=fit.quality)
    if count == 2 and prior is not None:
        return Decision(reading, *prior, final=False)
    reason = f"made {count} predictions, and how it combined them does not show which is the conditional one"
    return Decision(reading, reason=reason, remedy=_DECLARE, final=False)


def _without_pair(observed: Observed, fit: Fit | None, prior: tuple[int, int] | None, reading: int) -> Decision:
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


def _by_text(observed: Observed, fit: Fit | None, pairs: list[tuple[int, int]], reading: int) -> Decision | None:
    """The pair, if one prediction has a text of its own and all others share theirs."""
    members = sorted({index for pair in pairs for index in pair})
    alone = [i for i in members if not any(_same(observed.text, i, j) for j in members if j != i)]
    together = [i for i in members if i not in alone]
    if len(alone) != 1 or not all(_same(observed.text, together[0], j) for j in together):
        return None
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
    return None


def _among_several(observed: Observed, fit: Fit | None, pairs: list[tuple[int, int]], reading: int) -> Decision:
    members = sorted({index for pair in pairs for index in pair})
    if fit is not None:
        weights = fit.weights[:, members]
        largest, negative = {members[i] for i in weights.argmax(1)}, (weights < 0).all(0)
        if len(largest) == 1 and negative.sum() == 1:
            uncond = members[int(np.flatnonzero(negative)[0])]
            return Decision(reading, largest.pop(), uncond, "fitted", quality=fit.quality)
    reason = f"made {observed.predictions} predictions with different conditioning, and how it combined them does not show which two are the pair"
    return Decision(reading, reason=reason, remedy=_DECLARE, final=False)


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


def _heaviest(members: list[int], fit: Fit | None) -> int:
    return members[0] if fit is None else max(members, key=lambda index: fit.weights[:, index].mean())


def _scale(observed: Observed, fit: Fit, cond: int) -> np.ndarray:
    alike = [index for index in range(observed.predictions) if _same(observed.text, cond, index)]
    scale = np.full(len(fit.usable), np.nan)
    scale[fit.usable] = fit.weights[:, alike].sum(1)
    return scale


def _rounding_apart(observed: Observed) -> bool:
    products = observed.products
    return bool((products[:, 1, 1] <= 1e-4**2 * products[:, 0, 0]).all())
