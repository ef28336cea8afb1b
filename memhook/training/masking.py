"""Which samples of a training batch to keep, and the mean of the loss over them."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from memhook.capture.prediction import magnitude
from memhook.errors import MemhookError

Normalize = Literal["kept", "batch"]
"""What the sum of the kept losses is divided by: the number of kept samples (the paper), or the size of the batch."""


def keep_mask(pred_cond: Tensor, pred_uncond: Tensor, *, threshold: Tensor | float) -> Tensor:
    """Which samples may stay in the loss: those whose magnitude does not surpass the threshold (Wen et al. 2024, section 4.3).

    Args:
        pred_cond: Conditional prediction ``(b, ...)`` for the batch's noisy samples.
        pred_uncond: Unconditional prediction of the same shape, for the same noisy samples and timesteps.
        threshold: The paper's tau: one number for all, or ``(b,)``. In the unit of the prediction, per sample; infinite keeps all.

    Returns:
        ``(b,)`` bool on the device of the predictions; True keeps.

    Raises:
        MemhookError: The shapes do not fit, a threshold is NaN or negative, or a prediction is NaN or infinite.

    >>> import torch
    >>> cond = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
    >>> keep_mask(cond, torch.zeros(2, 2), threshold=4.0)
    tensor([False,  True])
    """
    norms = magnitude(pred_cond.detach(), pred_uncond.detach())  # (b,)
    limits = check_thresholds(threshold, norms)
    check_finite(norms)
    return norms <= limits


def masked_mean(loss: Tensor, keep: Tensor, *, normalize: Normalize = "kept") -> Tensor:
    """The mean of the loss over the kept samples; where none is kept, a zero whose backward pass gives zeros and not an error.

    Dropped samples get a gradient of exactly zero, so a wholly dropped batch takes part in everything that a batch takes part in:
    distributed reduction, accumulation, gradient scaling.

    Args:
        loss: Loss of every sample, ``(b,)``, or of every element, ``(b, ...)``; weights of samples (min-SNR) belong in it.
        keep: ``(b,)`` bool, from `keep_mask`.
        normalize: ``"kept"`` divides by the number of kept samples, as the paper does; ``"batch"`` by ``b``, which gives every
            sample the same weight in every batch, rank and accumulation step.

    Returns:
        A scalar.

    Raises:
        MemhookError: The loss was averaged already, or ``keep`` does not fit it.

    >>> import torch
    >>> masked_mean(torch.tensor([1.0, 5.0, 3.0]), torch.tensor([True, False, True]))
    tensor(2.)
    """
    if keep.dtype is not torch.bool or keep.ndim != 1:
        raise MemhookError(f"keep is {keep.dtype} of shape {tuple(keep.shape)}; expected bool of shape (b,), as keep_mask returns it")
    return weighted_mean(loss, keep, normalize=normalize)


def weighted_mean(loss: Tensor, keep: Tensor, *, normalize: Normalize, flagged_weight: float = 0.0) -> Tensor:
    """`masked_mean` that may also leave dropped samples in, with a weight of their own."""
    if normalize not in get_args(Normalize):
        raise MemhookError(f"normalize is {normalize!r}; expected one of {', '.join(get_args(Normalize))}")
    per_sample = sample_losses(loss, batch=len(keep))
    keep = keep.to(per_sample.device)
    # Chosen, not multiplied: a dropped sample's loss may be infinite, and its product with zero is NaN.
    kept = torch.where(keep, per_sample, per_sample * flagged_weight if flagged_weight else torch.zeros_like(per_sample))
    divisor = keep.sum().clamp(min=1) if normalize == "kept" else len(keep)
    total: Tensor = kept.sum() / divisor
    return total


def sample_losses(loss: Tensor, *, batch: int) -> Tensor:
    """The loss of every sample, ``(b, ...) -> (b,)``, in float32 at least: a sum in half precision may overflow."""
    if loss.ndim == 0:
        raise MemhookError(
            'the loss is a scalar, averaged over the batch already; expected one loss a sample, (b,), or an element, (b, ...): use reduction="none"'
        )
    if len(loss) != batch:
        raise MemhookError(
            f"the loss has shape {tuple(loss.shape)}, but the denoiser was called on a batch of {batch}; "
            "give the losses of the samples of that call, in their order"
        )
    if not loss.is_floating_point():
        raise MemhookError(f"the loss has dtype {loss.dtype}; expected floating point")
    return loss.to(torch.promote_types(loss.dtype, torch.float32)).flatten(1).mean(1) if loss.ndim > 1 else loss.float()


def check_thresholds(threshold: Tensor | float, norms: Tensor) -> Tensor:
    """The threshold as a tensor, scalar or ``(b,)``, on the device of the magnitudes ``(b,)``."""
    try:
        limits = torch.as_tensor(threshold, dtype=norms.dtype, device=norms.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise MemhookError(f"the threshold is a {type(threshold).__name__}; expected a number or a tensor (b,)") from error
    if limits.ndim and limits.shape != norms.shape:
        raise MemhookError(
            f"the threshold has shape {tuple(limits.shape)} for a batch of {len(norms)}; expected one number, or {(len(norms),)}: one for each sample"
        )
    if not bool((limits >= 0).all()):
        raise MemhookError(
            f"the threshold is {limits.tolist()}; expected numbers of at least 0, in the unit of the magnitude (infinity keeps every sample)"
        )
    return limits


def check_finite(norms: Tensor) -> None:
    """Raise where a magnitude is NaN or infinite: it must not be compared with anything."""
    bad = torch.nonzero(~torch.isfinite(norms)).flatten().tolist()
    if bad:
        raise MemhookError(
            f"the magnitudes of {len(bad)} of {len(norms)} samples are NaN or infinite (the first is sample {bad[0]}), so a prediction was; expected "
            'finite predictions. Look for the cause (learning rate, dtype, data); in a loop whose gradient scaler copes, use on_nonfinite="keep"'
        )
