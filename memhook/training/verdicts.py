"""What the filter finds about the samples of one batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from memhook.capture.prediction import magnitude
from memhook.errors import MemhookError
from memhook.training.calibration import BinnedThreshold
from memhook.training.cutting import RowsPass
from memhook.training.masking import check_finite
from memhook.training.thresholds import Threshold, as_schedule, thresholds_at
from memhook.training.timesteps import JudgedTimesteps, Timesteps
from memhook.training.unconditional import NullTensor, UnconditionalPass, prediction_part, timesteps_of

if TYPE_CHECKING:
    from memhook.adapting.replay import Path
    from memhook.training.calls import LoopCall


@dataclass(frozen=True, eq=False)
class Verdict:
    """About the samples of one batch, on the CPU: ``(b,)`` each.

    Attributes:
        judged: Whether the sample has a finite magnitude that was compared.
        flagged: Whether it surpassed the threshold.
        norms: The magnitudes; 0 where no pass was made.
        limits: The thresholds.
        timesteps: Of the samples.
        passed: How many samples went through the extra pass, 0 where there was none.
        shape: Of a sample's prediction.
    """

    judged: Tensor
    flagged: Tensor
    norms: Tensor
    limits: Tensor
    timesteps: Tensor
    passed: int
    shape: tuple[int, ...]


class Judge:
    """Judges the samples of a call, at the timesteps that are to be judged."""

    def __init__(
        self, null_embedding: NullTensor, *, threshold: Threshold | None, timesteps: Timesteps | None, path: Path | None,
        null_arguments: Mapping[Path, NullTensor | None],
    ) -> None:  # fmt: skip
        self._schedule = as_schedule(threshold)
        self._binned = threshold if isinstance(threshold, BinnedThreshold) else None
        if timesteps is None and self._binned is not None:
            timesteps = self._binned.span
        self.timesteps = JudgedTimesteps(timesteps)
        if self._binned is not None and self._binned.span is not None:
            _check_covered(self.timesteps, self._binned.span)
        self._full = UnconditionalPass(null_embedding, path=path, null_arguments=null_arguments)
        self._rows = RowsPass(self._full)
        self._checked = False

    def conditional(self, call: LoopCall) -> Tensor:
        """``(b,)`` bool on the CPU: the samples that have a prompt."""
        return self._full.conditional_rows(call).cpu()

    def __call__(self, module: nn.Module, call: LoopCall, *, allow_nonfinite: bool) -> Verdict:
        """Make the pass where a sample is to be judged, and compare."""
        pred_cond = prediction_part(call.values.detach(), call)
        if self._binned is not None:
            self._binned.check(pred_cond.shape[1:])
        if not self._checked:  # what does not fit is told in the first step, and not when the first sample is judged
            self._full.check(call)
            self._checked = True
        timesteps = timesteps_of(call)
        limits = thresholds_at(self._schedule, timesteps)
        chosen = self.timesteps(timesteps)
        together = not self.timesteps.everywhere and self._rows.together(module)
        if not bool(chosen.any()) and not together:
            nothing = torch.zeros(len(chosen))
            return Verdict(chosen, chosen, nothing, limits, timesteps, 0, tuple(pred_cond.shape[1:]))
        # On the device until everything is on its way: that leaves one wait for it.
        conditional, passed = self._full.conditional_rows(call), len(chosen)
        if self.timesteps.everywhere:
            norms = magnitude(pred_cond, prediction_part(self._full(module, call), call)).cpu()
            conditional = conditional.cpu()
        else:
            conditional = conditional.cpu()
            rows = torch.arange(len(chosen)) if together else torch.nonzero(chosen & conditional).flatten()
            norms = torch.zeros(len(chosen))
            passed = 0
            if len(rows):
                pred_uncond, passed = self._rows(module, call, rows)
                norms = norms.index_copy(0, rows, magnitude(pred_cond[rows], prediction_part(pred_uncond, call)).cpu().to(norms.dtype))
        if not allow_nonfinite:
            check_finite(norms)
        judged = chosen & conditional & torch.isfinite(norms)
        # "surpasses" and not "is not at most": what is not finite is kept, and so is what is unconditional already.
        flagged = judged & (norms > limits.to(norms.dtype))
        return Verdict(judged, flagged, norms, limits, timesteps, passed, tuple(pred_cond.shape[1:]))


def _check_covered(timesteps: JudgedTimesteps, span: tuple[float, float]) -> None:
    own = timesteps.span
    if own is not None and (own[0] < span[0] or own[1] > span[1]):
        raise MemhookError(
            f"timesteps is ({own[0]:g}, {own[1]:g}), and the threshold was calibrated from {span[0]:g} to {span[1]:g}; expected a range inside "
            "of that. Leave timesteps= out to judge where it was calibrated, or calibrate on a wider range"
        )
