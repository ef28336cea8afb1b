"""What the tests know about a family of pipelines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

STEPS = 3
PROMPTS = 2


@dataclass
class Host:
    """One tiny pipeline, ready to run.

    ``run`` makes the same run every time. ``denoisers`` and ``schedulers`` are attribute names on ``owner`` (the pipeline itself).
    """

    pipeline: Any
    run: Callable[..., Any]
    denoisers: tuple[str, ...] = ("unet",)
    schedulers: tuple[str, ...] = ("scheduler",)
    samples: int | None = None  # where the scheduler is given more rows than there are samples (frames)
    read: Callable[[Any], torch.Tensor] | None = None  # from a denoiser's output to all its predictions, where it is not the first tensor


@dataclass(frozen=True)
class Family:
    """A pipeline family, and the truth about it.

    Attributes:
        name: Of the pipeline class, with what is special about this run.
        build: Makes the `Host`.
        layout: The possible steps. Calls are separated by ``|``, and a call's equal parts are letters: ``c`` conditional,
            ``u`` unconditional, anything else (``p`` perturbed, ``n`` neither text nor image) is no part of the pair.
            Parentheses: the scheduler steps a doubled batch. A step without ``u`` has no magnitude.
        roles: What `Trace.roles` may say.
        replay: Whether evaluations can be replayed; else what `ReplayError` says.
        missing: What `NoGuidanceError` says, where no step has an unconditional prediction.
    """

    name: str
    build: Callable[[], Host]
    layout: tuple[str, ...]
    roles: tuple[str, ...] = ("fitted",)
    replay: bool | str = True
    missing: str | None = None


FAMILIES: dict[str, Family] = {}


def family(name: str, *layout: str, **facts: Any) -> Callable[[Callable[[], Host]], Callable[[], Host]]:
    """Register the function that builds a family."""

    def register(build: Callable[[], Host]) -> Callable[[], Host]:
        assert name not in FAMILIES, name
        FAMILIES[name] = Family(name, build, layout, **facts)
        return build

    return register


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def randomize(module: torch.nn.Module) -> torch.nn.Module:
    """Fresh weights everywhere: some models start with zeros where the text enters, and would ignore it."""
    maker = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            fan = parameter[0].numel() if parameter.ndim > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=maker) / max(fan, 1) ** 0.5)
    return module.eval()
