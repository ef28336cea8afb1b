"""The rows of a trace: what is kept of an evaluation, on the device until somebody asks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memhook.errors import GuidanceLayoutError, MemhookError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np

    from memhook.capture.prediction import Roles, Space
    from memhook.capture.texts import Text


@dataclass
class Row:
    """One evaluation as the trace keeps it: ``b`` numbers, still on the device until somebody asks."""

    magnitude: Tensor | None  # (b,); None: no unconditional prediction
    timestep: Tensor | float | None = None
    sigma: Tensor | float | None = None
    same_inputs: Tensor | None = None  # (b,) bool: both predictions were made from the same noisy sample
    conditioning: Tensor | None = None  # (2, b) int64 fingerprints of the conditional and the unconditional conditioning
    unconditional: Text | None = field(default=None, repr=False)  # the (b,) unconditional texts
    shape: tuple[int, ...] | None = None  # of one prediction
    space: Space | None = None  # where the host's stages predict in different ones
    roles: Roles | None = None  # how it is known which prediction is conditional; None: as declared
    scale: np.ndarray | None = None  # (b,) guidance scale as it acted
    # Fills in what only reading the device can tell, once somebody asks; answers whether that was the last word.
    settle: Callable[[Row], bool] | None = field(default=None, repr=False)
    refuted: tuple[Tensor, str] | None = None  # () bool: the call was not what it was taken for; and the error to raise then
    continues: bool = False  # known to belong to the run of the row before it, whatever its noise level
    about: Callable[[], Mapping[str, Any]] | None = field(default=None, repr=False)  # what the call itself adds to the setting
    step: tuple[int, int] | None = None  # the sampler's step, and the evaluation's place in it
    samples: int = 0
    values: np.ndarray | None = field(default=None, repr=False)  # (b,) float32, once read
    scores: dict[str, Tensor] = field(default_factory=dict, repr=False)  # (b,) of each other score that the evaluation has
    place: int = 0  # in its run, as far as the scores knew


def settle(rows: Sequence[Row]) -> None:
    """Fill in what adapters left open so as not to wait for the device."""
    for row in rows:
        if row.settle is not None and row.settle(row):
            row.settle = None


def read(rows: Sequence[Row]) -> None:
    """Fetch what is still on the device, in one transfer, and check it.

    Raises:
        GuidanceLayoutError: A pair was made from different noisy samples, or a call was not what it was taken for.
    """
    refuted = [row.refuted for row in rows if row.refuted is not None]
    for (_, message), wrong in zip(refuted, torch.stack([flag for flag, _ in refuted]).tolist() if refuted else (), strict=True):
        if wrong:
            raise GuidanceLayoutError(message)
    fresh = [row for row in rows if row.magnitude is not None and row.values is None]
    if not fresh:
        return
    stacked = torch.cat([row.magnitude for row in fresh if row.magnitude is not None]).to("cpu", torch.float32).numpy()
    checks = [row.same_inputs for row in fresh if row.same_inputs is not None]
    if checks and not bool(torch.cat(checks).all()):
        raise GuidanceLayoutError(
            "the two predictions of an evaluation were made from different noisy samples, so they are not a "
            "conditional and an unconditional prediction of the same sample. Guidance may be off (scale 1), or the declared layout may be wrong"
        )
    position = 0
    for row in fresh:
        row.values = stacked[position : position + row.samples]
        position += row.samples


def own(level: Tensor | float | None) -> Tensor | float | None:
    """A noise level that the host's changes in place do not reach, of the first sample; without waiting for the device.

    Where a sample's tokens or frames have levels of their own, those that are given (the picture that a video starts from) stand
    still at a low one: the highest is the level of what is being denoised.
    """
    if not isinstance(level, Tensor):
        return level
    first = level.detach().reshape(-1)[:1] if level.ndim < 2 else level.detach()[:1].flatten(1)
    return first.clone() if level.ndim < 2 or not first.numel() else first.amax(1)


def number(value: Tensor | float | None) -> float:
    """A noise level as a number, NaN for None; waits for the device."""
    if value is None:
        return math.nan
    if isinstance(value, Tensor):
        return float(value.detach().reshape(-1)[0])
    return float(value)


def stored(row: Row) -> Row:
    """The row, settled and read, with all that it holds on the CPU and nothing of the host; for pickling."""
    about = None if row.about is None else Said(dict(row.about()))
    text = None if row.unconditional is None else row.unconditional.stored()
    kept = replace(row, settle=None, refuted=None, about=about, unconditional=text)
    for field_ in fields(kept):
        value = getattr(kept, field_.name)
        if isinstance(value, Tensor):
            setattr(kept, field_.name, value.detach().cpu())
    kept.scores = {name: values.detach().cpu() for name, values in row.scores.items()}
    return kept


@dataclass(frozen=True)
class Said:
    """What a call added to the setting, once read."""

    values: dict[str, Any]

    def __call__(self) -> dict[str, Any]:
        return self.values


def grouped(groups: Sequence[int] | np.ndarray | Tensor, *, samples: int) -> Tensor:
    """``(2, b)`` int64, as `Row.conditioning`, of the numbers of the samples' prompts."""
    numbers = groups.detach().cpu() if isinstance(groups, Tensor) else torch.as_tensor(groups)
    if numbers.shape != (samples,) or numbers.is_floating_point() or numbers.is_complex() or numbers.dtype is torch.bool:
        raise MemhookError(f"groups is {groups!r}; expected a whole number for each of the {samples} samples, such as {[0] * samples}")
    return torch.stack([numbers, torch.zeros_like(numbers)]).to(torch.int64)
