"""What an observer may answer to an evaluation: another prediction, and another embedding for the rest of the run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from memhook.errors import MemhookError

if TYPE_CHECKING:
    from torch import Tensor

    from memhook.capture.prediction import Evaluation


@dataclass(frozen=True, eq=False)
class Intervention:
    """A change to a run in flight. Samples whose rows are those of the evaluation come out bit-identical.

    Attributes:
        pred_cond: ``(b, ...)``: takes the place of this evaluation's conditional prediction; None to leave it.
        embedding: ``(b, l, d)``: takes the place of this evaluation's conditional embedding in all later calls of the run, wherever
            these rows are found again; None to leave it.
        substituted: Filled by the adapter while the run goes on: for each later call ``()`` bool, whether rows were replaced.
    """

    pred_cond: Tensor | None = None
    embedding: Tensor | None = None
    substituted: list[Tensor] = field(default_factory=list, repr=False)

    def check(self, evaluation: Evaluation) -> None:
        """Raise where this cannot be an answer to ``evaluation``."""
        for name in ("pred_cond", "embedding"):
            mine, given = getattr(self, name), getattr(evaluation, name)
            if mine is not None and (given is None or mine.shape != given.shape):
                expected = f"{tuple(given.shape)}, that of the evaluation" if given is not None else "None, since the evaluation has none"
                raise MemhookError(f"the intervention's {name} has shape {tuple(mine.shape)}; expected {expected}")
