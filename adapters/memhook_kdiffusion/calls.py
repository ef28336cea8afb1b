"""Calls of the denoiser inside a CFG wrapper, and what each of their rows was made from."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from memhook.adapting.pairs import find_timestep, read_output
from memhook.adapting.replay import CallRecord, Path, look_up
from memhook.adapting.tensors import row_hash

if TYPE_CHECKING:
    from collections.abc import Callable

_SAMPLES = ("x", "input", "sample", "x_in")
_TEXT_NAMES = ("c_crossattn", "crossattn", "encoder_hidden_states", "context", "prompt_embeds", "cond", "text")


@dataclass(frozen=True, eq=False)
class Call:
    """One call of the denoiser, which takes the noisy sample and gives the clean one, ``(rows, ...)`` both."""

    x: Tensor  # (rows, channels or more, ...)
    sigma: Tensor  # (rows,)
    denoised: Tensor  # (rows, channels, ...), a copy
    text: Tensor | None  # (rows, l, d), or another conditioning with a row for each
    path: Path | None  # where it stands
    others: Tensor  # (rows,) int64 fingerprints of all other inputs
    record: CallRecord | None  # where replay was asked for

    @property
    def rows(self) -> int:
        return int(self.denoised.shape[0])


def read_call(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, *, find: Callable[[Mapping[Path, Tensor]], Path | None], keep: bool
) -> Call:
    """Note a call; ``find`` says which of its inputs with a row for each is the conditioning by which roles are told."""
    denoised = read_output(output).detach().clone()  # wrappers combine predictions in place
    rows = denoised.shape[0]
    record = CallRecord(module, args, kwargs, batch=rows, device=denoised.device) if keep else None
    if record is not None:
        args, kwargs = record.args, record.kwargs
    x = find_x(args, kwargs)
    sigma = torch.as_tensor(find_timestep(args, kwargs), device=denoised.device).reshape(-1)
    inputs = row_inputs(args, kwargs, rows)
    path = find(inputs)
    others = _fingerprints(inputs, path, rows, denoised.device)
    text = inputs[path].detach() if path is not None else None
    return Call(x.detach(), sigma.expand(rows) if len(sigma) == 1 else sigma, denoised, text, path, others, record)


def find_x(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The noisy sample among a denoiser's arguments."""
    candidates = [args[0] if args else None, *(kwargs.get(name) for name in _SAMPLES)]
    return next(value for value in candidates if isinstance(value, Tensor))


def row_inputs(args: tuple[Any, ...], kwargs: dict[str, Any], rows: int) -> dict[Path, Tensor]:
    """By path, the inputs beside the noisy sample and the noise level that have a row for each; the text's usual names first."""
    skipped = {0, 1} if len(args) > 1 else {0}
    found: dict[Path, Tensor] = {}
    numbered: list[tuple[int | str, Any]] = [(place, value) for place, value in enumerate(args) if place not in skipped]
    for key, value in [*numbered, *kwargs.items()]:
        if key in (*_SAMPLES, "sigma", "t", "timestep"):
            continue
        found.update({path: tensor for path, tensor in _leaves((key,), value) if tensor.ndim and tensor.shape[0] == rows})
    return dict(sorted(found.items(), key=lambda item: _usualness(item[0])))


def _leaves(path: Path, value: Any) -> Iterator[tuple[Path, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves((*path, key), item)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _leaves((*path, index), item)


def _usualness(path: Path) -> int:
    ranks = [_TEXT_NAMES.index(str(key)) for key in path if str(key) in _TEXT_NAMES]
    return min(ranks, default=len(_TEXT_NAMES))


def find_embedding(inputs: Mapping[Path, Tensor]) -> Path | None:
    """The first input of the form of a text embedding, ``(rows, l, d)``."""
    return next((path for path, tensor in inputs.items() if tensor.ndim == 3 and tensor.is_floating_point()), None)


def find_declared(declared: Path) -> Callable[[Mapping[Path, Tensor]], Path | None]:
    """A finder of what stands at a path that the user has said."""
    return lambda inputs: declared if declared in inputs else None


def _fingerprints(inputs: Mapping[Path, Tensor], path: Path | None, rows: int, device: torch.device) -> Tensor:
    total = torch.zeros(rows, dtype=torch.int64, device=device)
    for other, tensor in inputs.items():
        if other != path:
            total += row_hash(tensor).to(device) * (zlib.crc32(repr(other).encode()) | 1)
    return total


def tensor_at(args: tuple[Any, ...], kwargs: dict[str, Any], path: Path) -> Tensor | None:
    """The tensor at ``path``; None where there is none."""
    value = look_up(args, kwargs, path)
    return value if isinstance(value, Tensor) else None
