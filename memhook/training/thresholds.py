"""Thresholds of the training filter: a number, a table over timesteps, or a function of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from memhook.errors import MemhookError

Schedule = Callable[[Tensor], "Tensor | float"]
"""``schedule(timesteps (b,)) -> (b,)``: the threshold of each sample at its timestep."""

Threshold = float | Tensor | Sequence[float] | Schedule


def as_schedule(threshold: Threshold | None) -> Schedule:
    """Any kind of threshold as a function of the timesteps; None never drops.

    Args:
        threshold: A number of at least 0; a table ``(T,)`` indexed by the integer timestep; or a callable.

    Raises:
        MemhookError: It is none of these, or holds NaN or negative numbers.
    """
    if threshold is None:
        return lambda timesteps: torch.full_like(timesteps, math.inf, dtype=torch.float32)
    if callable(threshold) and not isinstance(threshold, Tensor):
        return threshold
    try:
        table = torch.as_tensor(threshold, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise MemhookError(
            f"the threshold is a {type(threshold).__name__}; expected a number, a table of one number a timestep, or a function of the timesteps"
        ) from error
    if table.ndim > 1 or table.numel() == 0:
        raise MemhookError(
            f"the threshold has shape {tuple(table.shape)}; expected one number, or a table (T,) indexed by the integer timestep (0 to T - 1)"
        )
    if not bool((table >= 0).all()):
        raise MemhookError(f"the threshold holds {float(table.min()):g}; expected numbers of at least 0 (the magnitude that is still kept)")
    if table.ndim == 0:
        number = float(table)
        return lambda timesteps: torch.full_like(timesteps, number, dtype=torch.float32)
    return lambda timesteps: _look_up(table, timesteps)


def _look_up(table: Tensor, timesteps: Tensor) -> Tensor:
    index = timesteps.long()
    if not bool((index == timesteps).all()) or int(index.min()) < 0 or int(index.max()) >= len(table):
        raise MemhookError(
            f"the timesteps are {float(timesteps.min()):g} to {float(timesteps.max()):g}, and the threshold is a table of {len(table)}; expected "
            f"integers from 0 to {len(table) - 1}. Use a table as long as the schedule, or a function of the timesteps"
        )
    return table.to(index.device)[index]


def thresholds_at(schedule: Schedule, timesteps: Tensor) -> Tensor:
    """``(b,)`` float32: what the schedule gives for these timesteps ``(b,)``, checked."""
    found = schedule(timesteps)
    limits = torch.as_tensor(found, dtype=torch.float32, device=timesteps.device)
    if limits.ndim == 0:
        limits = limits.expand(len(timesteps))
    if limits.shape != timesteps.shape:
        raise MemhookError(
            f"the threshold function gave the shape {tuple(limits.shape)} for {len(timesteps)} timesteps; expected that shape, or one number"
        )
    if not bool((limits >= 0).all()):
        raise MemhookError(f"the threshold function gave {limits.tolist()}; expected numbers of at least 0 (infinity keeps every sample)")
    return limits
