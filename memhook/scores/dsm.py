"""How far the conditional prediction moves from one evaluation to the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from memhook.capture.prediction import magnitude

if TYPE_CHECKING:
    from memhook.capture.prediction import Evaluation


@dataclass(frozen=True)
class Dsm:
    """``‖c(x_k) - c(x_{k-1})‖²`` along the guided path; conditional predictions only, so it needs no unconditional one.

    Attributes:
        at: The number ``k`` of the later evaluation, from 0; 2 is the published setting. None: every evaluation but the first.

    >>> import torch
    >>> from memhook import Evaluation
    >>> before, now = (Evaluation(torch.full((2, 4, 8, 8), value), None) for value in (1.0, 1.5))
    >>> Dsm()(now, before)
    tensor([64., 64.])
    """

    name: ClassVar[str] = "dsm"
    needs: ClassVar[str] = "previous"
    paper: ClassVar[str] = "DSM, 2026 (early detection)"

    at: int | None = 2

    def __call__(self, evaluation: Evaluation, previous: Evaluation) -> Tensor:
        return torch.square(magnitude(evaluation.pred_cond, previous.pred_cond))
