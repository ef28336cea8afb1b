"""The denoiser's calls in a training loop, noted until the loss of their batch is known."""

from __future__ import annotations

import contextlib
import threading
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from memhook.adapting.arguments import hook_calls_as_made
from memhook.adapting.hooks import hook_arguments
from memhook.adapting.pairs import read_output
from memhook.adapting.tensors import tensors_in, version
from memhook.capture.unrecorded import replaying
from memhook.errors import MemhookError
from memhook.training.randomness import RandomState

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, eq=False)
class LoopCall:
    """One forward pass that the loop made.

    Attributes:
        args: Positional arguments, the loop's own objects.
        kwargs: Keyword arguments, likewise.
        values: The prediction ``(b, ...)``, part of the loop's graph.
        random: The state of the random number generators before the pass.
        autocast: Whether autocast was on, and its dtype.
        training: Whether the denoiser was in training mode.
        drew: Whether the pass drew random numbers (dropout).
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    values: Tensor
    random: RandomState
    autocast: tuple[bool, torch.dtype]
    training: bool
    drew: bool
    versions: tuple[int | None, ...]

    def check_unchanged(self) -> None:
        """Raise where the loop has changed an argument in place since: the unconditional pass would be made on something else."""
        if self.versions != _versions(self.args, self.kwargs):
            raise MemhookError(
                "an argument of the denoiser (noisy sample, timestep or embedding) was changed in place, by the denoiser itself or between its "
                "call and the mean of the loss; expected it as it was, for the unconditional pass. Change a copy, or call mean before"
            )


class LoopCalls:
    """Notes the calls of one denoiser that are not recomputations, replays, or another thread's."""

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self._thread = threading.get_ident()
        self._random: RandomState | None = None
        self._versions: tuple[int | None, ...] = ()  # of the arguments before the call: some models write into what they are given
        self._with_grad: list[LoopCall] = []  # since the last loss
        self._without_grad: LoopCall | None = None  # the latest: a validation makes many
        self.paused = False
        self.seen = 0

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Note calls inside the block."""
        module = self._module()
        assert module is not None  # noqa: S101 -- the filter holds it while it is entered
        self._thread = threading.get_ident()
        with hook_arguments(module, self._before), _hooked(module, self):
            del module
            yield

    def take(self, loss: Tensor | None) -> LoopCall:
        """The call that the loss comes from; forgets all calls so far.

        Raises:
            MemhookError: There is none, or more than one.
        """
        # Asked only now: where the whole denoiser is checkpointed, its output joins the graph after the hook has seen it.
        late = self._without_grad
        live = self._with_grad + ([late] if late is not None and late.values.requires_grad else [])
        self._with_grad, self._without_grad = [], None
        if len(live) > 1:
            raise MemhookError(
                f"the denoiser was called {len(live)} times with gradient since the last mean; expected one call for each loss. Call mean "
                "after every forward pass; make calls that belong to no loss under torch.no_grad(), or inside `with f.paused():`"
            )
        if live:
            return live[0]
        if late is None or (loss is not None and loss.requires_grad):
            inside = " with gradient" if late is not None else ""
            raise MemhookError(
                f"the denoiser was not called{inside} inside the block since the last mean; expected one call for each loss. Call the "
                "module that was given to training_filter (or the wrapper that accelerate or DDP made of it) inside the block, and mean once after it"
            )
        return late

    def forget(self) -> int:
        """Forget all calls so far, and say how many with gradient no loss was averaged for."""
        pending = len(self._with_grad)
        self._with_grad, self._without_grad, self._random = [], None, None
        return pending

    def _ignored(self) -> bool:
        # Inside a backward pass a forward pass is a recomputation (gradient checkpointing) of one that was seen.
        return self.paused or replaying() or threading.get_ident() != self._thread or torch._C._current_graph_task_id() != -1

    def _before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        module = self._module()
        if module is not None and not self._ignored():
            self._random, self._versions = RandomState.of(device_of(module)), _versions(args, kwargs)
        return args, kwargs

    def on_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        # A deep copy of the denoiser (a moving average, an evaluation model) carries the hook along.
        if module is not self._module() or self._ignored() or self._random is None:
            return
        self.seen += 1
        values = read_output(output)
        kind = values.device.type
        autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        drew = self._random.moved()
        call = LoopCall(args, kwargs, values, self._random, autocast, module.training, drew, self._versions)
        if values.requires_grad:
            self._with_grad.append(call)
        else:
            self._without_grad = call


def _hooked(module: nn.Module, calls: LoopCalls) -> contextlib.AbstractContextManager[None]:
    return hook_calls_as_made(module, calls.on_call)


def device_of(module: nn.Module) -> torch.device:
    """Where the module's first parameter is."""
    parameter = next(module.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def _versions(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int | None, ...]:
    return tuple(version(tensor) for tensor in tensors_in((args, kwargs)))
