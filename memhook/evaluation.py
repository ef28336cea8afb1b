"""How well scores separate memorized from clean prompts (needs the extra ``eval``)."""

from __future__ import annotations

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
    from sklearn.metrics import roc_curve

    if not 0 < fpr <= 1:
        raise MemhookError(f"fpr is {fpr}; expected a rate above 0 and at most 1, such as 0.01")
    labels, scores = _checked(memorized, clean)
    rates, hits, _ = roc_curve(labels, scores, drop_intermediate=False)
    return float(hits[rates < fpr].max())
