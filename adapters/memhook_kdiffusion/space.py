"""From clean samples, which denoisers of k-diffusion give, to predictions of the noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Combined:
    """The unconditional prediction, and what the conditional ones of a sample's prompts make together with it.

    Hosts with several weighted prompts compute ``u + scale * sum_k w_k (c_k - u)``, which is guidance by ``scale`` of the conditional prediction
    ``u + sum_k w_k (c_k - u)``. Noise follows from the clean sample by ``eps = (x - x0) / sigma`` (Karras et al. 2022), so that
    ``eps_c - eps_u = (x0_u - x0_c) / sigma``; for models that predict a velocity this is ``(v_c - v_u) / sqrt(sigma^2 + 1)``.

    Attributes:
        x: The noisy samples ``(b, ...)``, float32 at least, as all others.
        sigma: ``(b,)``.
        uncond: The unconditional clean samples, ``(b, ...)``.
        weights: ``(b, k)``.
        guided: ``(b,)`` bool: whether there was an unconditional prediction.
    """

    x: Tensor
    sigma: Tensor
    uncond: Tensor
    weights: Tensor
    guided: Tensor

    @property
    def _level(self) -> Tensor:
        return self.sigma.reshape(-1, *[1] * (self.x.ndim - 1))

    @property
    def plain(self) -> bool:
        """Whether every sample has one prompt of weight 1."""
        return self.weights.shape[1] == 1 and bool((self.weights == 1).all())

    def difference(self, cond: Tensor) -> Tensor:
        """``eps_c - eps_u``, ``(b, ...)``, of the clean samples ``(b, k, ...)`` of all prompts; no cancellation against ``x``."""
        return self._weighted(self.uncond[:, None] - cond.to(self.x)) / self._level

    def pred_cond(self, cond: Tensor) -> Tensor:
        """The conditional prediction, ``(b, ...)``."""
        cond = cond.to(self.x)
        if self.plain:
            return (self.x - cond[:, 0]) / self._level
        together = self.uncond + self._weighted(cond - self.uncond[:, None])
        # Without an unconditional prediction prompts cannot be combined; the first one stands for them.
        return (self.x - torch.where(self._each(self.guided), together, cond[:, 0])) / self._level

    def pred_uncond(self) -> Tensor:
        """The unconditional prediction, ``(b, ...)``; NaN for samples that have none."""
        return torch.where(self._each(self.guided), (self.x - self.uncond) / self._level, torch.nan)

    def moved(self, cond: Tensor, pred_cond: Tensor) -> Tensor:
        """The clean samples ``(b, k, ...)`` that give another ``pred_cond``: the prompt of the largest weight takes the whole difference."""
        largest = self.weights.abs().argmax(1, keepdim=True)  # (b, 1)
        share = torch.zeros_like(self.weights).scatter(1, largest, 1 / self.weights.gather(1, largest)).to(self.x)  # (b, k)
        change = (self.pred_cond(cond) - pred_cond.to(self.x)) * self._level
        return cond.to(self.x) + change[:, None] * share.reshape(*share.shape, *[1] * (self.x.ndim - 1))

    def take(self, samples: Tensor) -> Combined:
        """The same for some samples; parts of tensors that may take part in autograd may do so as well, also inside of inference_mode."""
        with torch.inference_mode(mode=False), torch.no_grad():
            own = samples.to(self.x.device)
            return Combined(self.x[own], self.sigma[own], self.uncond[own], self.weights[samples.cpu()], self.guided[own])

    def detached(self) -> Combined:
        """Copies that may take part in autograd though they were made under inference_mode, and that later changes do not reach."""
        with torch.inference_mode(mode=False), torch.no_grad():
            return Combined(*(tensor.detach().clone() for tensor in (self.x, self.sigma, self.uncond, self.weights, self.guided)))

    def _each(self, flags: Tensor) -> Tensor:
        return flags.reshape(-1, *[1] * (self.x.ndim - 1))

    def _weighted(self, differences: Tensor) -> Tensor:
        """``(b, k, ...) -> (b, ...)``."""
        if self.plain:
            return differences[:, 0]
        weights = self.weights.to(differences)
        return (differences * weights.reshape(*weights.shape, *[1] * (self.x.ndim - 1))).sum(1)
