"""Putting another conditional prediction into what a pipeline has already combined for its scheduler.

The scheduler's step comes after the guidance arithmetic, which cannot be run again. But for nearly every formula in use it is linear in
the predictions, up to a factor for each sample: so its weights are fitted, and the difference of the two conditional predictions is added
with the weight of the conditional one. Rescaled guidance (``guidance_rescale``) has a factor that depends on the predictions; it is
recognized by its arithmetic, and computed again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from memhook.adapting.pairs import Prediction
    from memhook_diffusers.outputs import Reader

_WORST_FIT = 1e-2  # relative residual of a sample beyond which the output is something else than a combination of the predictions


@torch.no_grad()
def repaired(target: Tensor, predictions: Sequence[Prediction], cond: int, pred_cond: Tensor, reader: Reader) -> Tensor | None:
    """What the scheduler would be given had the conditional prediction been ``pred_cond``; None where that cannot be told.

    Args:
        target: What it is given, ``(b, ...)``.
        predictions: All predictions that went into it.
        cond: The conditional one among them.
        pred_cond: ``(b, ...)``, to stand in its place. Samples for which it is the old one come out bit-identical.
        reader: How the predictions relate to the target.
    """
    samples = len(pred_cond)
    if reader.form == "unknown" or target.numel() != pred_cond.numel():
        return None
    wide = torch.promote_types(target.dtype, torch.float32)
    parts = torch.stack([reader.flat(prediction.values) for prediction in predictions], dim=1).to(wide)  # (b, n, elements)
    combined = target.reshape(samples, -1).to(wide)  # (b, elements); some video schedulers are given a row for each frame
    # The weights are those that leave least of the target unexplained; equal predictions share theirs.
    gram = torch.einsum("bie,bje->bij", parts, parts).double()
    weights = torch.linalg.pinv(gram, hermitian=True, rtol=1e-9) @ torch.einsum("bie,be->bi", parts, combined).double()[..., None]
    explained = torch.einsum("bi,bie->be", weights[..., 0].to(wide), parts)
    moved = (predictions[cond].values != pred_cond).flatten(1).any(1)  # (b,)
    residual = torch.linalg.vector_norm(explained - combined, dim=1) / torch.linalg.vector_norm(combined, dim=1)
    if not bool((residual[moved] <= _WORST_FIT).all()):
        return None
    change = reader.flat(pred_cond).to(wide) - parts[:, cond]
    changed = combined + weights[:, cond].to(wide) * change
    changed = changed * _rescaled(weights[..., 0].to(wide), parts, combined, changed, cond, change)
    return torch.where(moved[:, None], changed.to(target.dtype), target.reshape(samples, -1)).reshape(target.shape)


def _rescaled(weights: Tensor, parts: Tensor, combined: Tensor, changed: Tensor, cond: int, change: Tensor) -> Tensor:
    """``(b, 1)``: by which factor ``guidance_rescale`` would scale the new combination otherwise than the old one; 1 without it.

    It scales ``g = u + w (c - u)`` by ``f = p std(c) / std(g) + (1 - p)`` (Lin et al. 2024). The weights of ``g`` sum to 1, so ``f`` is the
    sum of the fitted ones, and ``p`` follows. A sum of 1 is plain guidance, and a ``p`` outside (0, 1] some other formula.
    """
    factor = weights.sum(1, keepdim=True)  # (b, 1)
    ratio = parts[:, cond].std(1, keepdim=True) / (combined / factor).std(1, keepdim=True)
    strength = (factor - 1) / (ratio - 1)
    new_ratio = (parts[:, cond] + change).std(1, keepdim=True) / (changed / factor).std(1, keepdim=True)
    new_factor = strength * new_ratio + 1 - strength
    plausible = ((factor - 1).abs() > 1e-4) & (strength > 0) & (strength < 1 + 1e-3)
    return torch.where(plausible, new_factor / factor, 1.0)
