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

from memhook.adapting.tensors import full_precision
from memhook_diffusers.outputs import noisy_part

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from memhook.adapting.pairs import Prediction
    from memhook_diffusers.outputs import Reader

_WORST_FIT = 1e-2  # residual of a sample, relative to its guidance term, beyond which the output is no combination of the predictions
_ROUNDINGS = 4.0  # what rounding may leave, in units of the precision of what was combined


@torch.no_grad()
def repaired(
    target: Tensor,
    predictions: Sequence[Prediction],
    cond: int,
    pred_cond: Tensor,
    reader: Reader,
    *,
    uncond: int,
    others: Mapping[int, Tensor] | None = None,
) -> Tensor | None:
    """What the scheduler would be given had the conditional prediction been ``pred_cond``; None where that cannot be told.

    Args:
        target: What it is given, ``(b, ...)``.
        predictions: All predictions that went into it.
        cond: The conditional one among them.
        pred_cond: ``(b, ...)``, to stand in its place. Samples for which it is the old one come out bit-identical.
        reader: How the predictions relate to the target.
        uncond: The unconditional one among them.
        others: What other predictions were to be, by their number: perturbed ones for the same text.
    """
    samples = len(pred_cond)
    if reader.form == "unknown" or target.numel() != pred_cond.numel():
        return None
    wide = torch.float64 if target.device.type != "mps" else torch.float32
    with full_precision(target.device):
        parts = torch.stack([reader.flat(prediction.values) for prediction in predictions], dim=1).to(wide)  # (b, n, elements)
        combined = target.reshape(samples, -1).to(wide)  # (b, elements); some video schedulers are given a row for each frame
        moved = (predictions[cond].values != pred_cond).flatten(1).any(1)  # (b,)
        coarsest = max(torch.finfo(values.dtype).eps for values in (target, pred_cond))
        for noisy in _with_and_without(noisy_part(predictions[cond]), reader, parts):
            weights, residual = _fitted(parts, combined, cond, noisy)
            guidance = weights[:, cond].abs() * torch.linalg.vector_norm(parts[:, cond] - parts[:, uncond], dim=1)
            size = torch.einsum("bi,bi->b", weights.abs(), torch.linalg.vector_norm(parts, dim=2))
            if bool((residual <= _WORST_FIT * guidance + _ROUNDINGS * coarsest * size)[moved].all()):
                break
        else:
            return None
        change = reader.flat(pred_cond).to(wide) - parts[:, cond]
        changed = combined + weights[:, [cond]] * change
        for number, values in (others or {}).items():
            changed = changed + weights[:, [number]] * (reader.flat(values).to(wide) - parts[:, number])
        if noisy is None:
            changed = changed * _rescaled(weights, parts, combined, changed, cond, change)
    return torch.where(moved[:, None], changed.to(target.dtype), target.reshape(samples, -1)).reshape(target.shape)


def _with_and_without(noisy: Tensor | None, reader: Reader, parts: Tensor) -> Iterator[Tensor | None]:
    """Combinations without and with the noisy sample ``(b, elements)``: some pipelines convert what they have combined (Cosmos)."""
    yield None
    if noisy is not None and noisy[0].numel() == parts.shape[2]:
        yield reader.flat(noisy).to(parts)


def _fitted(parts: Tensor, combined: Tensor, cond: int, noisy: Tensor | None) -> tuple[Tensor, Tensor]:
    """The weights ``(b, n)`` of the predictions that leave least of what was combined, and the length of what is left, ``(b,)``."""
    # Of differences to the conditional prediction: the predictions themselves are nearly one vector.
    basis = parts - parts[:, [cond]]
    basis[:, cond] = parts[:, cond]
    if noisy is not None:
        basis = torch.cat([basis, noisy[:, None]], dim=1)
    gram, right = torch.einsum("bie,bje->bij", basis, basis), torch.einsum("bie,be->bi", basis, combined)
    lengths = gram.diagonal(dim1=1, dim2=2).sqrt().clamp_min(torch.finfo(gram.dtype).tiny)  # (b, n)
    scaled = gram / lengths[:, :, None] / lengths[:, None, :]
    weights = (torch.linalg.pinv(scaled, hermitian=True, rtol=1e-9) @ (right / lengths)[..., None])[..., 0] / lengths
    residual = torch.linalg.vector_norm(torch.einsum("bi,bie->be", weights, basis) - combined, dim=1)
    weights = weights[:, : parts.shape[1]]
    weights[:, cond] = 2 * weights[:, cond] - weights.sum(1)  # of the predictions themselves
    return weights, residual


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
