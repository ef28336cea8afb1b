"""Fields of a setting that hold names and values: whether two agree, and what differs, in words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from memhook.adapting.fingerprint import is_fingerprint, same_fingerprint

# What was done to a model, and what it is given: a name that one side does not have means that nothing of it was there.
WHOLE = ("quantization", "patched", "inputs")
# What a host says of itself: another version may say more, so names that one side does not have are not compared.
SHARED = ("processors", "scheduler", "scheduler_arguments", "pipeline_arguments", "tokenizers", "guiders")
_SAME_SCALE = 1e-3
_MOST = 4  # differences that a sentence lists


def adapters_differ(expected: Sequence[Mapping[str, Any]], value: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each adapter (LoRA) whose effect is another than in the calibration, as a part of a sentence."""
    found, left = [], list(expected)
    for adapter in value:
        known = next((other for other in left if _same_adapter(other, adapter)), None)
        if known is not None:
            left.remove(known)
            if not _same_scale(known, adapter):
                found.append(f"{_called(adapter)} {_strength(adapter)}, calibrated {_strength(known)}")
            continue
        named = next((other for other in left if (other["part"], other["name"]) == (adapter["part"], adapter["name"])), None)
        if named is not None:
            left.remove(named)
            found.append(f"{_called(adapter)} has other weights than the one of that name in the calibration")
        else:
            found.append(f"{_called(adapter)} {_strength(adapter)}, calibrated without it")
    found += [f"{_called(adapter)} does not act (unloaded, disabled or at 0), calibrated {_strength(adapter)}" for adapter in left]
    return found


def _same_adapter(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    return bool(first["part"] == second["part"] and same_fingerprint(first["weights"], second["weights"]))


def _same_scale(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    close = all(math.isclose(first[key], second[key], rel_tol=_SAME_SCALE, abs_tol=_SAME_SCALE) for key in ("scale", "pattern"))
    return bool(first["fused"] == second["fused"]) and (close or first["fused"])


def _called(adapter: Mapping[str, Any]) -> str:
    where = "" if adapter["part"] == "model" else f" in the {adapter['part'].replace('_', ' ')}"
    return f"{adapter['kind']} {adapter['name']!r}{where}"


def _strength(adapter: Mapping[str, Any]) -> str:
    if adapter["fused"]:
        return "fused into the weights"
    mean = float(f"{adapter['scale']:.3g}")
    return f"at {mean}" if adapter["even"] else f"at {mean} on average, not the same in all layers"


def are_adapters(value: object) -> bool:
    """Whether a value read from a file is a list of adapters."""
    return isinstance(value, list) and all(
        isinstance(item, dict)
        and all(isinstance(item.get(key), str) for key in ("part", "name", "kind"))
        and all(type(item.get(key)) in (int, float) for key in ("scale", "pattern"))
        and all(type(item.get(key)) is bool for key in ("fused", "even"))
        and is_fingerprint(item.get("weights"))
        for item in value
    )


def named_differ(key: str, expected: Mapping[str, Any], value: Mapping[str, Any]) -> list[str]:
    """Each name with another value than in the calibration, as a part of a sentence."""
    apart = ("guidance_scale",) if key == "pipeline_arguments" else ()  # a field of its own
    expected, value = ({name: item for name, item in names.items() if name not in apart} for names in (expected, value))
    return list(_named(expected, value, whole=key in WHOLE))


def _named(expected: Mapping[str, Any], value: Mapping[str, Any], *, whole: bool, prefix: str = "") -> Iterator[str]:
    for name in sorted({*expected, *value}):
        if not whole and not (name in expected and name in value):
            continue
        first, second = expected.get(name, {}), value.get(name, {})
        if isinstance(first, Mapping) and isinstance(second, Mapping):
            # Counts of something: all are said, so one that is missing is not there.
            counts = all(type(item) is int for item in (*first.values(), *second.values()))
            yield from _named(first, second, whole=whole or counts, prefix=f"{prefix}{name}: ")
        elif name not in expected:
            yield f"{prefix}{name}{_in_brackets(second)}, calibrated without it"
        elif name not in value:
            yield f"{prefix}{name}{_in_brackets(first)} was there when calibrating, and is not in this run"
        elif not _same(first, second):
            yield f"{prefix}{name} is {_brief(second)}, calibrated with {_brief(first)}"


def _in_brackets(value: Any) -> str:
    return "" if value in ("given", {}) else f" ({_brief(value)})"


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(_same, first, second))
    if type(first) in (int, float) and type(second) in (int, float):
        return math.isclose(first, second, rel_tol=1e-6, abs_tol=1e-9)
    return bool(first == second)


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def listed(found: Sequence[str]) -> str:
    """Several differences as one sentence."""
    more = f"; and {len(found) - _MOST} more" if len(found) > _MOST else ""
    return "; ".join(found[:_MOST]) + more
