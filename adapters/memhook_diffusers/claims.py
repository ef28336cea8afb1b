"""Which predictions a guider was given as the conditional and the unconditional one, where it was not given the very tensors."""

from __future__ import annotations

import numpy as np

_LARGEST_REST = 0.02  # what may be left of a given tensor, relative to it: bfloat16 rounds to 0.004
_CLEARLY_LESS = 0.1  # relative to what the other predictions leave


def claimed_pair(claims: np.ndarray | None, count: int) -> tuple[int, int] | None:
    """``(cond, uncond)``, by what is left of each given tensor when a prediction (and the noisy sample) is taken out of it.

    Pipelines give their guider copies, the predictions negated (modular Z-Image), or converted to a clean sample ``x - sigma v``
    (modular LTX 2). All of these are a multiple of the prediction plus a multiple of the noisy sample.

    Args:
        claims: ``(m, b, q, q)`` inner products, for each use of a guider: the ``count`` predictions, the noisy sample where it has
            their form, and the two given tensors.
        count: The predictions.
    """
    for samples in claims if claims is not None else ():
        found = {(_nearest(products, count, -2), _nearest(products, count, -1)) for products in samples}
        if len(found) == 1:
            cond, uncond = found.pop()
            if cond is not None and uncond is not None and cond != uncond:
                return cond, uncond
    return None


def _nearest(products: np.ndarray, count: int, given: int) -> int | None:
    """The prediction that a given tensor was made of; None where that is not clear."""
    size = products[given, given]
    if count < 2 or not np.isfinite(products).all() or size <= 0:
        return None
    noisy = list(range(count, len(products) - 2))
    rests = []
    for index in range(count):
        used = [index, *noisy]
        scales = np.sqrt(np.diag(products)[used])
        if not scales.all():
            return None
        right = products[used, given] / scales
        solution = np.linalg.lstsq(products[np.ix_(used, used)] / np.outer(scales, scales), right, rcond=1e-12)[0]
        rests.append(np.sqrt(max(size - solution @ right, 0.0) / size))
    first, second = np.argsort(rests)[:2]
    return int(first) if rests[first] <= _LARGEST_REST and rests[first] < _CLEARLY_LESS * rests[second] else None
