"""What a calibration must agree with."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from memhook.adapting.fingerprint import read_later
from memhook.adapting.tensors import tensors_in

DELETED = "the model of this trace was deleted before its fingerprint was taken; keep it loaded until the `with` block ends"


@torch.no_grad()
def describe_model(patcher: Any) -> Callable[[], dict[str, Any]]:
    """The model by its own weights, whatever patches (LoRA) are in them now; and the patches, by name, strength and a sample of values.

    Taken now, without waiting for the device; what it answers reads it.
    """
    model = patcher.model
    denoiser: nn.Module = model.diffusion_model
    own = {key.removeprefix("diffusion_model."): getattr(held, "weight", held) for key, held in getattr(patcher, "backup", {}).items()}
    read, found = read_later(_Named(denoiser, own)), {"parameterization": _parameterization(model)}
    patches = getattr(patcher, "patches", {})
    if patches:
        found["patches"] = _digest(patches)
    return lambda: {"model": read(), **found}


class _Named:
    """The parameters of a module, some of them taken from elsewhere; all that `fingerprint` asks for."""

    def __init__(self, module: nn.Module, instead: dict[str, Any]) -> None:
        self._module, self._instead = module, instead

    def named_parameters(self) -> list[tuple[str, Tensor]]:
        return [(name, self._instead.get(name, parameter)) for name, parameter in self._module.named_parameters()]


def _parameterization(model: Any) -> str:
    """What the network predicts, by ComfyUI's names, such as ``EPS``; the schedule behind it."""
    sampling = getattr(model, "model_sampling", getattr(model, "predictor", None))  # Forge's name
    kinds = [kind.__name__ for kind in type(sampling).__mro__ if kind.__name__ not in ("ModelSampling", "Module", "object")]
    return "+".join([*kinds, *filter(None, [getattr(sampling, "prediction_type", None)])])


def _digest(patches: dict[str, Any]) -> str:
    found = hashlib.sha256()
    for key in sorted(patches, key=str):
        for patch in patches[key]:
            strengths = [f"{value:.4g}" for value in patch if isinstance(value, (int, float))]
            weights = [getattr(value, "weights", value) for value in patch]
            first = next((tensor for tensor in tensors_in(weights) if tensor.numel() and tensor.is_floating_point()), None)
            sample = float(first.reshape(-1)[first.numel() // 3]) if first is not None and first.device.type != "meta" else math.nan
            found.update(f"{key}:{strengths}:{sample:.3g};".encode())
    return found.hexdigest()[:16]
