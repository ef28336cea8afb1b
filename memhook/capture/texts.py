"""A few numbers of a text embedding, by which the same text is recognized in another dtype or on another device."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_EDGES = (0, 8, 32, 77, 256)  # tokens; what is padded to the length of the batch is compared up to the shorter one's last edge
_PROJECTIONS = 4
_ROUNDING = {"float32": 5e-3, "float64": 5e-3, "float16": 1e-2}  # how far an encoder's results lie apart in a dtype, relative to their size
_COARSEST = 4e-2  # in bfloat16


@dataclass(frozen=True, eq=False)
class Text:
    """What is kept of the texts of ``b`` samples, on the device until somebody asks."""

    tokens: int
    dtype: str
    numbers: tuple[Tensor, ...]  # (b,) each: for each part its size, and projections of the same unit

    @staticmethod
    @torch.no_grad()
    def of(embedding: Tensor) -> Text:
        """Of an embedding ``(b, l, d)`` or ``(b, d)``; nothing here waits for the device."""
        values = embedding.detach().reshape(len(embedding), *((1, -1) if embedding.ndim == 2 else (embedding.shape[1], -1)))
        length, width = values.shape[1:]
        values = values.to(torch.float32)
        projected = values @ torch.stack([_weights(width, number, values.device) for number in range(_PROJECTIONS)], dim=1)
        projected = projected * _weights(length, _PROJECTIONS, values.device)[:, None]  # (b, l, projections)
        found: list[Tensor] = []
        for start, stop in _parts(length):
            scale = math.sqrt((stop - start) * width)
            found.append(torch.linalg.vector_norm(values[:, start:stop].flatten(1), dim=1) / scale)
            found += [number.clone() for number in (projected[:, start:stop].sum(1) / scale).unbind(1)]  # views would hold all of it
        return Text(length, str(embedding.dtype).removeprefix("torch."), tuple(found))

    def rows(self, rows: Any) -> Text:
        """Of some of the samples."""
        return Text(self.tokens, self.dtype, tuple(number[rows] for number in self.numbers))

    def stored(self) -> Text:
        """The same on the CPU."""
        return Text(self.tokens, self.dtype, tuple(number.cpu() for number in self.numbers))

    def up_to(self, tokens: int) -> Text:
        """The parts that a text of so many tokens has as well."""
        return self if tokens >= self.tokens else Text(tokens, self.dtype, self.numbers[: len(_parts(tokens)) * (1 + _PROJECTIONS)])

    def distinct(self) -> list[dict[str, Any]]:
        """The different texts among the samples, as JSON values; waits for the device."""
        found: list[dict[str, Any]] = []
        for row in torch.stack(self.numbers, dim=1).tolist():
            numbers = [float(f"{number:.6g}") for number in row]
            parts = [numbers[start : start + 1 + _PROJECTIONS] for start in range(0, len(numbers), 1 + _PROJECTIONS)]
            value = {"tokens": self.tokens, "dtype": self.dtype, "parts": parts}
            if not any(same_text(value, known) for known in found):
                found.append(value)
        return found


def _parts(length: int) -> list[tuple[int, int]]:
    edges = [edge for edge in _EDGES if edge < length]
    return list(zip(edges, [*edges[1:], length], strict=True))


@functools.lru_cache(maxsize=64)
def _weights(count: int, number: int, device: torch.device) -> Tensor:
    """``(count,)`` numbers of mean square 1, the same on every machine: made in integers."""
    with torch.inference_mode(mode=False):
        places = torch.arange(1, count + 1, dtype=torch.int64)
        mixed = (places * places * (7919 + 2 * number) + places * (104729 + 6 * number)) % 10007
        return ((mixed - 5003).to(torch.float32) / 2888.8).to(device)


def same_text(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two texts are one, up to the rounding of their dtypes; of different lengths, as far as both go."""
    limit = max(_ROUNDING.get(text["dtype"], _COARSEST) for text in (first, second))
    parts = list(zip(_parts(min(first["tokens"], second["tokens"])), first["parts"], second["parts"], strict=False))
    if first["tokens"] != second["tokens"]:
        parts = [part for part in parts if part[0][1] in _EDGES]
    if not parts:
        return False
    return all(_close(one, other, limit) for _, one, other in parts)


def _close(first: Sequence[float], second: Sequence[float], limit: float) -> bool:
    size = max(first[0], second[0])
    if not math.isfinite(size):
        return not math.isfinite(first[0]) and not math.isfinite(second[0])
    return all(abs(one - other) <= max(limit * size, 1e-6) for one, other in zip(first, second, strict=True))


def same_texts(first: Sequence[dict[str, Any]], second: Sequence[dict[str, Any]]) -> bool:
    """Whether two collections hold the same texts."""
    return all(any(same_text(one, other) for other in others) for some, others in ((first, second), (second, first)) for one in some)


def are_texts(value: object) -> bool:
    """Whether a value read from a file has the form of `Text.distinct`."""
    return isinstance(value, list) and all(_is_text(item) for item in value)


def _is_text(value: object) -> bool:
    if not isinstance(value, dict) or type(value.get("tokens")) is not int or value["tokens"] < 1 or not isinstance(value.get("dtype"), str):
        return False
    parts = value.get("parts")
    return isinstance(parts, list) and all(
        isinstance(part, list) and len(part) == 1 + _PROJECTIONS and all(type(number) in (int, float) for number in part) for part in parts
    )
