"""What was done to a model beside its own weights: adapters (LoRA), quantization, patched methods, attention processors."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from memhook.adapting.snapshots import adapter_later, is_adapted

if TYPE_CHECKING:
    from collections.abc import Sequence

FIELDS = ("adapters", "quantization", "patched", "processors")
_HARMLESS = ("torch", "accelerate", "diffusers", "transformers", "peft", "memhook")  # whose stand-ins do not change what is predicted
_HOSTS = ("diffusers", "transformers", "memhook_diffusers")
_QUANTIZERS = ("torch.ao.", "torchao.", "optimum.quanto", "bitsandbytes", "diffusers.quantizers", "gguf", "hqq", "gptqmodel", "awq", "nunchaku")
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
_FREEU = ("s1", "s2", "b1", "b2")
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_VARIANTS = ("XFormers", "Sliced", "Fused", "2_0", "NPU", "XLAFlash", "XLA")  # of attention processors that compute the same


def take(modules: Mapping[str, nn.Module]) -> Callable[[], dict[str, Any]]:
    """Look at modules as they are now, without waiting for the device; what it answers reads it.

    Every one of `FIELDS` is there, empty where there is nothing to say.
    """
    adapters: list[Callable[[], dict[str, Any]]] = []
    quantized: dict[str, dict[str, int]] = {}
    patched: dict[str, dict[str, int]] = {}
    processors: dict[str, dict[str, int]] = {}
    for part, module in modules.items():
        seen = _Seen()
        for name, inner in module.named_modules():
            seen.look(name, inner)
        adapters += seen.adapters(part, module)
        for found, of_part in ((quantized, seen.quantized), (patched, seen.patched), (processors, seen.processors)):
            if of_part:
                found[part] = dict(sorted(of_part.items()))
    rest: dict[str, Any] = {"quantization": quantized, "patched": patched, "processors": processors}
    return lambda: {"adapters": [read() for read in adapters], **rest}


class _Seen:
    """What one module shows."""

    def __init__(self) -> None:
        self.quantized: Counter[str] = Counter()
        self.patched: Counter[str] = Counter()
        self.processors: Counter[str] = Counter()
        self._scales: dict[str, list[float]] = {}
        self._kinds: dict[str, str] = {}
        self._fused: set[str] = set()

    def look(self, name: str, module: nn.Module) -> None:
        """Note what there is to say of ``module``."""
        if is_adapted(module):
            self._adapted(module)
        elif ".lora_" not in f".{name}":
            self.quantized.update(_quantized(module))
        self.patched.update(_patches(module))
        processor = module.__dict__.get("processor", module._modules.get("processor"))
        if processor is not None:
            self.processors[_processor(processor)] += 1

    def _adapted(self, layer: Any) -> None:
        fused = set(getattr(layer, "merged_adapters", ()))
        active = [] if getattr(layer, "disable_adapters", False) or fused else list(getattr(layer, "active_adapters", ()))
        held = {str(key) for own in layer.adapter_layer_names for key in (getattr(layer, own, None) or {})}
        for adapter in sorted(held | fused):
            self._kinds.setdefault(adapter, _kind(layer))
            self._scales.setdefault(adapter, []).append(_scale(layer, adapter) if adapter in active else 0.0)
        self._fused |= fused

    def adapters(self, part: str, module: nn.Module) -> list[Callable[[], dict[str, Any]]]:
        """Each adapter that acts, with how strongly."""
        return [
            _adapter(part, module, adapter, self._kinds[adapter], scales, fused=adapter in self._fused)
            for adapter, scales in sorted(self._scales.items())
            if any(scales) or adapter in self._fused
        ]


def _adapter(part: str, module: nn.Module, adapter: str, kind: str, scales: Sequence[float], *, fused: bool) -> Callable[[], dict[str, Any]]:
    weights = adapter_later(module, part, adapter)
    # Where layers differ in their scale, a sum with weights tells which ones do.
    pattern = math.fsum(scale * (1 + math.sin(place)) for place, scale in enumerate(scales)) / len(scales)
    about = {
        "part": part,
        "name": adapter,
        "kind": kind,
        "scale": _short(math.fsum(scales) / len(scales)),
        "pattern": _short(pattern),
        "even": len(set(scales)) == 1,
    }
    return lambda: {**about, "fused": fused, "weights": weights()}


def _kind(layer: Any) -> str:
    modules = type(layer).__module__.split(".")
    kind = modules[modules.index("tuners") + 1] if "tuners" in modules[:-1] else type(layer).__name__
    return {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr", "ia3": "IA3", "oft": "OFT"}.get(kind, kind)


def _scale(layer: Any, adapter: str) -> float:
    """The scale as users give it: that of a layer is ``alpha / r`` times it."""
    scaling = getattr(layer, "scaling", {}).get(adapter, 1.0)
    alpha, rank = getattr(layer, "lora_alpha", {}).get(adapter), getattr(layer, "r", {})
    rank = rank.get(adapter) if isinstance(rank, Mapping) else None
    if not alpha or not rank:
        return float(scaling)
    stabilized = getattr(layer, "use_rslora", {})
    stabilized = stabilized.get(adapter, False) if isinstance(stabilized, Mapping) else bool(stabilized)
    full: float = alpha / (math.sqrt(rank) if stabilized else rank)
    return float(scaling) / full


def _short(number: float) -> float:
    return float(f"{number:.4g}")


def _quantized(module: nn.Module) -> Iterator[str]:
    kind = type(module)
    if kind.__module__.startswith(_QUANTIZERS) or (isinstance(module, _LAYERS) and not kind.__module__.startswith(("torch.nn.", *_HOSTS))):
        yield kind.__name__
    for parameter in module._parameters.values():
        if parameter is None:
            continue
        if type(parameter) not in (nn.Parameter, Tensor) and not _is_known(type(parameter)):
            yield type(parameter).__name__
        elif not parameter.is_complex() and (not parameter.is_floating_point() or parameter.element_size() < 2):
            yield str(parameter.dtype).removeprefix("torch.")


def _is_known(kind: type) -> bool:
    return kind.__module__.startswith(("torch.nn.", "torch._subclasses", "torch.distributed"))


def _patches(module: nn.Module) -> Iterator[str]:
    kind = type(module).__name__
    own = module.__dict__.get("forward")
    if own is not None:
        hook = module.__dict__.get("_hf_hook")
        own = module.__dict__.get("_old_forward") if hook is not None else own
        if own is not None and getattr(own, "__func__", own) is not type(module).forward and not _harmless(own):
            yield f"{kind}.forward is {_called(own)}"
    replaced = _replaced(type(module))
    if replaced is not None:
        yield f"{kind}.forward is {replaced}, for the class"
    if any(base.__module__.split(".")[0] in _HOSTS[:2] for base in type(module).__mro__[1:]) and not _of_known(type(module).__module__):
        yield f"{kind} is a class of {type(module).__module__}"
    registry = module.__dict__.get("_diffusers_hook", module._modules.get("_diffusers_hook"))
    for name in list(getattr(registry, "hooks", ())):
        if "offload" not in name and "parallel" not in name:
            yield f"{name} on {kind}"
    factors = {key: module.__dict__[key] for key in _FREEU if module.__dict__.get(key) is not None}
    if factors:
        yield f"FreeU ({', '.join(f'{key}={value}' for key, value in factors.items())}) on {kind}"
    if module.training and ((isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0) or isinstance(module, _NORMS)):
        yield f"{kind} in training mode"


def _harmless(function: Any) -> bool:
    return _of_known(_module_of(function))


def _of_known(module: str) -> bool:
    root = module.split(".", maxsplit=1)[0]
    return root in _HARMLESS or root.startswith("memhook")


def _module_of(function: Any) -> str:
    function = getattr(function, "func", function)  # functools.partial
    return getattr(function, "__module__", None) or type(function).__module__


def _called(function: Any) -> str:
    function = getattr(function, "func", function)
    return f"{_module_of(function)}.{getattr(function, '__qualname__', type(function).__qualname__)}"


@functools.lru_cache(maxsize=4096)
def _forward_of(forward: Any, home: str) -> str | None:
    return _called(forward) if _module_of(forward) != home and not _harmless(forward) else None


def _replaced(kind: type) -> str | None:
    """What the class's ``forward`` is, if it was written elsewhere than the class."""
    owner = next((base for base in kind.__mro__ if "forward" in base.__dict__), None)
    if owner is None or owner.__module__.split(".")[0] == "torch":
        return None
    return _forward_of(owner.__dict__["forward"], owner.__module__)


def _processor(processor: Any) -> str:
    """A processor's class, the same for those that compute the same, and the numbers that it holds (the scale of an IP-Adapter)."""
    name = type(processor).__name__
    for variant in _VARIANTS:
        name = name.replace(variant, "")
    held = {key: value for key, value in vars(processor).items() if not key.startswith("_") and _is_number(value)}
    return f"{name}({', '.join(f'{key}={value}' for key, value in sorted(held.items()))})" if held else name


def _is_number(value: Any) -> bool:
    return type(value) is float or (isinstance(value, list) and bool(value) and all(type(item) is float for item in value))
