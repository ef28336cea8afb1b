"""Running the conditional half of an evaluation again, with another embedding, differentiably."""

from __future__ import annotations

import contextlib
import functools
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from memhook.adapting.checkpointing import checkpointed
from memhook.adapting.replay import Replay, replayed
from memhook.errors import ReplayError
from memhook_comfyui.noise import to_noise
from memhook_comfyui.prompts import Conds, write_embedding
from memhook_comfyui.thaw import thawed, thawed_modules, thawed_tree, with_tensors


class CondCall:
    """One call of ComfyUI's ``calc_cond_batch``, kept with the conditional list alone; stands in for a `memhook.adapting.replay.CallRecord`.

    Args:
        again: ``again(model, conds, x, sigma, options) -> [x0]``, ComfyUI's own function and the wrappers of others.
        model: The model; kept weakly, like the patcher.
        patcher: The patcher that runs it.
        conds: The conditional list.
        x: The noisy latent ``(b, ...)``.
        sigma: The noise levels ``(b,)``.
        options: The model options of the call.
    """

    def __init__(
        self, again: Callable[..., Any], model: nn.Module, patcher: Any, conds: Conds, x: Tensor, sigma: Tensor, options: dict[str, Any]
    ) -> None:
        self._again = again
        self._model, self._patcher = weakref.ref(model), weakref.ref(patcher)
        self._conds = [_thawed_entry(entry) for entry in conds]
        self._controls = list(_control_models(conds))
        self._options = thawed_tree(options)
        with torch.inference_mode(mode=False), torch.no_grad():  # samplers go on to change theirs in place
            self.x, self.sigma = thawed(x).clone(), thawed(sigma).clone()
        self._autocast = torch.is_autocast_enabled(x.device.type), torch.get_autocast_dtype(x.device.type)

    def again(self, rows: Any, path: Any, embedding: Tensor) -> Tensor:  # noqa: ARG002 -- a CallRecord's signature; always the whole batch
        """The prediction x0 for an embedding ``(b, l, d)``."""
        model, patcher = self._model(), self._patcher()
        if model is None or patcher is None:
            raise ReplayError("the model of this captured call was deleted; replay while it is loaded")
        with contextlib.ExitStack() as stack:
            stack.enter_context(_running(model, patcher))
            modules = [model, *(control for reference in self._controls if (control := reference()) is not None)]
            around = functools.partial(_frozen, modules)
            stack.enter_context(around())
            stack.enter_context(checkpointed(model, around))
            enabled, dtype = self._autocast
            stack.enter_context(torch.autocast(self.x.device.type, dtype=dtype, enabled=enabled))
            found: Tensor = self._again(model, [write_embedding(self._conds, embedding)], self.x, self.sigma, self._options)[0]
        return found


def make_replay(call: CondCall, embedding: Tensor, expected: Tensor, where: Tensor) -> Callable[[Tensor], Tensor]:
    """``replay(embedding) -> pred_cond``; its first use is checked against ``expected``."""
    whole = Replay(
        call,  # type: ignore[arg-type]
        rows=slice(None),
        path=(0,),
        embedding=embedding,
        expected=expected,
        read=lambda x0: to_noise(x0, call.x, call.sigma, where),
    )

    def replay(embedding: Tensor) -> Tensor:
        return whole(embedding)

    # Not the object itself, which could be asked for some of the rows: areas, masks and control images know the whole batch only.
    return replay


@contextlib.contextmanager
def _frozen(modules: list[nn.Module]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(thawed_modules(modules))
        for module in modules:
            stack.enter_context(replayed(module))
        yield


@contextlib.contextmanager
def _running(model: Any, patcher: Any) -> Iterator[None]:
    """The model as it is in the middle of a run: loaded, and with the patcher that its functions ask for."""
    before = getattr(model, "current_patcher", None)
    if before is not None:
        yield
        return
    management = sys.modules.get("comfy.model_management")
    if management is not None:
        management.load_models_gpu([patcher])
    model.current_patcher = patcher
    try:
        yield
    finally:
        model.current_patcher = before


def _thawed_entry(entry: dict[str, Any]) -> dict[str, Any]:
    held = {name: with_tensors(value, thawed) for name, value in entry.get("model_conds", {}).items()}
    return {**{name: thawed(value) if isinstance(value, Tensor) else value for name, value in entry.items()}, "model_conds": held}


def _control_models(conds: Conds) -> Iterator[weakref.ref[nn.Module]]:
    """The control networks, which the embedding goes through too."""
    for entry in conds:
        control = entry.get("control")
        for patcher in control.get_models() if control is not None and hasattr(control, "get_models") else ():
            module = getattr(patcher, "model", None)
            if isinstance(module, nn.Module):
                yield weakref.ref(module)
