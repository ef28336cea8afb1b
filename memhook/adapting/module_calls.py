"""How a bare denoiser's guided calls are laid out, and what tells the calls of one evaluation from those of the next."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

from torch import Tensor

from memhook.adapting.tensors import copy_of, version
from memhook.capture.rows import number, own
from memhook.errors import MemhookError

if TYPE_CHECKING:
    from memhook.adapting.pairs import Prediction

Layout = Literal["uncond_first", "cond_first", "two_calls_uncond_first", "two_calls_cond_first"]


@dataclass(frozen=True)
class Plan:
    """A declared layout."""

    name: str  # as declared, for messages
    roles: tuple[str, ...]  # of the predictions, in the order in which they are made
    separate: bool  # a call for each, instead of one batched call

    @property
    def count(self) -> int:
        """How many predictions an evaluation has."""
        return len(self.roles)

    def pair(self, predictions: Sequence[Prediction]) -> tuple[Prediction, Prediction]:
        """The conditional and the unconditional one among an evaluation's predictions."""
        return predictions[self.roles.index("cond")], predictions[self.roles.index("uncond")]


def read_layout(layout: str | Sequence[str]) -> Plan:
    """Read a declared layout: one of `Layout`, or the roles of the equal parts of one batched call.

    Raises:
        MemhookError: It is neither.
    """
    if isinstance(layout, str):
        if layout not in get_args(Layout):
            raise MemhookError(f"layout is {layout!r}; expected {_EXPECTED}")
        named: tuple[str, ...] = ("uncond", "cond") if layout.endswith("uncond_first") else ("cond", "uncond")
        return Plan(repr(layout), named, layout.startswith("two_calls"))
    roles = tuple(layout)
    if not all(isinstance(role, str) for role in roles) or roles.count("cond") != 1 or roles.count("uncond") != 1 or len(set(roles)) < len(roles):
        raise MemhookError(f"layout is {layout!r}; expected {_EXPECTED}")
    return Plan(repr(roles), roles, separate=False)


_EXPECTED = (
    f"one of {', '.join(get_args(Layout))}, or the roles of the parts of one batched call, each once and with 'cond' and 'uncond' among "
    "them, such as ('uncond', 'cond', 'perturbed')"
)


@dataclass(frozen=True, eq=False)
class Moment:
    """When a call was made, read without waiting for the device."""

    timestep: Tensor | float | None
    level: float | None  # the timestep as a number, where that is known
    sample: weakref.ref[Tensor] | None
    version: int | None

    @staticmethod
    def of(sample: Tensor | None, timestep: Tensor | float | None) -> Moment:
        """The moment of a call that was given these."""
        level = None
        if isinstance(timestep, Tensor):
            timestep = timestep.detach().clone()  # hosts may count down in place
            level = number(own(timestep)) if timestep.device.type == "cpu" and timestep.numel() else None
        elif timestep is not None:
            level = float(timestep)
        if sample is None:
            return Moment(timestep, level, None, None)
        return Moment(timestep, level, weakref.ref(sample), version(sample))

    def same_sample(self, other: Moment) -> bool:
        """Whether both calls were given one tensor, unchanged in between."""
        if self.sample is None or other.sample is None:
            return False
        return self.sample() is not None and self.sample() is other.sample() and self.version == other.version


def held(prediction: Prediction) -> Prediction:
    """The first of two calls until the second comes; a copy, since the host may change its tensors in place in between."""
    sample, embedding = (None if tensor is None else copy_of(tensor) for tensor in (prediction.sample, prediction.embedding))
    return replace(prediction, values=copy_of(prediction.values), sample=sample, embedding=embedding)
