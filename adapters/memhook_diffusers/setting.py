"""What a calibration of a pipeline's runs must agree with, beside the weights: scheduler, arguments, tokenizers, what was patched in."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from memhook.adapting.call_setting import at_call

if TYPE_CHECKING:
    from torch import nn

    from memhook_diffusers.calls import Call

_TOKENIZER = ("padding_side", "truncation_side", "pad_token", "model_max_length")
_ARGUMENTS = ("scale", "rescale")  # how the names of what a pipeline was asked for end


def run_setting(pipeline: Any, modules: Mapping[str, nn.Module], calls: Sequence[Call], step: Mapping[str, Any]) -> Callable[[], dict[str, Any]]:
    """The setting of a run that is at its first step, without waiting for the device; what it answers reads it.

    Args:
        pipeline: The pipeline; None where it is gone.
        modules: Its denoisers and text encoders.
        calls: The denoisers' calls of this step.
        step: What the scheduler's step is given, by name.
    """
    altered = at_call(modules, {type(call.module).__name__: call.kwargs for call in calls})
    plain = {
        "scheduler_arguments": {name: value for name, value in step.items() if type(value) in (float, bool) and name != "return_dict"},
        **({} if pipeline is None else {"pipeline_arguments": _arguments(pipeline), "tokenizers": _tokenizers(pipeline)}),
    }
    return lambda: {**altered(), **plain}


def scheduler_setting(schedulers: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of the schedulers, by name; of several, with their own name before it."""
    found = {}
    for name, scheduler in schedulers.items():
        prefix = f"{name}." if len(schedulers) > 1 else ""
        config = getattr(scheduler, "config", None) or {}
        found.update(
            {f"{prefix}{key}": plain for key, value in dict(config).items() if not key.startswith("_") and (plain := _plain(value)) is not None}
        )
    return found


def _arguments(pipeline: Any) -> dict[str, float]:
    """What the latest call of a pipeline asked for, as it keeps it: ``_guidance_scale``, ``_guidance_rescale``, ``_pag_scale``."""
    return {
        name[1:]: float(value)
        for name, value in sorted(vars(pipeline).items())
        if name.startswith("_") and name.endswith(_ARGUMENTS) and type(value) in (int, float)
    }


def _tokenizers(pipeline: Any) -> dict[str, dict[str, Any]]:
    parts = {name: part for name, part in vars(pipeline).items() if name.startswith("tokenizer") and hasattr(part, "padding_side")}
    return {
        name: {key: plain for key in _TOKENIZER if (plain := _plain(getattr(part, key, None))) is not None} for name, part in sorted(parts.items())
    }


def _plain(value: Any) -> Any:
    """A value of a configuration as JSON; None for what is no plain value."""
    if isinstance(value, (str, bool, int)):
        return value if not isinstance(value, int) or abs(value) < 1e15 else float(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, (list, tuple)):
        items = [_plain(item) for item in value]
        return None if None in items else items
    return None
