"""One way in which a pipeline calls its denoisers for a step, and what has been found out about the roles in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memhook.adapting.pairs import Prediction, same_samples
from memhook.capture.prediction import magnitude
from memhook_diffusers.roles import Decision, decide

if TYPE_CHECKING:
    from collections.abc import Sequence

    from memhook.capture.texts import Text
    from memhook.capture.trace import Row
    from memhook_diffusers.evidence import Observation

_FIRST = 4  # evaluations of a run that are looked at; then only the 8th, 16th, ...


@dataclass(eq=False)
class Reading:
    """The predictions of one step, read in one way."""

    predictions: list[Prediction]
    text: Tensor | None = None  # (n, b) fingerprints of the text embedding
    texts: tuple[Text, ...] = ()  # (n,) a few numbers of each

    def numbers(self) -> Numbers:
        """All that a row can need, whichever pair it turns out to be; on the device."""
        count = len(self.predictions)
        pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
        measured = [magnitude(self.predictions[i].values, self.predictions[j].values) for i, j in pairs]
        same = [same_samples(self.predictions[i], self.predictions[j]) for i, j in pairs]
        return Numbers(pairs, measured, same, self.text, self.texts, self.predictions[0].values.shape[0])


@dataclass(frozen=True, eq=False)
class Numbers:
    """``b`` numbers per pair of predictions."""

    pairs: list[tuple[int, int]]
    magnitudes: list[Tensor]
    same_inputs: list[Tensor | None]
    text: Tensor | None
    texts: tuple[Text, ...]
    samples: int

    def fill(self, row: Row, decision: Decision) -> None:
        """Make ``row`` that of the decided pair."""
        row.samples, row.roles, row.scale = self.samples, decision.roles, decision.scale
        if decision.cond is None or decision.uncond is None:
            row.magnitude = None
            return
        index = self.pairs.index((min(decision.cond, decision.uncond), max(decision.cond, decision.uncond)))
        row.magnitude = self.magnitudes[index]
        row.same_inputs = self.same_inputs[index] if decision.roles == "assumed" else None  # else decided with that in view
        row.conditioning = None if self.text is None else self.text[[decision.cond, decision.uncond]]
        row.unconditional = self.texts[decision.uncond] if self.texts else None


@dataclass(eq=False)
class Layout:
    """The roles in steps with the same calls. Decided once, when somebody asks.

    Attributes:
        prior: ``(cond, uncond)`` by diffusers' convention, where there are two predictions.
    """

    prior: tuple[int, int] | None
    seen: int = 0
    observed: list[list[Observation]] = field(default_factory=list)  # per evaluation, one per reading
    doubled: list[Tensor | None] = field(default_factory=list)  # per evaluation that was observed
    _decision: Decision | None = None

    def wants_observation(self) -> bool:
        """Whether the evaluation that is about to be recorded should be looked at; counts it."""
        self.seen += 1
        if self._decision is not None and self._decision.final:
            return False
        return self.seen <= _FIRST or (self.seen & (self.seen - 1)) == 0

    def observe(self, readings: Sequence[Observation], doubled: Tensor | None) -> None:
        """Add what an evaluation shows."""
        self.observed.append(list(readings))
        self.doubled.append(doubled)
        self._decision = None if self._decision is None or not self._decision.final else self._decision

    def decide(self) -> Decision:
        """Wait for the device, and decide."""
        if self._decision is None:
            self._decision = self._decide()
            if self._decision.final:
                self.observed.clear()
        return self._decision

    def _decide(self) -> Decision:
        if not self.observed:
            return Decision(reason="", final=False)
        lone = [flag for flag in self.doubled if flag is not None]
        if lone and not bool(torch.stack(lone).all()):
            return Decision(reason="")
        numbers = [[observation.read() for observation in evaluation] for evaluation in self.observed]
        found = [decide((evaluation[index] for evaluation in numbers), prior=self.prior, reading=index) for index in range(len(numbers[0]))]
        return max(found, key=lambda decision: (decision.cond is not None, decision.roles != "assumed", decision.quality))
