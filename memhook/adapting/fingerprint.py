"""Telling models apart: a hash of the parameters' names and shapes, and a sample of their values."""

from __future__ import annotations

import hashlib
import math
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from memhook.errors import MemhookError

if TYPE_CHECKING:
    from collections.abc import Mapping

_VALUES = 128


@torch.no_grad()
def fingerprint(module: nn.Module) -> dict[str, Any]:
    """What identifies a model: ``structure`` (SHA-256 of sorted parameter names and shapes), ``values`` (a sample), ``dtype``.

    The dtype is no part of the structure, so that one calibration serves a model in float32 and float16. Values of parameters
    without storage (offloaded to disk) are None.
    """
    parameters = sorted(module.named_parameters(), key=lambda item: item[0])
    digest = hashlib.sha256()
    for name, parameter in parameters:
        digest.update(f"{name}:{tuple(parameter.shape)};".encode())
    usable = [p for _, p in parameters if p.is_floating_point() and p.numel() > 0]
    chosen = usable[:: max(1, len(usable) // _VALUES)][:_VALUES]
    dtypes = {str(p.dtype).removeprefix("torch.") for p in usable}
    return {"structure": digest.hexdigest()[:16], "values": [_sample(p) for p in chosen], "dtype": ", ".join(sorted(dtypes))}


def _sample(parameter: Tensor) -> float | None:
    if parameter.device.type == "meta":
        return None
    return float(f"{float(parameter.reshape(-1)[parameter.numel() // 3]):.6g}")


def same_fingerprint(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two fingerprints are of the same model; in two dtypes, up to the rounding of half precision."""
    if first["structure"] != second["structure"] or len(first["values"]) != len(second["values"]):
        return False
    rtol, atol = (1e-5, 1e-12) if first.get("dtype") == second.get("dtype") else (8e-3, 1e-6)
    known = [(a, b) for a, b in zip(first["values"], second["values"], strict=True) if a is not None and b is not None]
    return all(math.isclose(a, b, rel_tol=rtol, abs_tol=atol) or (math.isnan(a) and math.isnan(b)) for a, b in known)


def is_fingerprint(value: object) -> bool:
    """Whether a value read from a file has the form of a fingerprint."""
    if not isinstance(value, dict) or not isinstance(value.get("structure"), str) or not isinstance(value.get("values"), list):
        return False
    return all(number is None or type(number) in (int, float) for number in value["values"])


class Fingerprinted:
    """Fingerprints of modules, taken when asked for, without keeping the modules alive."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = {name: weakref.ref(module) for name, module in modules.items()}

    def describe(self) -> dict[str, Any]:
        found = {}
        for name, reference in self._modules.items():
            module = reference()
            if module is None:
                raise MemhookError(
                    f"the {name} of this trace was deleted, so its fingerprint cannot be taken; calibrate and detect while it is alive"
                )
            found[name] = fingerprint(module)
        return found
