"""The parts of a pipeline that a guided run goes through: denoisers, schedulers, a guider."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from memhook.capture.prediction import Space

_USUAL = ("unet", "transformer", "prior", "decoder")
_SPACES: dict[str, Space] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0", "flow_prediction": "flow"}


@dataclass(frozen=True)
class Parts:
    """What there is to watch, by component name."""

    denoisers: dict[str, nn.Module]
    schedulers: dict[str, Any]
    guiders: dict[str, Any]


def find_parts(pipeline: Any) -> Parts:
    """Every module that could predict for a scheduler, every scheduler, every guider, those of inner pipelines included.

    Which module does predict shows in its output: it has the form of what the scheduler is given. So a module more does no harm.
    """
    components = dict(_components(pipeline))
    return Parts(
        {name: part for name, part in components.items() if isinstance(part, nn.Module) and _may_denoise(name, part)},
        {name: part for name, part in components.items() if not isinstance(part, nn.Module) and _is(part, "SchedulerMixin", "step")},
        {name: part for name, part in components.items() if _is(part, "BaseGuidance", None)},
    )


def _components(pipeline: Any) -> Iterator[tuple[str, Any]]:
    seen: set[int] = set()
    inner: list[tuple[str, Any]] = []
    for name, part in list(vars(pipeline).items()):
        if id(part) in seen:
            continue
        seen.add(id(part))
        if _is(part, "DiffusionPipeline", None):  # combined pipelines keep the pipelines that they are made of
            inner.append((name, part))
        else:
            yield name, part
    for name, part in inner:
        for inner_name, component in _components(part):
            if id(component) not in seen:
                seen.add(id(component))
                yield f"{name}.{inner_name}", component


def _may_denoise(name: str, module: nn.Module) -> bool:
    module = getattr(module, "_orig_mod", module)  # torch.compile
    known = any(name.endswith((usual, f"{usual}_2")) for usual in _USUAL)
    return (known or _is(module, "ModelMixin", None)) and not hasattr(module, "encode")


def _is(part: Any, kind: str, method: str | None) -> bool:
    """Whether ``part`` is of a class of diffusers, or has the method that counts."""
    known = getattr(sys.modules.get("diffusers"), kind, None)
    if kind == "BaseGuidance":
        known = getattr(sys.modules.get("diffusers.guiders.guider_utils"), kind, None)
    if known is not None and isinstance(part, known):
        return True
    return method is not None and callable(getattr(part, method, None)) and hasattr(part, "config")


def space_of(scheduler: Any) -> Space:
    """What the model predicts for this scheduler."""
    kind = getattr(getattr(scheduler, "config", None), "prediction_type", None)
    if kind in _SPACES:
        return _SPACES[kind]
    return "flow" if "FlowMatch" in type(scheduler).__name__ else "eps"
