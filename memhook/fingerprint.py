"""Telling models apart: a hash of the parameters' names and shapes, and a sample of their values."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from memhook.errors import MemhookError

_VALUES = 128


@torch.no_grad()
def fingerprint(module: nn.Module) -> dict[str, Any]:
    """What identifies a model: ``structure`` (SHA-256 of sorted parameter names and shapes) and ``values`` (a sample).

    The dtype is left out of the hash on purpose, so that one calibration serves a model in float32 and float16; the
    sampled values are compared with the tolerance of bfloat16. Parameters without storage (offloaded to disk) are
    not sampled.
    """
    parameters = sorted(module.named_parameters(), key=lambda item: item[0])
    digest = hashlib.sha256()
    for name, parameter in parameters:
        digest.update(f"{name}:{tuple(parameter.shape)};".encode())
    usable = [p for _, p in parameters if p.is_floating_point() and p.numel() > 0 and p.device.type != "meta"]
    stride = max(1, len(usable) // _VALUES)
    sampled = [p.reshape(-1)[p.numel() // 3].float().cpu() for p in usable[::stride]][:_VALUES]
    values = torch.stack(sampled).tolist() if sampled else []
    return {"structure": digest.hexdigest()[:16], "values": [float(f"{value:.6g}") for value in values]}


def same_fingerprint(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two fingerprints are of the same model, up to the rounding of half precision."""
    if first["structure"] != second["structure"]:
        return False
    a, b = torch.tensor(first["values"]), torch.tensor(second["values"])
    return a.shape == b.shape and bool(torch.isclose(a, b, rtol=8e-3, atol=1e-6).all())


class Fingerprinted:
    """Fingerprints of modules, taken when asked for, without keeping the modules alive."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = {name: weakref.ref(module) for name, module in modules.items()}

    def describe(self) -> dict[str, Any]:
        found = {}
        for name, reference in self._modules.items():
            module = reference()
            if module is None:
                raise MemhookError(f"the {name} of this trace was deleted, so its fingerprint cannot be taken; calibrate and detect while it is alive")
            found[name] = fingerprint(module)
        return found
