"""Fingerprints of models: a hash of the parameters' names and shapes, and a little of the values of each of them."""

from __future__ import annotations

import hashlib
import math
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from memhook.adapting.moments import Kept, element, equal, moments, plain, probe
from memhook.adapting.tensors import version
from memhook.errors import MemhookError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_VALUES = 128
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # of torch.compile and its like
_SAME = 1e-5  # of a tensor's size, where both models have one dtype: sums on two devices differ by 1e-7
_ROUNDING = {"float16": 2.0**-10, "bfloat16": 2.0**-7}  # twice the most that rounding to the dtype changes a number by


def fingerprint(module: nn.Module) -> dict[str, Any]:
    """What identifies a model, as JSON values.

    ``structure`` is a SHA-256 of sorted parameter names and shapes, ``moments`` a size and a projection of every parameter, ``buffers``
    the same of those that are saved with the model, ``values`` single elements of some (by which older files are compared), and
    ``dtype`` names the parameters' dtypes.

    The dtype is no part of the structure, so that one calibration serves a model in float32 and float16. What has no
    storage (offloaded to disk) is None. The weights of adapters (LoRA) are left out; see `memhook.adapting.alterations`.
    It is taken once for an unchanged model.
    """
    return read_later(module)()


def read_later(module: Any, name: str = "model") -> Callable[[], dict[str, Any]]:
    """Take a fingerprint without waiting for the device; what it answers reads it.

    Args:
        module: A module, or a stand-in that offers ``named_parameters()``.
        name: What errors call it.
    """
    return Snapshot(name, module).read if isinstance(module, nn.Module) else _take(_Parts.of(module)).read


@dataclass(eq=False)
class Taken:
    """A fingerprint whose numbers may still be on the device."""

    structure: str
    dtype: str
    values: Kept
    moments: Kept
    buffers: tuple[str, ...]
    of_buffers: Kept
    _found: dict[str, Any] | None = None

    def read(self) -> dict[str, Any]:
        """Wait for the device: once for each that holds a part of the model."""
        if self._found is None:
            self._found = self._read()
        return dict(self._found)

    def _read(self) -> dict[str, Any]:
        pairs = [None if pair is None else [_short(number) for number in pair] for pair in self.moments.read()]
        buffers = dict(zip(self.buffers, self.of_buffers.read(), strict=True))
        return {
            "structure": self.structure,
            "values": [None if number is None else _short(number) for number in self.values.read()],
            "moments": pairs,
            "buffers": {name: [_short(number) for number in pair] for name, pair in buffers.items() if pair is not None},
            "dtype": self.dtype,
        }


@dataclass(frozen=True, eq=False)
class _Parts:
    """What a fingerprint is made from."""

    parameters: list[tuple[str, Tensor]]  # in the order of their names
    buffers: list[tuple[str, Tensor]]

    @staticmethod
    def of(module: Any) -> _Parts:
        if not isinstance(module, nn.Module):  # hosts pass stand-ins that offer no more than this
            return _Parts(sorted(module.named_parameters(), key=lambda item: item[0]), [])
        parameters, buffers = {}, {}
        seen: set[int] = set()
        skipped: tuple[str, ...] = ()
        for prefix, part in module.named_modules():
            start = f"{prefix}." if prefix else ""
            if start.startswith(skipped):
                continue  # inside of an adapter
            own: set[str] = set()
            if is_adapted(part):
                skipped += tuple(f"{start}{name}." for name, _ in part.named_children() if name != "base_layer")
                own.update(part._parameters)
            for name, parameter in part._parameters.items():
                if parameter is not None and name not in own and id(parameter) not in seen:
                    seen.add(id(parameter))
                    parameters[_name(start + name)] = parameter
            for name, buffer in part._buffers.items():
                if buffer is not None and name not in part._non_persistent_buffers_set and buffer.is_floating_point():
                    buffers[_name(start + name)] = buffer
        return _Parts(sorted(parameters.items(), key=lambda item: item[0]), sorted(buffers.items(), key=lambda item: item[0]))

    @staticmethod
    def of_adapter(module: nn.Module, adapter: str) -> _Parts:
        """What peft added under this name."""
        found = []
        for name, part in module.named_modules():
            if is_adapted(part):
                for own, tensor in part.named_parameters():
                    if not own.startswith("base_layer.") and adapter in own.split("."):
                        found.append((f"{_name(name)}.{own.replace(f'.{adapter}', '')}", tensor))
        return _Parts(sorted(found, key=lambda item: item[0]), [])

    def tensors(self) -> list[Tensor]:
        return [part for _, tensor in (*self.parameters, *self.buffers) for part in plain(tensor)]

    def state(self) -> tuple[Any, ...]:
        """Equal as long as no tensor was exchanged, nor changed in a way that torch counts."""
        return tuple((name, id(tensor), *_state(tensor)) for name, tensor in (*self.parameters, *self.buffers))


def _name(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".").removeprefix("base_layer.")  # of peft


def is_adapted(module: nn.Module) -> bool:
    """Whether ``module`` is one that peft put around a model's own."""
    return "base_layer" in module._modules and hasattr(module, "adapter_layer_names")


def _state(tensor: Tensor) -> tuple[Any, ...]:
    parts = plain(tensor)
    counted = [version(part) for part in parts]
    if None in counted:
        return (object(),)  # equal to nothing
    return tuple(
        (part.data_ptr() if part.device.type != "meta" else 0, count, part.dtype, part.device, part.shape)
        for part, count in zip(parts, counted, strict=True)
    )


def _take(parts: _Parts) -> Taken:
    digest = hashlib.sha256()
    for name, parameter in parts.parameters:
        digest.update(f"{name}:{tuple(parameter.shape)};".encode())
    usable = [p for _, p in parts.parameters if p.is_floating_point() and p.numel() > 0]
    chosen = usable[:: max(1, len(usable) // _VALUES)][:_VALUES]
    dtypes = {str(p.dtype).removeprefix("torch.") for p in usable}
    looked_at = [part for _, parameter in parts.parameters if parameter.numel() > 0 for part in plain(parameter)]
    return Taken(
        digest.hexdigest()[:16],
        ", ".join(sorted(dtypes)),
        Kept([element(parameter) for parameter in chosen]),
        Kept([moments(part) for part in looked_at]),
        tuple(name for name, _ in parts.buffers),
        Kept([moments(buffer) for _, buffer in parts.buffers]),
    )


def _short(number: float) -> float:
    return float(f"{number:.6g}")


def same_fingerprint(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two fingerprints are of the same model; in two dtypes, up to the rounding of the coarser one."""
    return difference(first, second) is None


def difference(first: Mapping[str, Any], second: Mapping[str, Any]) -> str | None:
    """In what two fingerprints differ, in a few words; None if they are of the same model."""
    if first["structure"] != second["structure"] or len(first["values"]) != len(second["values"]):
        return "the parameters have other names or shapes"
    rtol, atol = _tolerance(first.get("dtype"), second.get("dtype"))
    if "moments" in first and "moments" in second:
        if len(first["moments"]) != len(second["moments"]):
            return "the parameters are stored in another form"
        pairs = list(zip(first["moments"], second["moments"], strict=True))
        wrong = sum(not _close(a, b, rtol, atol) for a, b in pairs)
        if wrong:
            return f"{wrong} of {len(pairs)} parameter tensors have other values"
        shared = first.get("buffers", {}).keys() & second.get("buffers", {}).keys()
        if not all(_close(first["buffers"][name], second["buffers"][name], rtol, atol) for name in shared):
            return "the buffers have other values"
        return None
    known = [(a, b) for a, b in zip(first["values"], second["values"], strict=True) if a is not None and b is not None]
    alike = all(math.isclose(a, b, rel_tol=rtol, abs_tol=atol) or (math.isnan(a) and math.isnan(b)) for a, b in known)
    return None if alike else "the parameters have other values"


def _tolerance(first: str | None, second: str | None) -> tuple[float, float]:
    if first == second:
        return _SAME, 1e-12
    coarsest = max((_ROUNDING.get(name, 0.0) for dtypes in (first, second) for name in (dtypes or "bfloat16").split(", ")), default=0.0)
    return max(coarsest, _SAME), 1e-6


def _close(first: Sequence[float] | None, second: Sequence[float] | None, rtol: float, atol: float) -> bool:
    """Whether two pairs of moments agree, relative to the tensors' size."""
    if first is None or second is None:
        return True
    if not all(map(math.isfinite, (*first, *second))):
        return [str(number) for number in first] == [str(number) for number in second]
    limit = max(rtol * max(first[0], second[0]), atol)
    return all(abs(a - b) <= limit for a, b in zip(first, second, strict=True))


def is_fingerprint(value: object) -> bool:
    """Whether a value read from a file has the form of a fingerprint."""
    if not isinstance(value, dict) or not isinstance(value.get("structure"), str) or not isinstance(value.get("values"), list):
        return False
    pairs, buffers, dtype = value.get("moments", []), value.get("buffers", {}), value.get("dtype", "")
    if not isinstance(pairs, list) or not isinstance(buffers, dict) or not isinstance(dtype, str):
        return False
    numbers = all(number is None or type(number) in (int, float) for number in value["values"])
    return numbers and all(pair is None or _is_pair(pair) for pair in pairs) and all(map(_is_pair, buffers.values()))


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(number) in (int, float) for number in value)


_known: weakref.WeakKeyDictionary[nn.Module, dict[str | None, tuple[tuple[Any, ...], list[Tensor], Taken]]] = weakref.WeakKeyDictionary()


class Snapshot:
    """The fingerprint of a module as it is now, read later.

    It is taken anew only if a parameter was exchanged or changed. Changes that torch does not count (through ``.data``) show in some
    elements of each tensor; to compare these waits for the device, so elsewhere than on the CPU it is left until somebody reads.
    """

    def __init__(self, name: str, module: nn.Module, adapter: str | None = None) -> None:
        self._name, self._adapter = name, adapter
        self._module = weakref.ref(module)
        parts = self._parts(module)
        self._state, self._probe = parts.state(), probe(parts.tensors())
        known = _known.get(module, {}).get(adapter)
        waits = any(part.device.type != "cpu" for part in self._probe)
        self._earlier: list[Tensor] | None = None  # what the probe is still to be compared with
        if known is not None and known[0] == self._state and (waits or equal(known[1], self._probe)):
            self._taken, self._earlier = known[2], known[1] if waits else None
        else:
            self._taken = self._keep(module, parts)
        self._found = None if waits else self._taken.read()
        if not waits:
            del self._taken, self._probe, self._state  # a trace that keeps this keeps no tensor

    def _parts(self, module: nn.Module) -> _Parts:
        return _Parts.of(module) if self._adapter is None else _Parts.of_adapter(module, self._adapter)

    def _keep(self, module: nn.Module, parts: _Parts) -> Taken:
        taken = _take(parts)
        _known.setdefault(module, {})[self._adapter] = self._state, self._probe, taken
        return taken

    def read(self) -> dict[str, Any]:
        """The fingerprint.

        Raises:
            MemhookError: The weights were changed through ``.data`` before the fingerprint was taken, and again since.
        """
        if self._found is None:
            if self._earlier is not None and not equal(self._earlier, self._probe):
                self._taken = self._again()
            self._found = self._taken.read()
        return self._found

    def _again(self) -> Taken:
        module = self._module()
        parts = None if module is None else self._parts(module)
        if module is None or parts is None or parts.state() != self._state or not equal(probe(parts.tensors()), self._probe):
            raise MemhookError(
                f"the weights of the {self._name} were changed through `.data`, which torch does not count, before this run and again since, so its "
                "fingerprint cannot be taken. Change weights under torch.no_grad() instead, or read trace.setting before the next change"
            )
        return self._keep(module, parts)


def adapter_later(module: nn.Module, name: str, adapter: str) -> Callable[[], dict[str, Any]]:
    """The same of the weights that an adapter of peft has in ``module``."""
    return Snapshot(name, module, adapter).read
