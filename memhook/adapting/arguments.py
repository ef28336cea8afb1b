"""A call's arguments as they were when it was made: denoisers take items out of lists that they are given, or write into tensors."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from memhook.adapting.hooks import OnCall, hook_arguments, hook_calls
from memhook.adapting.tensors import copy_of, like, version


@contextlib.contextmanager
def hook_calls_as_made(module: nn.Module, on_call: OnCall, *, keep: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """`hook_calls`, with the arguments that the call was given.

    Several denoisers of diffusers pop the residuals that they add from the list itself (T2I-Adapter in every UNet, ControlNet in
    HunyuanDiT), so after the call that list is empty. Tensors that the call has not changed are the host's own objects.

    Args:
        module: The denoiser.
        on_call: As in `hook_calls`.
        keep: Asked before each call: whether its tensors will be wanted too, so that those which the denoiser writes into are copied.
    """
    noted = threading.local()  # calls of one module by several threads arrive here at the same time

    def before(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        noted.given = _Given((args, kwargs), tensors=keep())
        return args, kwargs

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        given, noted.given = getattr(noted, "given", None), None
        if given is not None:
            args, kwargs = (given.restored(part) for part in (args, kwargs))
        return on_call(module, args, kwargs, output)

    with hook_calls(module, after), hook_arguments(module, before):
        del module  # the block must not keep it alive
        yield


class _Given:
    """What stood in nested arguments before a call.

    Recognized by the containers themselves: another hook may have put other arguments in the place of some of them since.
    """

    def __init__(self, arguments: Any, *, tensors: bool) -> None:
        self._containers: dict[int, tuple[Any, Any]] = {}  # the containers are held, so that no other gets their id
        self._tensors: dict[int, tuple[Tensor, int | None, Tensor]] = {}
        self._note(arguments, tensors=tensors)

    def restored(self, value: Any) -> Any:
        """The arguments as they were; the same object where nothing was changed."""
        if isinstance(value, Tensor):
            seen = self._tensors.get(id(value))
            return value if seen is None or _unchanged(*seen) else seen[2]
        if not isinstance(value, (list, dict, tuple)):
            return value
        _, contents = self._containers.get(id(value), (value, value))
        if isinstance(contents, dict) and isinstance(value, dict):
            items: Any = {key: self.restored(item) for key, item in contents.items()}
            same = items.keys() == value.keys() and all(items[key] is value[key] for key in items)
        else:
            items = [self.restored(item) for item in contents]
            same = len(items) == len(value) and all(item is other for item, other in zip(items, value, strict=True))
        return value if same else like(value, items)

    def _note(self, value: Any, *, tensors: bool) -> None:
        if isinstance(value, Tensor):
            if tensors:
                self._tensors[id(value)] = value, version(value), copy_of(value)
        elif isinstance(value, (list, dict, tuple)) and id(value) not in self._containers:
            contents = dict(value) if isinstance(value, dict) else list(value)
            self._containers[id(value)] = value, contents
            for item in contents.values() if isinstance(contents, dict) else contents:
                self._note(item, tensors=tensors)


def _unchanged(tensor: Tensor, noted: int | None, copied: Tensor) -> bool:
    if noted is not None:
        return noted == version(tensor)
    # Tensors made under inference_mode do not count their changes. This waits for the device, as do all calls that are kept.
    return torch.equal(tensor.nan_to_num(), copied.nan_to_num()) if tensor.is_floating_point() else torch.equal(tensor, copied)
