"""Random UNets with cross-attention, small enough for unit tests, and a guided sampler for them."""

from __future__ import annotations

import math
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

TinyLayout = Literal["uncond_first", "cond_first", "two_calls_uncond_first", "two_calls_cond_first"]


class TinyUNet(nn.Module):
    """A two-level UNet: ``unet(sample (b, c, h, w), timestep, encoder_hidden_states (b, l, d)) -> (b, c, h, w)``.

    With ``learned_variance`` it returns twice the channels, of which the first half is the prediction. What the
    prediction means (noise or velocity) is up to the sampler that calls it.
    """

    def __init__(self, *, channels: int = 4, width: int = 8, text_width: int = 6, learned_variance: bool = False) -> None:
        super().__init__()
        self.channels = channels
        self.time = nn.Linear(8, width)
        self.enter = nn.Conv2d(channels, width, 3, padding=1)
        self.down = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.query, self.key, self.value = nn.Linear(width, width), nn.Linear(text_width, width), nn.Linear(text_width, width)
        self.up = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.leave = nn.Conv2d(2 * width, channels * (2 if learned_variance else 1), 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor | float, encoder_hidden_states: Tensor) -> Tensor:
        times = torch.as_tensor(timestep, dtype=sample.dtype, device=sample.device).expand(sample.shape[0])
        angles = times[:, None] * torch.logspace(0, -3, 4, dtype=sample.dtype, device=sample.device)  # (b, 4)
        shift = self.time(torch.cat([angles.sin(), angles.cos()], dim=1))[:, :, None, None]  # (b, width, 1, 1)
        high = torch.nn.functional.silu(self.enter(sample) + shift)  # (b, width, h, w)
        low = self.down(high)  # (b, width, h/2, w/2)
        tokens = rearrange(low, "b c h w -> b (h w) c")
        attended = nn.functional.scaled_dot_product_attention(self.query(tokens), self.key(encoder_hidden_states), self.value(encoder_hidden_states))
        low = low + rearrange(attended, "b (h w) c -> b c h w", h=low.shape[2])
        output: Tensor = self.leave(torch.cat([high, self.up(low)], dim=1))
        return output


def tiny_unet(*, seed: int = 0, learned_variance: bool = False, dtype: torch.dtype = torch.float32) -> TinyUNet:
    """A `TinyUNet` with weights that depend on the seed alone; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TinyUNet(learned_variance=learned_variance).to(dtype).eval()


@torch.no_grad()
def sample(
    unet: nn.Module,
    *,
    steps: int = 4,
    samples: int = 2,
    guidance_scale: float = 7.5,
    layout: TinyLayout = "uncond_first",
    space: Literal["eps", "v"] = "eps",
    cond: Tensor | None = None,
    uncond: Tensor | None = None,
    noise: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """Sample with classifier-free guidance, in the layout asked for; at a scale of 1 or less only the conditional call is made.

    Args:
        unet: Called as ``unet(sample, timestep, embedding)``; channels beyond the sample's (learned variance) are dropped.
        steps: Evaluations.
        samples: Samples ``b``, where ``cond`` is None.
        guidance_scale: Weight ``w`` in ``u + w (c - u)``.
        layout: One batched call or two calls, and their order.
        space: What the prediction is taken for: the noise, or the velocity of v-prediction.
        cond: Conditional embedding ``(b, l, d)``; random where None.
        uncond: Unconditional embedding ``(b, l, d)``; where None random, but the same for all samples and seeds, as an empty prompt's.
        noise: Initial noise ``(b, c, h, w)``; random where None.
        seed: Of what is random here.

    >>> import memhook
    >>> sample(tiny_unet(), samples=3, layout="two_calls_cond_first", space="v").shape
    torch.Size([3, 4, 8, 8])
    """
    generator = torch.Generator().manual_seed(seed)
    parameter = next(unet.parameters())

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(parameter)

    if cond is None:
        cond = randn(samples, 5, 6)
    if uncond is None:
        randn(1, 5, 6)  # the noise does not depend on whether one was given
        uncond = torch.randn(1, 5, 6, generator=torch.Generator().manual_seed(7)).to(parameter).expand_as(cond)
    x = randn(len(cond), 4, 8, 8) if noise is None else noise.to(parameter)
    for timestep in torch.linspace(999, 1, steps).round():
        predicted = _guided(unet, x, timestep, cond, uncond, guidance_scale, layout)
        if space == "v":  # to noise, on the cosine schedule
            angle = float(timestep) / 1000 * math.pi / 2
            predicted = math.cos(angle) * predicted + math.sin(angle) * x
        x = x - predicted / steps
    return x


def _guided(unet: nn.Module, x: Tensor, timestep: Tensor, cond: Tensor, uncond: Tensor, scale: float, layout: TinyLayout) -> Tensor:
    def predict(sample: Tensor, embedding: Tensor) -> Tensor:
        predicted: Tensor = unet(sample, timestep, embedding)[:, : x.shape[1]]
        return predicted

    if scale <= 1:
        return predict(x, cond)
    if layout == "uncond_first":
        u, c = predict(torch.cat([x, x]), torch.cat([uncond, cond])).chunk(2)
    elif layout == "cond_first":
        c, u = predict(torch.cat([x, x]), torch.cat([cond, uncond])).chunk(2)
    elif layout == "two_calls_uncond_first":
        u = predict(x, uncond)
        c = predict(x, cond)
    else:
        c = predict(x, cond)
        u = predict(x, uncond)
    return u + scale * (c - u)
