"""From ComfyUI's predictions of the clean latent to predictions of the noise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from memhook.capture.prediction import Space


def space_of(model: Any) -> Space:
    """In which unit ``(x - x0) / sigma`` is.

    For rectified flows that is the velocity, for all others the noise, also where a model predicts something else (v, x0).
    """
    kinds = {kind.__name__ for kind in type(getattr(model, "model_sampling", None)).__mro__}
    forge = getattr(getattr(model, "predictor", None), "prediction_type", None)
    return "flow" if "CONST" in kinds or forge == "const" else "eps"


def covered(x0_cond: Tensor, x0_uncond: Tensor) -> Tensor:
    """``(b, 1, ...)`` bool: where both were predicted.

    ComfyUI leaves exact zeros where no network ran (outside of all areas, under an empty mask, when a time range has ended, at cfg 1),
    in all channels; a network does not.
    """
    predicted: Tensor = x0_cond.ne(0).any(dim=1, keepdim=True) & x0_uncond.ne(0).any(dim=1, keepdim=True)
    return predicted


def column(sigma: Tensor, like: Tensor) -> Tensor:
    """``(b,)`` or ``(1,)`` noise levels as a factor for ``(b, ...)``."""
    return sigma.reshape(-1, *(1,) * (like.ndim - 1)).to(like.device)


def to_noise(x0: Tensor, x: Tensor, sigma: Tensor, where: Tensor | None) -> Tensor:
    """``(x - x0) / sigma``, zero where nothing was predicted; of an x0 that autograd follows, differentiable."""
    wide = torch.promote_types(x0.dtype, torch.float32)
    noise = (x.to(wide) - x0.to(wide)) / column(sigma, x0).to(wide)
    return noise if where is None else torch.where(where, noise, torch.zeros((), dtype=wide, device=noise.device))


def to_clean(noise: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """The inverse of `to_noise` where something was predicted."""
    return x - (column(sigma, x) * noise).to(x.dtype)
