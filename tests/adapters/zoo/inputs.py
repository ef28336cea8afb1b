"""What the two predictions of a recorded step were made from, found in the denoiser's arguments without the adapter's help."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Path = tuple[Any, ...]


@dataclass(frozen=True)
class Part:
    """One of the equal parts of a call of a denoiser.

    Attributes:
        module: Tells denoisers apart: two of them are never the same but for the text.
        arguments: Those of the whole call, by name.
        index: Which part it is,
        count: of how many.
        samples: The rows of a part.
    """

    module: int
    arguments: Mapping[str, Any]
    index: int
    count: int
    samples: int

    def leaves(self) -> dict[Path, Tensor]:
        """Every tensor of this part's rows, and whole where it has no rows."""
        return dict(self._walk(dict(self.arguments), ()))

    def _walk(self, value: Any, path: Path) -> Iterator[tuple[Path, Tensor]]:
        if isinstance(value, Tensor):
            yield path, self._rows(value)
        elif isinstance(value, Mapping):
            for key, item in value.items():
                yield from self._walk(item, (*path, key))
        elif isinstance(value, (list, tuple)):
            per_row = len(value) == self.samples * self.count and not all(isinstance(item, Tensor) and self._has_rows(item) for item in value)
            chosen = value[self.index * self.samples : (self.index + 1) * self.samples] if per_row else value
            if per_row and all(isinstance(item, Tensor) and item.shape == chosen[0].shape for item in chosen):
                yield path, torch.stack(list(chosen))
                return
            whole = Part(self.module, {}, 0, 1, self.samples) if per_row else self
            for key, item in enumerate(chosen):
                yield from whole._walk(item, (*path, key))

    def _has_rows(self, value: Tensor) -> bool:
        return value.ndim > 2 and len(value) == self.samples * self.count

    def _rows(self, value: Tensor) -> Tensor:
        if value.ndim == 0 or len(value) == 0 or len(value) % (self.samples * self.count):
            return value
        return value.chunk(self.count)[self.index]


def text_of(embedding: Tensor, part: Part) -> tuple[Path, Tensor] | None:
    """Where among a part's arguments the embedding ``(b, l, d)`` stands, and the argument itself."""
    wanted = embedding.flatten(1)
    for path, value in part.leaves().items():
        rows = value[:: len(value) // len(wanted)] if value.ndim > 1 and len(value) and len(value) % len(wanted) == 0 else value  # frames
        if rows.ndim > 1 and len(rows) == len(wanted) and torch.equal(rows.flatten(1), wanted):
            return path, rows
    return None


def same_but(path: Path, first: Part, second: Part) -> bool:
    """Whether two parts were made from the same inputs but for the one at ``path``."""
    mine, theirs = first.leaves(), second.leaves()
    return first.module == second.module and mine.keys() == theirs.keys() and all(same(mine[key], theirs[key]) for key in mine if key != path)


def same(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.equal(torch.nan_to_num(first), torch.nan_to_num(second))


def map_tensors(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, Mapping):
        return {key: map_tensors(value, change) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [map_tensors(value, change) for value in tree]
    return tree
