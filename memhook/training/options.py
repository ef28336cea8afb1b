"""The options of the training filter, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from memhook.errors import MemhookError

if TYPE_CHECKING:
    from memhook.training.masking import Normalize


@dataclass(frozen=True)
class Options:
    """What `training_filter` was given, apart from what it judges with."""

    normalize: Normalize
    flagged_weight: float
    fraction: float
    remember: int
    on_nonfinite: Literal["raise", "keep"]
    log_every: int

    def __post_init__(self) -> None:
        if self.normalize not in ("kept", "batch"):
            raise MemhookError(f"normalize is {self.normalize!r}; expected 'kept' or 'batch'")
        if not 0 <= self.flagged_weight <= 1:
            raise MemhookError(f"flagged_weight is {self.flagged_weight}; expected a weight from 0 (drop) to 1 (no effect)")
        if self.flagged_weight > 0 and self.normalize == "kept":
            raise MemhookError(
                f'flagged_weight is {self.flagged_weight} with normalize="kept", which divides by the kept samples alone; down-weighted samples '
                'stand in the sum but not in the count. Use normalize="batch"'
            )
        if not 0 < self.fraction <= 1:
            raise MemhookError(f"fraction is {self.fraction}; expected a share of the losses above 0, up to 1 (every loss)")
        if not isinstance(self.remember, int) or self.remember < 0:
            raise MemhookError(
                f"remember is {self.remember!r}; expected a number of verdicts: 0 (nothing is remembered), 1 (the latest one counts), "
                "or more (so many of the latest)"
            )
        if self.on_nonfinite not in ("raise", "keep"):
            raise MemhookError(f"on_nonfinite is {self.on_nonfinite!r}; expected 'raise' or 'keep'")
        if self.log_every < 1:
            raise MemhookError(f"log_every is {self.log_every}; expected at least 1")
