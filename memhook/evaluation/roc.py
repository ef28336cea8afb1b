"""How well scores separate memorized from clean prompts (needs the extra ``eval``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from memhook.errors import MemhookError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


def _checked(memorized: ArrayLike, clean: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    found = []
    for name, values in (("memorized", memorized), ("clean", clean)):
        scores = np.asarray(values, np.float64)
        if scores.ndim != 1 or len(scores) == 0:
            raise MemhookError(f"the {name} scores have shape {scores.shape}; expected a vector of at least one score")
        bad = np.flatnonzero(~np.isfinite(scores))
        if len(bad):
            raise MemhookError(
                f"{len(bad)} of the {len(scores)} {name} scores are not finite (the first is number {bad[0]}); count undecided prompts apart"
            )
        found.append(scores)
    labels = np.repeat([1, 0], [len(found[0]), len(found[1])])
    return labels, np.concatenate(found)


def roc_auc(memorized: ArrayLike, clean: ArrayLike) -> float:
    """The area under the ROC curve: the chance that a memorized prompt scores above a clean one (ties count half).

    >>> roc_auc([2.0, 3.0], [1.0, 2.0])
    0.875
    """
    from sklearn.metrics import roc_auc_score

    labels, scores = _checked(memorized, clean)
    return float(roc_auc_score(labels, scores))


def tpr_at_fpr(memorized: ArrayLike, clean: ArrayLike, *, fpr: float = 0.01) -> float:
    """The share of memorized prompts found at a false-positive rate strictly below ``fpr``, as the literature counts it.

    The last point of the ROC curve whose rate is below ``fpr``; no interpolation.

    >>> tpr_at_fpr([2.0, 3.0], [1.0, 2.0], fpr=0.5)
    0.5
    """
    if not 0 < fpr <= 1:
        raise MemhookError(f"fpr is {fpr}; expected a rate above 0 and at most 1, such as 0.01")
    curve = roc_curve(memorized, clean)
    return float(curve.tpr[curve.fpr < fpr].max())


@dataclass(frozen=True, eq=False)
class RocCurve:
    """The ROC curve, a point for each threshold, from flagging nothing to flagging everything.

    Attributes:
        fpr: ``(k,)``: share of the clean prompts with a score of at least the threshold.
        tpr: ``(k,)``: the same of the memorized ones.
        thresholds: ``(k,)``, falling; the first is infinite.
    """

    fpr: np.ndarray
    tpr: np.ndarray
    thresholds: np.ndarray


def roc_curve(memorized: ArrayLike, clean: ArrayLike) -> RocCurve:
    """The ROC curve of scores, larger being more memorized.

    >>> roc_curve([2.0, 3.0], [1.0, 2.0]).tpr
    array([0. , 0.5, 1. , 1. ])
    """
    from sklearn import metrics

    labels, scores = _checked(memorized, clean)
    return RocCurve(*metrics.roc_curve(labels, scores, drop_intermediate=False))


@dataclass(frozen=True)
class Interval:
    """A figure with its bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class Separation:
    """How well scores separate ``memorized`` from ``clean`` prompts, with intervals of the given ``confidence``."""

    auc: Interval
    tpr: Interval
    fpr: float
    memorized: int
    clean: int
    confidence: float


def evaluate(
    memorized: ArrayLike,
    clean: ArrayLike,
    *,
    fpr: float = 0.01,
    memorized_families: Sequence[str] | None = None,
    clean_families: Sequence[str] | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Separation:
    """AUC and the true-positive rate at a false-positive rate, each with a bootstrap interval.

    Memorized and clean prompts are resampled apart (stratified), and whole families at a time where prompts come in families, since
    near-duplicates say less than as many independent prompts. The threshold is found anew in every resample, so the interval of the
    true-positive rate holds its uncertainty too (an interval for a fixed threshold is too narrow).

    Args:
        memorized: Scores, or ``(tries, n)`` of several tries whose figures are averaged (such as one image a prompt, each image once).
        clean: The same of clean prompts.
        fpr: False-positive rate, as in `tpr_at_fpr`.
        memorized_families: The family of each memorized prompt; every prompt is its own where None.
        clean_families: The same of the clean prompts.
        confidence: Of the intervals, which are percentiles of the resampled figures.
        resamples: How many.
        seed: Of the resampling.

    Raises:
        MemhookError: Scores are not finite, or numbers do not agree.

    >>> print(evaluate([2.0, 3.0, 4.0], [1.0, 2.5, 0.5], fpr=0.5, resamples=200).auc)
    0.889 (0.333 to 1.000)
    """
    if not (0 < confidence < 1 and resamples >= 1):
        raise MemhookError(f"confidence is {confidence} and resamples {resamples}; expected a confidence between 0 and 1 and at least one resample")
    tries = [np.atleast_2d(np.asarray(values, np.float64)) for values in (memorized, clean)]
    if tries[0].ndim != 2 or len(tries[0]) != len(tries[1]):
        raise MemhookError(f"the scores have shapes {tries[0].shape} and {tries[1].shape}; expected (n,) or (tries, n) with as many tries of both")
    values = np.array([[roc_auc(m, c), tpr_at_fpr(m, c, fpr=fpr)] for m, c in zip(*tries, strict=True)]).mean(axis=0)
    rng = np.random.default_rng(seed)
    drawn = _resampled(memorized_families, tries[0].shape[1], resamples, rng, "memorized")
    drawn_clean = _resampled(clean_families, tries[1].shape[1], resamples, rng, "clean")
    figures = np.mean([_weighted_figures(m, c, drawn, drawn_clean, fpr) for m, c in zip(*tries, strict=True)], axis=0)  # (resamples, 2)
    low, high = np.quantile(figures, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    auc, tpr = (Interval(float(value), float(a), float(b)) for value, a, b in zip(values, low, high, strict=True))
    return Separation(auc, tpr, fpr, tries[0].shape[1], tries[1].shape[1], confidence)


def one_per_family(families: Sequence[str]) -> np.ndarray:
    """The positions of each family's first prompt, for figures without near-duplicates.

    >>> one_per_family(["a", "b", "a"])
    array([0, 1])
    """
    return np.sort(np.unique(np.asarray(families), return_index=True)[1])


def _resampled(families: Sequence[str] | None, count: int, resamples: int, rng: np.random.Generator, name: str) -> np.ndarray:
    """``(resamples, n)``: how often each prompt was drawn, whole families at a time."""
    if families is not None and len(families) != count:
        raise MemhookError(f"there are {count} {name} prompts and {len(families)} families; expected a family for each")
    return draw_families(range(count) if families is None else families, resamples, rng)


def draw_families(families: Sequence[object], resamples: int, rng: np.random.Generator) -> np.ndarray:
    """How often each of ``n`` rows is in each of so many bootstrap samples of their families, ``(resamples, n)``."""
    names, members = np.unique(np.asarray(families), return_inverse=True)
    drawn: np.ndarray = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)[:, members]
    return drawn


def _weighted_figures(memorized: np.ndarray, clean: np.ndarray, drawn: np.ndarray, drawn_clean: np.ndarray, fpr: float) -> np.ndarray:
    """AUC and TPR of scores that count several times or not at all, ``(resamples, 2)``."""
    order = np.argsort(clean)
    values, starts = np.unique(clean[order], return_index=True)
    weights = np.add.reduceat(drawn_clean[:, order], starts, axis=1)  # (resamples, values)
    below = np.concatenate([np.zeros((len(weights), 1)), np.cumsum(weights, axis=1)], axis=1)
    total, positives = below[:, -1:], drawn.sum(axis=1, keepdims=True)
    left, right = np.searchsorted(values, memorized, "left"), np.searchsorted(values, memorized, "right")
    auc = (drawn * (below[:, left] + below[:, right]) / 2).sum(axis=1, keepdims=True) / (total * positives)
    # The largest clean score that cannot be flagged any more: with it the rate would be fpr or higher.
    reached = (total - below[:, :-1]) / total >= fpr  # (resamples, values): of the scores from this value on
    highest = values[reached.shape[1] - 1 - reached[:, ::-1].argmax(axis=1)]
    tpr = (drawn * (memorized > highest[:, None])).sum(axis=1, keepdims=True) / positives
    return np.concatenate([auc, tpr], axis=1)
