"""Where the magnitude has its first local minimum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from memhook.capture.prediction import Evaluation


@dataclass(frozen=True)
class TransitionPoint:
    """1 until the first local minimum of the magnitude shows, 0 from there on: the mean over a run is the part of it before that.

    The minimum at evaluation ``t - 1`` (``m_t > m_{t-1}`` and ``m_{t-2} > m_{t-1}``) shows at ``t``, for each sample by itself. Jain et al.
    switch guidance on there; that a memorized prompt gets there later than others has not been measured here, so look at your model first.

    >>> import torch
    >>> falls, dips = [3.0, 2.0, 1.0], [3.0, 1.0, 2.0]
    >>> TransitionPoint()(None, torch.tensor([falls, dips]).T)
    tensor([1., 0.])
    """

    name: ClassVar[str] = "transition_point"
    needs: ClassVar[tuple[str, str]] = ("pair", "history")
    symmetric: ClassVar[bool] = True
    paper: ClassVar[str] = "Jain et al., CVPR 2025"

    def __call__(self, evaluation: Evaluation | None, history: Tensor) -> Tensor:  # noqa: ARG002 -- a score gets its evaluation
        before, here, after = history[:-2], history[1:-1], history[2:]
        passed = ((after > here) & (before > here)).any(dim=0)  # (b,)
        return torch.where(passed, 0.0, 1.0).where(torch.isfinite(history).all(dim=0), torch.nan)
