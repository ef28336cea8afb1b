"""What a guard found and did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import numpy as np

    from memhook.capture.intervention import Intervention
    from memhook.capture.trace import Trace
    from memhook.detection.verdict import Detection
    from memhook.mitigation.embedding import OptimizedEmbedding


@dataclass(frozen=True, eq=False)
class Repair:
    """New embeddings, put in while a run was going on.

    Attributes:
        evaluation: After how many evaluations.
        samples: ``(k,)`` int: of which samples.
        optimized: Their new embeddings, in this order.
        intervention: What was answered to the sampler.
    """

    evaluation: int
    samples: np.ndarray
    optimized: OptimizedEmbedding
    intervention: Intervention

    @property
    def substituted(self) -> int:
        """In how many of the later calls the new embeddings were put in; waits for the device."""
        flags = self.intervention.substituted
        return int(torch.stack(flags).sum()) if flags else 0


class Guard:
    """What a guard found and did; complete once the run is over.

    Attributes:
        trace: The magnitudes of the run. The row at which the guard decided holds what was found, later ones what came of it.
        detection: The latest verdict on each prompt; None before it was made, and for `mitigate`, which makes none.
        flagged: ``(b,)`` bool: the samples that the guard acted on; None before it decided.
        repairs: Each mitigation; more than one only where a `StopRule` flagged prompts at different looks.
        before: ``(b,)``: every sample's magnitude at the latest decision, and for mitigated samples at theirs.
        after: ``(b,)``: the same with the new embeddings.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.detection: Detection | None = None
        self.flagged: np.ndarray | None = None
        self.repairs: list[Repair] = []
        self.before: np.ndarray | None = None
        self.after: np.ndarray | None = None

    @property
    def optimized(self) -> OptimizedEmbedding | None:
        """The new embeddings of the latest repair, of its samples in their order; None where none was mitigated."""
        return self.repairs[-1].optimized if self.repairs else None

    @property
    def substituted(self) -> int:
        """In how many calls the new embeddings of the latest repair were put in; waits for the device."""
        return self.repairs[-1].substituted if self.repairs else 0

    def __str__(self) -> str:
        if self.flagged is None:
            return "nothing was judged yet"
        found = (
            str(self.detection)
            if self.detection is not None
            else f"no calibration; {int(self.flagged.sum())} of {len(self.flagged)} samples above the target"
        )
        for repair in self.repairs:
            later = len(self.trace) - repair.evaluation
            found += f". Mitigated: {repair.optimized}; new embeddings in {repair.substituted} calls of {later} later evaluations"
        return found
