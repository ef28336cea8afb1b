"""An intervention's embedding or prediction in the place of the host's own, in the arguments and outputs of its calls."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memhook.adapting.replay import look_up, put
from memhook.adapting.tensors import like
from memhook.errors import GuidanceLayoutError

if TYPE_CHECKING:
    from memhook.adapting.replay import Path


class Substitution:
    """Puts an intervention's embedding in the place of the captured one, in the arguments of later calls.

    Rows are recognized by their bits, never by position alone: the rows of sample ``i`` are ``i``, ``b + i`` and so on, of which those
    equal to the captured conditional row are replaced. So unconditional rows, runs of other prompts and prompts that a host exchanges
    on the way are left alone, in one call or two. Nothing here waits for the device.

    Args:
        path: Where the embedding stands among the arguments: a tensor ``(rows, l, d)``, a list with a tensor ``(l, d)`` for each row, or
            a tensor with as many elements a row (a pooled vector ``(rows, d)``, an axis of encoder layers ``(rows, l, layers, d / layers)``).
        captured: The conditional embedding ``(b, l, d)``.
        replacement: What takes its place.
        substituted: Gets ``()`` bool for each call.
        repeats: How many rows in succession belong to a sample: the frames of a video.
    """

    def __init__(self, path: Path, captured: Tensor, replacement: Tensor, substituted: list[Tensor], *, repeats: int = 1) -> None:
        self._path, self._captured, self._replacement = path, captured.repeat_interleave(repeats, 0), replacement.repeat_interleave(repeats, 0)
        self._moved = (self._captured != self._replacement).flatten(1).any(1)  # (b,)
        self._substituted = substituted

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call, with the embedding replaced where it is the captured one."""
        argument = look_up(args, kwargs, self._path)
        changed = self._list(argument) if isinstance(argument, list) else self._tensor(argument) if isinstance(argument, Tensor) else None
        if changed is None:
            return args, kwargs
        if isinstance(self._path[0], int):
            return put(args, self._path, changed), kwargs
        return args, put(kwargs, self._path, changed)

    def _tensor(self, argument: Tensor) -> Tensor | None:
        """A tensor ``(rows, l, d)``, or the same elements with other axes behind the rows; None where it cannot hold the captured rows."""
        if argument.ndim < 2 or argument.shape[1:].numel() != self._captured.shape[1:].numel() or argument.shape[0] % len(self._captured):
            return None
        given = argument.reshape(len(argument), *self._captured.shape[1:])
        times = given.shape[0] // len(self._captured)
        captured, replacement = (rows.to(given).repeat(times, 1, 1) for rows in (self._captured, self._replacement))
        same = (given == captured).flatten(1).all(1)  # (rows,)
        self._substituted.append((same & self._moved.to(same.device).repeat(times)).any())
        return torch.where(same[:, None, None], replacement, given).reshape(argument.shape)

    def _list(self, argument: list[Any]) -> list[Any] | None:
        """A list with a tensor ``(l, d)`` for each row, of different lengths."""
        if not argument or len(argument) % len(self._captured) or not all(isinstance(row, Tensor) for row in argument):
            return None
        found, changed = [], []
        for number, given in enumerate(argument):
            index = number % len(self._captured)
            captured, replacement = self._captured[index].to(given), self._replacement[index].to(given)
            if given.shape == captured.shape:
                same = (given == captured).all()
                found.append(same & self._moved[index].to(same.device))
                changed.append(torch.where(same, replacement, given))
            else:
                changed.append(given)
        if found:
            self._substituted.append(torch.stack(found).any())
        return changed


def replace_prediction(output: Any, old: Tensor, new: Tensor) -> Any:
    """A copy of a denoiser's output in which the tensor ``old`` (as `memhook.adapting.pairs.read_output` finds it) is ``new``."""
    if output is old:
        return new
    if isinstance(output, Mapping) and not dataclasses.is_dataclass(output):
        return like(output, {key: new if value is old else value for key, value in output.items()})
    if isinstance(output, (tuple, list)):
        return like(output, [new if value is old else value for value in output])
    for name in ("sample", "pred"):
        if getattr(output, name, None) is old:
            if dataclasses.is_dataclass(output) and not isinstance(output, type):
                return dataclasses.replace(output, **{name: new})
            changed = copy.copy(output)
            setattr(changed, name, new)
            return changed
    raise GuidanceLayoutError(f"the denoiser returned a {type(output).__name__}, in which the prediction cannot be replaced; expected a tensor")
