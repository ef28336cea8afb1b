"""Putting an intervention's embeddings in the place of the captured ones, in the denoiser's later calls."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memhook.adapting.replay import look_up, put
from memhook.adapting.tensors import row_hash
from memhook_kdiffusion.calls import find_x
from memhook_kdiffusion.matching import same_samples

if TYPE_CHECKING:
    from collections.abc import Sequence

    from memhook.adapting.replay import Path
    from memhook_kdiffusion.conditioning import Part


class RowSubstitution:
    """Rows are recognized by the bits of their embedding, and belong to the sample that they were made from; nothing waits for the device.

    So unconditional rows, runs of other prompts, and prompts that a host exchanges on the way are left alone, in whichever call they are.

    Args:
        captured: The conditional embeddings ``(b, k, l, d)``.
        replacement: What takes their place.
        path: Where they stand among the denoiser's arguments.
        substituted: Gets ``()`` bool for each evaluation, from the caller.
        block: The declared order of rows, where a row's sample is told by its place; by the noisy sample where None.
    """

    def __init__(self, captured: Tensor, replacement: Tensor, path: Path | None, substituted: list[Tensor], *, block: Sequence[str] | None) -> None:
        self._captured, self._replacement, self._path, self._block = captured, replacement, path, block
        self._moved = (captured != replacement).flatten(2).any(2)  # (b, k)
        self.substituted = substituted

    def known(self, cond: list[list[Part]]) -> list[list[Part]]:
        """Each sample's prompts, which may come with the new embeddings as well."""
        if len(cond) != len(self._replacement):
            return cond
        return [
            [replace(part, candidates=(*part.candidates, *rows[number : number + 1])) for number, part in enumerate(parts)]
            for parts, rows in zip(cond, self._replacement, strict=True)
        ]

    def __call__(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, sigma: Tensor, start: int, flags: list[Tensor]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call with the embeddings replaced.

        Args:
            args: The denoiser's.
            kwargs: The denoiser's.
            x: What the wrapper was given, ``(b, ...)``.
            sigma: ``(b,)``.
            start: How many rows the wrapper's earlier calls of this evaluation had.
            flags: Gets whether rows were replaced.
        """
        given = look_up(args, kwargs, self._path) if self._path is not None else None
        samples, parts = self._captured.shape[:2]
        if not isinstance(given, Tensor) or given.shape[1:] != self._captured.shape[2:] or len(x) != samples:
            flags.append(torch.zeros((), dtype=torch.bool, device=x.device))
            return args, kwargs
        captured, replacement = (rows.flatten(0, 1).to(given) for rows in (self._captured, self._replacement))  # (b k, l, d)
        same = (row_hash(captured)[:, None] == row_hash(given)) & self._moved.flatten().to(given.device)[:, None]  # (b k, rows)
        if self._block is None:
            mine = same_samples(find_x(args, kwargs), torch.zeros(len(given), device=x.device), x, torch.zeros_like(sigma))  # (b, rows)
        else:
            place = torch.arange(start, start + len(given), device=given.device) % samples
            mine = torch.arange(samples, device=given.device)[:, None] == place
        hit = same & mine.repeat_interleave(parts, 0)  # (b k, rows)
        flags.append(hit.any())
        which = hit.to(torch.int8).argmax(0)  # (rows,)
        changed = torch.where(hit.any(0)[:, None, None], replacement[which], given)
        assert self._path is not None  # noqa: S101 -- for the type checker
        if isinstance(self._path[0], int):
            return put(args, self._path, changed), kwargs
        return args, put(kwargs, self._path, changed)
