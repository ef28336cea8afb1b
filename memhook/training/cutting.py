"""The unconditional pass for some rows of a batch: on these rows alone where the denoiser allows it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from memhook.adapting.tensors import like, take_rows, tensors_in

if TYPE_CHECKING:
    from memhook.training.calls import LoopCall
    from memhook.training.unconditional import Cut, UnconditionalPass

# Largest difference between a cut batch's prediction and the loop's, relative to the row's norm, that other kernels for another batch size
# may cause. A layer that mixes the rows of a batch, or a tensor that was cut and should not have been, causes more.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_COLLECTIVE = {"SyncBatchNorm", "FullyShardedDataParallel", "FSDPModule"}


class RowsPass:
    """Unconditional predictions of chosen rows.

    A cut batch is tried once for every shape of the call's arguments: the loop's own, conditional, prediction is made again on the chosen
    rows, and must come out as it was. Where it does not (layers that mix the rows of a batch, such as batch normalization in training;
    arguments that cannot be cut), and where the loop's pass drew random numbers (dropout, which would fall otherwise in another batch),
    the pass is made on the whole batch, as without a choice of rows.
    """

    def __init__(self, full: UnconditionalPass) -> None:
        self._full = full
        self._cuts: dict[object, Callable[[Tensor, int], Cut] | None] = {}
        self._said: set[str] = set()
        self._together: bool | None = None

    def together(self, module: nn.Module) -> bool:
        """Whether all ranks have to make the pass for all rows, whichever are chosen; asked of the module once."""
        if self._together is None:
            self._together = meets_others(module)
            if self._together:
                self._say("it communicates with other processes in its forward pass (SyncBatchNorm, sharding), which must all take part")
        return self._together

    def __call__(self, module: nn.Module, call: LoopCall, rows: Tensor) -> tuple[Tensor, int]:
        """Predictions ``(k, ...)`` of the rows ``(k,)`` int64, on the CPU; and how many rows went through the denoiser."""
        call.check_unchanged()
        batch = call.values.shape[0]
        if len(rows) == batch:
            return self._full(module, call), batch
        if call.drew:
            self._say("it drew random numbers (dropout), which would fall otherwise in a part of the batch")
        make = None if call.drew or self.together(module) else self._cut_for(module, call, rows)
        if make is None:
            return self._full(module, call)[rows], batch
        return self._full(module, call, make(rows, batch)), len(rows)

    def _cut_for(self, module: nn.Module, call: LoopCall, rows: Tensor) -> Callable[[Tensor, int], Cut] | None:
        """How to cut a call of this shape; None where only the whole batch gives the loop's prediction."""
        shapes = tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors_in((call.args, call.kwargs)))
        kind = (shapes, call.training, call.autocast)
        if kind not in self._cuts:
            self._cuts[kind] = self._try(module, call, rows)
        return self._cuts[kind]

    def _try(self, module: nn.Module, call: LoopCall, rows: Tensor) -> Callable[[Tensor, int], Cut] | None:
        problems = []
        for make in (_tensors_cut, _lists_cut):
            try:
                again = self._full.conditional(module, call, make(rows, call.values.shape[0]))
            except Exception as error:  # noqa: BLE001 -- whatever a model raises that is given another batch than it expects
                problems.append(f"{type(error).__name__}: {error}".splitlines()[0])
                continue
            problem = _difference(again, call.values.detach()[rows], tolerance=_tolerance(module, call))
            if problem is None:
                return make
            problems.append(problem)
        self._say(f"a part of the batch alone gives another prediction ({problems[0]})")
        return None

    def _say(self, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            warnings.warn(
                f"the unconditional pass is made on the whole batch, though only some rows are judged: the denoiser cannot be called on these alone, "
                f"since {reason}. The verdicts are right, but the pass costs as much as without timesteps=",
                stacklevel=8,
            )


def meets_others(module: nn.Module) -> bool:
    """Whether the forward pass waits for other processes: then every rank has to make as many passes."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return False
    kinds = {kind.__name__ for part in module.modules() for kind in type(part).__mro__}
    # Sharded weights: DTensor (FSDP 2, tensor parallelism), DeepSpeed's stage 3.
    sharded = any(type(parameter).__name__ == "DTensor" or hasattr(parameter, "ds_id") for parameter in module.parameters())
    return sharded or bool(kinds & _COLLECTIVE)


def _tolerance(module: nn.Module, call: LoopCall) -> float:
    """That of the coarsest precision which the pass may have had."""
    enabled, dtype = call.autocast
    kinds = {call.values.dtype, *((dtype,) if enabled else ()), *(p.dtype for p in module.parameters() if p.is_floating_point())}
    if hasattr(module, "_original_forward"):  # accelerate's mixed precision: it casts inside of forward, and gives float32 back (1.15)
        kinds.add(torch.bfloat16)
    if call.values.device.type != "cpu":  # convolutions in float32 may round as float16 does (TF32)
        kinds.add(torch.float16)
    return max(_TOLERANCE.get(kind, 1e-2) for kind in kinds)


def _difference(found: Tensor, expected: Tensor, *, tolerance: float) -> str | None:
    """What is wrong with a cut batch's prediction; None where it is that of the loop but for rounding."""
    if found.shape != expected.shape:
        return f"of shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    wide = torch.promote_types(expected.dtype, torch.float32)
    a, b = (values.to(wide).reshape(len(values), -1) for values in (found, expected))
    usable = b.isfinite().all(1)  # of a row that is broken nothing can be told
    error = float(((a - b).norm(dim=1) / b.norm(dim=1).clamp_min(1e-30))[usable].amax()) if bool(usable.any()) else 0.0
    return None if error <= tolerance else f"relative difference {error:.2g}, expected at most {tolerance:g}"


def _tensors_cut(rows: Tensor, batch: int) -> Cut:
    """The rows of every tensor that has one for each sample."""
    return lambda tree: take_rows(tree, rows, of=batch)


def _lists_cut(rows: Tensor, batch: int) -> Cut:
    """The same, and the items of every list with one for each sample, such as sizes or lengths."""
    numbers = rows.tolist()

    def cut(tree: Any, *, top: bool = True) -> Any:
        if isinstance(tree, Tensor):
            return take_rows(tree, rows, of=batch)
        if isinstance(tree, Mapping):
            return like(tree, {key: cut(value, top=False) for key, value in tree.items()})
        if isinstance(tree, (list, tuple)):
            per_sample = not top and len(tree) == batch and not any(isinstance(v, Tensor) and v.ndim and len(v) == batch for v in tree)
            return like(tree, [tree[number] for number in numbers] if per_sample else [cut(value, top=False) for value in tree])
        return tree

    return cut
