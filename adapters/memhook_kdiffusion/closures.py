"""CFG wrappers for functions, which have no hooks of their own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from memhook.errors import MemhookError

if TYPE_CHECKING:
    from memhook_kdiffusion.adapter import Order


class Wrapped(nn.Module):
    """A function that does guidance, as a module that hooks can see; made by `wrap`."""

    def __init__(self, function: Callable[..., Tensor], denoiser: nn.Module, layout: Order | None) -> None:
        super().__init__()
        self.inner_model = denoiser
        self.memhook_signature = function
        self.memhook_layout = layout
        self.train(denoiser.training)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.memhook_signature(*args, **kwargs)


def wrap(function: Callable[..., Tensor], *, denoiser: nn.Module, layout: Order | None = None) -> Wrapped:
    """A plain function that does guidance, as something to give to the sampler and to `memhook.watch`.

    Args:
        function: Called by the sampler as ``function(x, sigma, ...)``; gives the guided clean samples.
        denoiser: The module ``(x, sigma, ...) -> x0`` that it calls.
        layout: As in `KDiffusionAdapter`; may be left out where the function takes its conditioning as arguments (``cond``, ``uncond``).

    >>> import torch, memhook
    >>> from memhook.testing import tiny_unet
    >>> from memhook_kdiffusion import wrap
    >>> unet, texts = tiny_unet(), torch.cat([torch.zeros(2, 5, 6), torch.ones(2, 5, 6)])
    >>> def function(x, sigma):
    ...     uncond, cond = unet(torch.cat([x, x]), torch.cat([sigma, sigma]), texts).chunk(2)
    ...     return uncond + 7.5 * (cond - uncond)
    >>> model = wrap(function, denoiser=unet, layout="uncond_first")
    >>> with memhook.watch(model) as trace:
    ...     denoised = model(torch.randn(2, 4, 8, 8), torch.ones(2))
    >>> trace.magnitudes.shape, trace.roles
    ((1, 2), 'declared')
    """
    if not callable(function):
        raise MemhookError(f"the function is a {type(function).__name__}; expected what the sampler calls as function(x, sigma, ...)")
    if not isinstance(denoiser, nn.Module):
        raise MemhookError(
            f"the denoiser is a {type(denoiser).__name__}; expected the torch.nn.Module that the function calls, since calls of anything else "
            "cannot be seen. For a denoiser that is a function, let memhook_kdiffusion.guided do the guidance"
        )
    return Wrapped(function, denoiser, layout)


class _Function(nn.Module):
    """A function as a module, whose calls hooks can see."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self._function = function

    def forward(self, x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        return self._function(x, sigma, cond)


class Guided(nn.Module):
    """Classifier-free guidance around a denoiser; made by `guided`."""

    def __init__(self, denoiser: nn.Module, cond: Tensor, uncond: Tensor, cond_scale: float) -> None:
        super().__init__()
        self.inner_model = denoiser
        self.train(denoiser.training)
        self.memhook_signature = functools.partial(_guided, denoiser)
        self._cond, self._uncond, self._cond_scale = cond, uncond, cond_scale

    def memhook_arguments(self) -> dict[str, Any]:
        """What the wrapper is not given by its caller, by name."""
        return {"cond": self._cond, "uncond": self._uncond, "cond_scale": self._cond_scale}

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return _guided(self.inner_model, x, sigma, cond=self._cond, uncond=self._uncond, cond_scale=self._cond_scale)


def _guided(denoiser: nn.Module, x: Tensor, sigma: Tensor, *, cond: Tensor, uncond: Tensor, cond_scale: float) -> Tensor:
    conditioning = torch.cat([uncond.expand(len(x), *uncond.shape[1:]), cond.expand(len(x), *cond.shape[1:])])
    pred_uncond, pred_cond = denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), conditioning).chunk(2)
    denoised: Tensor = pred_uncond + cond_scale * (pred_cond - pred_uncond)
    return denoised


def guided(denoiser: Callable[..., Tensor], *, cond: Tensor, uncond: Tensor, cond_scale: float) -> Guided:
    """Classifier-free guidance ``u + cond_scale (c - u)`` around a denoiser that is a function, or a module.

    Args:
        denoiser: ``denoiser(x, sigma, conditioning) -> x0`` on a batch of ``2 b`` rows, the unconditional ones first.
        cond: Conditioning ``(b, ...)``, or one row for all samples.
        uncond: Unconditional conditioning of the same form.
        cond_scale: The guidance scale.
    """
    if not callable(denoiser):
        raise MemhookError(f"the denoiser is a {type(denoiser).__name__}; expected a function or module (x, sigma, conditioning) -> x0")
    module = denoiser if isinstance(denoiser, nn.Module) else _Function(denoiser)
    return Guided(module, cond, uncond, cond_scale)
