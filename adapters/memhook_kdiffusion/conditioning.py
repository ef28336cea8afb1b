"""What a CFG wrapper is given: the noisy sample, the noise level, and the conditioning of each sample, in the forms that hosts use."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

COND_NAMES = ("cond", "conditioning", "c", "positive")
UNCOND_NAMES = ("uncond", "unconditional_conditioning", "unconditional", "uncond_conditioning", "uc", "negative")
_SCALE_NAMES = ("cond_scale", "guidance_scale", "cfg_scale", "text_cfg_scale", "scale")
_TEXT_KEYS = ("c_crossattn", "crossattn", "encoder_hidden_states", "context", "prompt_embeds", "cond", "text")


@dataclass(frozen=True, eq=False)
class Part:
    """One prompt of a sample: what its conditioning may be, and its weight beside the sample's other prompts."""

    candidates: tuple[Tensor, ...]  # each (l, d), or another shape of one row; more than one where a prompt changes on the way
    weight: float = 1.0


@dataclass(frozen=True)
class Names:
    """Which parameters of a wrapper hold what; None where there is no such parameter."""

    parameters: tuple[str, ...]  # by position
    cond: str | None
    uncond: str | None

    @staticmethod
    def of(function: Callable[..., Any], *, cond: str | None = None, uncond: str | None = None) -> Names:
        """Read them off a signature; ``cond`` and ``uncond`` are names that the user has said."""
        parameters = inspect.signature(function).parameters.values()
        keyed = tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY, p.POSITIONAL_ONLY))
        first = {name: next((known for known in usual if known in keyed), None) for name, usual in (("c", COND_NAMES), ("u", UNCOND_NAMES))}
        return Names(keyed, cond or first["c"], uncond or first["u"])

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name; the first two positions are the noisy sample and the noise level whatever they are called."""
        return {**dict(zip(self.parameters, args, strict=False)), **kwargs}


def guidance_scale(named: Mapping[str, Any]) -> float | None:
    """The guidance scale among a wrapper's arguments, where it is a number under a usual name."""
    for name in _SCALE_NAMES:
        value = named.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    return None


def read_conditioning(value: Any, samples: int) -> list[list[Part]] | None:
    """The prompts of each of ``samples`` samples; None where the form is not known.

    Known are a tensor with a row for each sample, or one for all; a mapping or a list of one that holds such a tensor; and the lists of A1111, where
    a prompt is a schedule of embeddings and a sample may have several weighted prompts.
    """
    if isinstance(value, Tensor):
        return _rows(value, samples)
    if isinstance(value, Mapping):
        found = find_text(value, samples)
        return None if found is None else _rows(found, samples)
    batch = getattr(value, "batch", None)
    if isinstance(batch, Sequence):  # A1111: one list of weighted prompts a sample
        prompts = [[_scheduled(getattr(part, "schedules", None), float(getattr(part, "weight", 1.0))) for part in parts] for parts in batch]
        return _complete(prompts, samples)
    if isinstance(value, Sequence) and len(value) == 1 and isinstance(value[0], (Tensor, Mapping)):
        return read_conditioning(value[0], samples)
    if isinstance(value, Sequence) and value and all(isinstance(schedule, Sequence) for schedule in value):  # A1111: one schedule a sample
        return _complete([[_scheduled(schedule, 1.0)] for schedule in value], samples)
    return None


def find_text(tree: Mapping[Any, Any], samples: int) -> Tensor | None:
    """The text embedding in a mapping: under a usual name, or else the first ``(samples or 1, l, d)``, or else any tensor with such rows."""
    tensors = [(str(key), tensor) for key, value in tree.items() for tensor in _unlisted(value) if tensor.ndim and tensor.shape[0] in (samples, 1)]
    text = [(key, tensor) for key, tensor in tensors if tensor.ndim == 3 and tensor.is_floating_point()]
    named = [tensor for name in _TEXT_KEYS for key, tensor in text if key == name]
    return next(iter([*named, *(tensor for _, tensor in text), *(tensor for _, tensor in tensors)]), None)


def _unlisted(value: Any) -> list[Tensor]:
    items = value if isinstance(value, (list, tuple)) else [value]
    return [item for item in items if isinstance(item, Tensor)]


def _rows(tensor: Tensor, samples: int) -> list[list[Part]] | None:
    if tensor.ndim == 0 or tensor.shape[0] not in (samples, 1):
        return None
    rows = tensor.detach().unbind(0)
    return [[Part((rows[sample % len(rows)],))] for sample in range(samples)]


def _scheduled(schedules: Any, weight: float) -> Part | None:
    """A prompt of A1111: at some step the host passes from one embedding to the next, which is not for us to follow."""
    if not isinstance(schedules, Sequence):
        return None
    found = []
    for schedule in schedules:
        cond = getattr(schedule, "cond", None)
        if isinstance(cond, Mapping):  # SDXL: the text and a pooled vector
            two = [value for value in cond.values() if isinstance(value, Tensor) and value.ndim == 2]
            cond = cond.get("crossattn", two[0] if two else None)
        if not isinstance(cond, Tensor):
            return None
        found.append(cond.detach())
    return Part(tuple(found), weight) if found else None


def _complete(prompts: Sequence[Sequence[Part | None]], samples: int) -> list[list[Part]] | None:
    whole = [[part for part in parts if part is not None] for parts in prompts]
    if not whole or any(len(parts) != len(given) or not parts for parts, given in zip(whole, prompts, strict=True)) or len(whole) not in (samples, 1):
        return None
    return [whole[sample % len(whole)] for sample in range(samples)]
