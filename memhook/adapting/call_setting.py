"""What a denoiser's call shows of the setting: the scale that it gives adapters, what it is conditioned on beside the text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from memhook.adapting.alterations import take
from memhook.adapting.moments import Kept
from memhook.adapting.pairs import EMBEDDING_NAMES, SAMPLE_NAMES

_TIMES = ("timestep", "timesteps", "t", "sigma", "timestep_ratio", "r")
_READ = ("guidance", "time_ids", "fps", "aspect_ratio", "resolution")  # a few numbers a row, which the user chooses
_NOT_CONDITIONING = ("ids", "rotary", "mask", "shapes", "coords", "freqs", "lens", "lengths")  # places and lengths


def at_call(modules: Mapping[str, nn.Module], calls: Mapping[str, Mapping[str, Any]]) -> Callable[[], dict[str, Any]]:
    """What was done to modules, and what they are given, as of now; without waiting for the device; what it answers reads it.

    Args:
        modules: The model and its text encoders, by name.
        calls: The keyword arguments of the denoisers' calls, by the denoiser's name.
    """
    altered = take(modules)
    scale = next((scale for kwargs in calls.values() if (scale := adapter_scale(kwargs)) != 1.0), 1.0)
    inputs = {name: inputs_of(kwargs) for name, kwargs in calls.items()}

    def read() -> dict[str, Any]:
        found = altered()
        given = {name: values for name, read_inputs in inputs.items() if (values := read_inputs())}
        return {**found, "adapters": scaled(found["adapters"], scale), "inputs": given}

    return read


def adapter_scale(kwargs: Mapping[str, Any]) -> float:
    """The scale that a call gives all adapters (``cross_attention_kwargs={"scale": ...}``), 1 where it says none."""
    scales = [value.get("scale") for key, value in kwargs.items() if key.endswith("attention_kwargs") and isinstance(value, Mapping)]
    return next((float(scale) for scale in scales if isinstance(scale, (int, float))), 1.0)


def scaled(adapters: list[dict[str, Any]], scale: float) -> list[dict[str, Any]]:
    """What acts of the adapters in a call with this scale."""
    found = [{**adapter, "scale": adapter["scale"] * scale, "pattern": adapter["pattern"] * scale} for adapter in adapters]
    return [adapter for adapter in found if adapter["fused"] or adapter["pattern"] != 0]


@torch.no_grad()
def inputs_of(kwargs: Mapping[str, Any]) -> Callable[[], dict[str, Any]]:
    """The keyword inputs beside sample, time and text: numbers by value, tensors as ``"given"``; read later."""
    found: dict[str, Any] = {}
    small: dict[str, Tensor] = {}
    for name, value in _named(kwargs):
        key = name.split(".")[-1]
        if isinstance(value, float):
            found[name] = value
        elif isinstance(value, Tensor) and key in _READ and value.numel() <= 64 * max(1, len(value) if value.ndim else 1):
            small[name] = value.detach().reshape(len(value) if value.ndim else 1, -1).to(torch.float32).clone()
        elif not any(word in key for word in _NOT_CONDITIONING):
            found[name] = "given"
    rows = {name: Kept(list(value)) for name, value in small.items()}

    def read() -> dict[str, Any]:
        values = {name: sorted({tuple(float(f"{number:.4g}") for number in row) for row in kept.read()}) for name, kept in rows.items()}
        return dict(sorted({**found, **{name: [list(row) for row in value] for name, value in values.items()}}.items()))

    return read


def _named(kwargs: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in kwargs.items():
        name = f"{prefix}{key}"
        if not prefix and key in (*_TIMES, *SAMPLE_NAMES, *EMBEDDING_NAMES):
            continue
        if isinstance(value, Mapping):
            yield from _named(
                {str(inner): item for inner, item in value.items() if inner != "scale" or not key.endswith("attention_kwargs")}, f"{name}."
            )
        elif isinstance(value, (Tensor, float)) or (isinstance(value, (list, tuple)) and any(isinstance(item, Tensor) for item in value)):
            yield name, value
