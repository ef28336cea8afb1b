"""Which of two predictions is the conditional one: read off the guidance arithmetic that the pipeline itself does.

Every pipeline combines the two predictions into the ``model_output`` that it gives to the scheduler. With their mean ``m`` and
difference ``d``, guidance ``u + w (c - u)`` is ``m + k d`` with ``k = w - 1/2`` where the first prediction is the conditional one,
and ``k = 1/2 - w`` where the second is. Rescaled and negated combinations are ``a m + k d``, so the sign of ``k / a`` tells, whatever
the formula. The two coefficients are fitted by least squares per sample.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from memhook.trace import Evidence

_LEAST_DIFFERENCE = 1e-5  # norm of d over norm of m below which there is nothing to see
_WORST_FIT = 0.05  # residual norm over norm of k d: a combination of something else


@torch.no_grad()
def guidance_evidence(first: Tensor, second: Tensor, model_output: Tensor) -> Evidence:
    """Prepare the fit on the device; the coefficients are read when the evidence is asked.

    Args:
        first: The pipeline's first prediction, ``(b, ...)``.
        second: Its second prediction.
        model_output: What it gave to the scheduler, ``(b, ...)``.
    """
    a, b, target = (x.detach().flatten(1).to(torch.promote_types(x.dtype, torch.float32)) for x in (first, second, model_output))
    mean, difference = (a + b) / 2, a - b
    products = torch.stack(
        [(x * y).sum(1) for x, y in ((mean, mean), (mean, difference), (difference, difference), (target, mean), (target, difference), (target, target))]
    )  # (6, b)
    return Evidence(lambda: _decide(products))


def _decide(products: Tensor) -> tuple[bool | None, np.ndarray | None]:
    mm, md, dd, tm, td, tt = products.to("cpu", torch.float64).numpy()
    determinant = mm * dd - md * md
    with np.errstate(all="ignore"):
        alpha = (tm * dd - td * md) / determinant
        kappa = (td * mm - tm * md) / determinant
        residual = tt - alpha * tm - kappa * td
        usable = (dd > _LEAST_DIFFERENCE**2 * mm) & np.isfinite(kappa) & np.isfinite(alpha) & (alpha != 0)
        usable &= residual <= _WORST_FIT**2 * kappa**2 * dd + 1e-5 * tt
        effective = kappa / alpha  # w - 1/2, or 1/2 - w
    votes = np.sign(effective[usable])
    if not len(votes) or abs(votes.sum()) < len(votes):  # nothing to see, or the samples disagree
        return None, None
    scale = np.where(usable, np.abs(effective) + 0.5, np.nan)
    return bool(votes[0] > 0), scale
