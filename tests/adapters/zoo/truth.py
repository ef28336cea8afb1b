"""The truth about a run, recorded independently of the adapter: by wrapping ``forward`` and ``step`` on the instances."""

from __future__ import annotations

import contextlib
import functools
import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tests.adapters.zoo.inputs import Part, map_tensors

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.adapters.zoo.family import Family, Host


@dataclass
class Step:
    cond: Tensor
    uncond: Tensor | None
    cond_part: Part
    uncond_part: Part | None

    @property
    def magnitudes(self) -> Tensor:
        if self.uncond is None:
            return torch.full((len(self.cond),), torch.nan)
        return (self.cond.double() - self.uncond.double()).flatten(1).norm(dim=1)


@dataclass
class Call:
    output: Tensor
    module: int
    arguments: dict[str, Any]


@dataclass
class Truth:
    steps: list[Step] = field(default_factory=list)

    @property
    def magnitudes(self) -> Tensor:
        return torch.stack([step.magnitudes for step in self.steps])


@contextlib.contextmanager
def recording(family: Family, host: Host) -> Iterator[Truth]:
    truth, calls, undo = Truth(), [], []

    def wrap(owner: Any, name: str, around: Any) -> None:
        original = getattr(owner, name)
        # Modular pipelines pass on what they find in the signature of `forward`.
        owner.__dict__[name] = functools.wraps(original)(lambda *args, **kwargs: around(original, args, kwargs))
        undo.append(lambda: owner.__dict__.pop(name))

    def forward(original: Any, args: Any, kwargs: Any) -> Any:
        arguments = map_tensors(inspect.signature(original).bind(*args, **kwargs).arguments, lambda tensor: tensor.detach().clone())
        output = original(*args, **kwargs)
        calls.append(Call((host.read or first_tensor)(output).detach().clone(), id(original.__self__), arguments))
        return output

    def step(original: Any, args: Any, kwargs: Any) -> Any:
        model_output = args[0] if args else kwargs["model_output"]
        if not calls:  # a copy of the scheduler, for sound
            return original(*args, **kwargs)
        truth.steps.append(split(family.layout, calls, model_output, host.samples))
        calls.clear()
        return original(*args, **kwargs)

    for name in host.denoisers:
        wrap(getattr(host.pipeline, name), "forward", forward)
    for name in host.schedulers:
        # Pipelines look at the signature of `step`, and copy their scheduler: a bound method steps the copy.
        scheduler = getattr(host.pipeline, name)
        original = type(scheduler).step
        patched = _signed(original, step)
        scheduler.__dict__["step"] = patched.__get__(scheduler)
        undo.append(lambda scheduler=scheduler: scheduler.__dict__.pop("step"))
    try:
        yield truth
    finally:
        for action in undo:
            action()


def _signed(original: Any, around: Any) -> Any:
    @functools.wraps(original)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(functools.partial(original, self), args, kwargs)

    return step


def first_tensor(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    if hasattr(output, "sample"):
        return output.sample
    return output[0]


def split(layouts: tuple[str, ...], calls: list[Call], model_output: Tensor, given: int | None) -> Step:
    """Cut a step's outputs as the one layout says that fits their number."""
    for layout in layouts:
        doubled, pattern = layout.startswith("("), layout.strip("()").split("|")
        samples = given or (len(model_output) // 2 if doubled else len(model_output))
        if len(pattern) == len(calls) and all(len(call.output) == samples * len(part) for call, part in zip(calls, pattern, strict=True)):
            found: dict[str, tuple[Tensor, Part]] = {}
            for call, letters in zip(calls, pattern, strict=True):
                for index, (letter, chunk) in enumerate(zip(letters, call.output.chunk(len(letters)), strict=True)):
                    part = Part(call.module, call.arguments, index, len(letters), samples)
                    found.setdefault(letter, (crop(chunk, model_output), part))
            return Step(found["c"][0], found["u"][0] if "u" in found else None, found["c"][1], found["u"][1] if "u" in found else None)
    shapes = [tuple(call.output.shape) for call in calls]
    raise AssertionError(f"none of the layouts {layouts} fits calls of {shapes} for {tuple(model_output.shape)}")


def crop(values: Tensor, model_output: Tensor) -> Tensor:
    """Without the channels of a learned variance: images whose output has more channels than latents (4, or 3 for pixels)."""
    if values.ndim in (4, 5) and values.shape[1] in (6, 8):
        return values[:, : values.shape[1] // 2]
    if values.ndim == 3 and model_output.ndim == 3 and values.shape[1] > model_output.shape[1]:
        return values[:, : model_output.shape[1]]
    return values
