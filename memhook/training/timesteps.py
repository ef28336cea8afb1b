"""At which timesteps presentations are judged: a range, or a function of the batch's timesteps."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from memhook.errors import MemhookError

Timesteps = tuple[float, float] | Callable[[Tensor], Tensor]
"""Lowest and highest timestep, both included, in the unit that the loop gives to the denoiser; or ``f(timesteps (b,)) -> (b,)`` bool."""

Span = tuple[float, float]

_PATIENCE = 500  # presentations without a judged one among them, before that is worth a word


def as_span(timesteps: object) -> Span:
    """A checked range of timesteps.

    Raises:
        MemhookError: It is not two finite numbers in order.
    """
    try:
        low, high = (float(value) for value in timesteps)  # type: ignore[attr-defined]
    except (TypeError, ValueError) as error:
        raise MemhookError(
            f"timesteps is {timesteps!r}; expected a range (lowest, highest), such as (800, 999), or a function of the timesteps (b,). "
            "Give the range in the unit of the denoiser's timestep argument"
        ) from error
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise MemhookError(f"timesteps is ({low:g}, {high:g}); expected two finite numbers, the lower one first. Exchange or correct them")
    return low, high


def inside(timesteps: Tensor, span: Span) -> Tensor:
    """``(b,)`` bool: which timesteps lie in the range, ends included."""
    return (timesteps >= span[0]) & (timesteps <= span[1])


class JudgedTimesteps:
    """``judged(timesteps (b,)) -> (b,)`` bool, on the CPU; says so where the range never meets the loop's timesteps.

    Attributes:
        everywhere: Whether nothing is left out.
        span: The range, where it is one.
    """

    def __init__(self, timesteps: Timesteps | None) -> None:
        self.everywhere = timesteps is None
        self._function = timesteps if callable(timesteps) else None
        self.span = None if timesteps is None or self._function is not None else as_span(timesteps)
        self._waiting: int | None = 0  # presentations so far, until one is judged
        self._seen = (math.inf, -math.inf)

    def __call__(self, timesteps: Tensor) -> Tensor:
        if self.everywhere:
            return torch.ones(len(timesteps), dtype=torch.bool)
        if bool(timesteps.isnan().any()):
            raise MemhookError(
                "only some timesteps are to be judged, and the denoiser was given none that was recognized; expected a number or a tensor as its "
                "keyword timestep, timesteps, t or sigma, or as its second argument. Pass it there, or leave out timesteps="
            )
        if self._function is not None:
            found = torch.as_tensor(self._function(timesteps))
            if found.dtype is not torch.bool or found.shape != timesteps.shape:
                raise MemhookError(
                    f"the function given as timesteps returned {found.dtype} of shape {tuple(found.shape)} for {len(timesteps)} timesteps; "
                    "expected bool of the same shape, True where a presentation is to be judged"
                )
            found = found.cpu()
        else:
            assert self.span is not None  # noqa: S101 -- neither everywhere nor a function
            found = inside(timesteps, self.span)
        self._watch(timesteps, found)
        return found

    def _watch(self, timesteps: Tensor, found: Tensor) -> None:
        if self._waiting is None:
            return
        if bool(found.any()):
            self._waiting = None
            return
        self._waiting += len(timesteps)
        self._seen = min(self._seen[0], float(timesteps.min())), max(self._seen[1], float(timesteps.max()))
        if self._waiting >= _PATIENCE:
            wanted = f"{self.span[0]:g} to {self.span[1]:g}" if self.span is not None else "where the given function is True"
            warnings.warn(
                f"none of {self._waiting} presentations was judged: their timesteps are {self._seen[0]:g} to {self._seen[1]:g}, and judged is "
                f"{wanted}. Give timesteps= in the unit of the denoiser's timestep argument (flow models often take 0 to 1)",
                stacklevel=6,
            )
            self._waiting = None
