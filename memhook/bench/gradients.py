"""What gradients of the magnitude cost, against the way in which published code takes them: counted, not only timed."""

from __future__ import annotations

import contextlib
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from memhook.adapting import replay
from memhook.adapting.checkpointing import find_blocks
from memhook.adapting.module import ModuleAdapter
from memhook.adapting.pairs import read_output
from memhook.adapting.tensors import map_tensors
from memhook.attribution.gradient import attribute_tokens
from memhook.capture.watching import probe
from memhook.errors import MemhookError
from memhook.mitigation.embedding import optimize_embedding

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from memhook.capture.prediction import Evaluation

FORWARD = "conditional forward"
LEAST = "forward + embedding backward"
ATTRIBUTION = "attribution, one evaluation"
UPDATE = "optimization, per update"
CHECKPOINTED = "optimization with checkpointing, per update"
NAIVE = "naive optimization, per update"
GOALS = {
    "arithmetic of an update / (forward + embedding backward)": 1.15,
    "time of an update / (forward + embedding backward)": 1.15,
    "time of an update / naive": 0.55,
    "memory of an update / naive": 0.45,
}
"""What the project wants of its own updates at most; see `ratios`."""


@dataclass(frozen=True)
class GradientCost:
    """What one way of taking a gradient costs.

    Attributes:
        way: Which.
        forwards: Its arithmetic in units of one conditional forward pass (floating-point operations as torch counts them).
        saved_bytes: Activations kept for the backward pass, parameters not counted.
        seconds: The median over repetitions.
    """

    way: str
    forwards: float
    saved_bytes: int
    seconds: float


def gradient_costs(
    denoiser: nn.Module, *, sample: Tensor, timestep: Tensor | float, cond: Tensor, uncond: Tensor, updates: int = 10, repeats: int = 3
) -> list[GradientCost]:
    """Measure all ways on the same call, by turns, so that a busy machine slows all of them alike.

    The naive way is that of published code: both halves in the graph at every update, parameters not frozen.

    Args:
        denoiser: Called as ``denoiser(sample, timestep, embedding)``; in evaluation mode.
        sample: Noisy samples, ``(b, ...)``.
        timestep: One for all samples.
        cond: Conditional embedding, ``(b, l, d)``.
        uncond: Unconditional embedding, ``(b, l, d)``.
        updates: Updates of the optimization, whose cost is divided by this number.
        repeats: Repetitions of the timing.

    Returns:
        A row for each way; without the checkpointed one for models that have no repeated blocks.
    """
    if updates < 1 or repeats < 1:
        raise MemhookError(f"updates is {updates} and repeats {repeats}; expected 1 or more of both")
    evaluation = _captured(denoiser, sample, timestep, cond, uncond)
    call = _Call(denoiser, sample, timestep, cond, uncond)
    ways: dict[str, tuple[Callable[[int], object], int]] = {
        FORWARD: (lambda _: call.forward(), 1),
        LEAST: (lambda _: call.least(), 1),
        ATTRIBUTION: (lambda _: attribute_tokens(evaluation), 1),
        UPDATE: (lambda steps: optimize_embedding(evaluation.objective, cond, target=0.0, max_steps=steps), updates),
        NAIVE: (call.naive, updates),
    }
    if find_blocks(denoiser):
        ways[CHECKPOINTED] = lambda steps: optimize_embedding(evaluation.objective, cond, target=0.0, max_steps=steps, checkpoint=True), updates
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, (run, steps) in ways.items():
            seconds[way].append(_time(lambda run=run, steps=steps: run(steps), sample.device) / steps)  # type: ignore[misc]
    flops = {way: _flops(lambda run=run, steps=steps: run(steps)) / steps for way, (run, steps) in ways.items()}  # type: ignore[misc]
    # One update's graph is all that is ever alive.
    saved = {way: _saved_bytes(denoiser, lambda run=run: run(1)) for way, (run, _) in ways.items()}  # type: ignore[misc]
    if CHECKPOINTED in ways:
        saved[CHECKPOINTED] = _checkpointed_bytes(denoiser, lambda: ways[UPDATE][0](1))
    return [GradientCost(way, flops[way] / flops[FORWARD], saved[way], statistics.median(seconds[way])) for way in ways]


def ratios(costs: list[GradientCost]) -> dict[str, float]:
    """The figures that the project sets itself goals for, by name; smaller is better."""
    by_way = {cost.way: cost for cost in costs}
    update, least, naive = by_way[UPDATE], by_way[LEAST], by_way[NAIVE]
    values = (
        update.forwards / least.forwards,
        update.seconds / least.seconds,
        update.seconds / naive.seconds,
        update.saved_bytes / naive.saved_bytes,
    )
    return dict(zip(GOALS, values, strict=True))


@dataclass(frozen=True, eq=False)
class _Call:
    """The denoiser's call without memhook."""

    denoiser: nn.Module
    sample: Tensor
    timestep: Tensor | float
    cond: Tensor
    uncond: Tensor

    def __call__(self, sample: Tensor, embedding: Tensor) -> Tensor:
        return read_output(self.denoiser(sample, self.timestep, embedding))

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self(self.sample, self.cond)

    def least(self) -> Tensor:
        """What cannot be avoided: one forward pass and a backward pass to the embedding, nothing kept for parameters."""
        leaf = self.cond.clone().requires_grad_()
        with _parameters(self.denoiser, requires_grad=False):
            return torch.autograd.grad(self(self.sample, leaf).flatten(1).norm(dim=1).sum(), leaf)[0]

    def naive(self, steps: int) -> Tensor:
        """Adam on one norm over the batch, the unconditional half computed again, inside the graph, at every update."""
        leaf = self.cond.clone().requires_grad_()
        adam = torch.optim.Adam([leaf], lr=0.05)
        with _parameters(self.denoiser, requires_grad=True):
            for _ in range(steps):
                predicted = self(torch.cat([self.sample, self.sample]), torch.cat([self.uncond, leaf]))
                pred_uncond, pred_cond = predicted.chunk(2)
                leaf.grad = torch.autograd.grad((pred_cond - pred_uncond).norm(), leaf)[0]
                adam.step()
        return leaf.detach()


def _captured(denoiser: nn.Module, sample: Tensor, timestep: Tensor | float, cond: Tensor, uncond: Tensor) -> Evaluation:
    @torch.no_grad()
    def run() -> None:
        denoiser(torch.cat([sample, sample]), timestep, torch.cat([uncond, cond]))

    evaluation = probe(denoiser, run, adapter=ModuleAdapter(denoiser, layout="uncond_first")).evaluations[0]
    evaluation.objective(cond)  # the first replay is checked, which is no part of the cost
    return evaluation


@contextlib.contextmanager
def _parameters(module: nn.Module, *, requires_grad: bool) -> Iterator[None]:
    before = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(requires_grad)
        yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)


def _time(run: Callable[[], object], device: torch.device) -> float:
    def wait() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


class _Flops(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts floating-point operations. torch's own FlopCounterMode follows modules with hooks that fail under ``autograd.grad``."""

    total: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def _flops(run: Callable[[], object]) -> int:
    # Fused attention on the CPU is missing from torch's table (2.13); the plain one is made of products that are in it.
    counter = _Flops()  # type: ignore[no-untyped-call]
    with counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        run()
    total: int = counter.total
    return total


class _Storages:
    """The memory behind tensors, each storage once, but for a model's own."""

    def __init__(self, module: nn.Module) -> None:
        self._own = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
        self._bytes: dict[int, int] = {}

    def add(self, tensor: Tensor) -> int:
        """The bytes that this tensor adds to those seen so far."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self._own or storage.data_ptr() in self._bytes:
            return 0
        self._bytes[storage.data_ptr()] = storage.nbytes()
        return storage.nbytes()

    def total(self) -> int:
        return sum(self._bytes.values())


@contextlib.contextmanager
def _saving(pack: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Show ``pack`` everything that autograd saves inside the block.

    Of nested hooks autograd asks the inner ones only, and a replay has its own, which alias the memory that they are given.
    """
    own = replay._saved_as_used

    def both() -> saved_tensors_hooks:
        return saved_tensors_hooks(lambda tensor: pack(tensor).detach(), lambda tensor: tensor)

    try:
        replay._saved_as_used = both
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            yield
    finally:
        replay._saved_as_used = own


def _saved_bytes(module: nn.Module, run: Callable[[], object]) -> int:
    """What autograd saves during ``run``. Saved tensors are alive until the backward pass, so no storage is counted for another."""
    seen = _Storages(module)

    def pack(tensor: Tensor) -> Tensor:
        seen.add(tensor)
        return tensor

    with _saving(pack):
        run()
    return seen.total()


def _checkpointed_bytes(module: nn.Module, run: Callable[[], object]) -> int:
    """What a checkpointed ``run`` keeps at most: what is saved outside blocks, the blocks' inputs, and one block's activations.

    Worked out from a run without checkpointing, since checkpointing hides what it keeps from hooks on saved tensors.
    """
    kept, seen = _Storages(module), _Storages(module)
    inside: list[int] = []  # of each block so far
    depth = 0

    def pack(tensor: Tensor) -> Tensor:
        if depth:
            inside[-1] += seen.add(tensor)
        else:
            kept.add(tensor)
        return tensor

    def enter(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        nonlocal depth
        depth += 1
        inside.append(0)
        found: list[Tensor] = []
        map_tensors((args, kwargs), lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
        if any(tensor.requires_grad for tensor in found):  # else there is nothing to recompute for
            for tensor in found:
                kept.add(tensor)

    def leave(*_: object) -> None:
        nonlocal depth
        depth -= 1

    with contextlib.ExitStack() as stack:
        for block in find_blocks(module):
            stack.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(leave, always_call=True).remove)
        with _saving(pack):
            run()
    return kept.total() + max(inside)
