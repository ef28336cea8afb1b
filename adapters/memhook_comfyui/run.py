"""One run of a sampler: from ComfyUI's calls to evaluations."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from memhook.capture.prediction import Evaluation, Space, magnitude
from memhook.capture.texts import Text
from memhook.capture.trace import Row
from memhook_comfyui.noise import column, covered, space_of, to_clean, to_noise
from memhook_comfyui.prompts import Conds, fingerprints, read_embedding, write_embedding
from memhook_comfyui.replays import CondCall, make_replay
from memhook_comfyui.roles import NOT_COVERED, Names, names_of, why_missing
from memhook_comfyui.thaw import thawed

if TYPE_CHECKING:
    from collections.abc import Callable

    from memhook.capture.intervention import Intervention
    from memhook.hookspecs import Watcher

_ARGUMENTS = ("model", "conds", "x_in", "timestep", "model_options")  # of calc_cond_batch


@dataclass(eq=False)
class _Output:
    """What one list of conditionings gave: ``x0 (b, ...)``, and the call that gave it."""

    x0: Tensor
    conds: Conds
    call: dict[str, Any]
    executor: Callable[..., Any]


@dataclass(eq=False)
class _Moment:
    """One evaluation while it goes on, ``CFGGuider.predict_noise``."""

    x: Tensor
    sigma: Tensor
    options: dict[str, Any]
    outputs: dict[str, _Output] = field(default_factory=dict)  # by role: the first one counts (PAG and SAG call again)
    transformer_options: Any = None  # of the first call
    emitted: bool = False


class Run:
    """Makes evaluations of the calls between the start of a run and its end.

    Lists of conditionings are recognized as the guider's own, by identity; what is evaluated on another latent (SAG), with other patches
    (PAG) or a second time is no part of the pair.
    """

    def __init__(self, watcher: Watcher, guider: Any) -> None:
        self._watcher = watcher
        self._guider = weakref.ref(guider)
        self._moment: _Moment | None = None
        self._hashed: tuple[tuple[Conds, Conds, int], tuple[Tensor | None, Text | None]] | None = None
        self._rows = 0
        self._substitute: tuple[Conds, list[Tensor]] | None = None  # the prompt that an intervention put in
        self.unconditional: str | None = None

    # ---- wrappers -------------------------------------------------------------------------------------------------

    def predict_noise(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Around one evaluation."""
        if not self._watcher.listening or self._moment is not None:
            return executor(*args, **kwargs)
        given = dict(zip(("x", "timestep", "model_options"), args, strict=False)) | kwargs
        self._moment = moment = _Moment(given["x"], given["timestep"], given.get("model_options") or {})
        try:
            result = executor(*args, **kwargs)
            if not moment.emitted:
                self._alone(moment, result)
        finally:
            self._moment = None
        return result

    def calc_cond_batch(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Around the network's call for some lists of conditionings."""
        moment, guider = self._moment, self._guider()
        if moment is None or guider is None or not self._watcher.listening:
            return executor(*args, **kwargs)
        outputs = executor(*args, **kwargs)
        call = dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
        names = names_of(guider.conds)
        for index, conds in enumerate(call["conds"]):
            self._take(moment, guider, conds, outputs[index], call, executor)
        cond, uncond = moment.outputs.get(names.cond), moment.outputs.get(names.uncond or "")
        if cond is None or uncond is None or moment.emitted:
            return outputs
        moment.emitted = True
        changed = self._pair(guider, names, cond, uncond)
        if changed is None:
            return outputs
        if not any(cond.x0 is output for output in outputs):  # an earlier call gave it away: its memory is all that can still be reached
            cond.x0.copy_(changed)
            return outputs
        return [changed if output is cond.x0 else output for output in outputs]

    def end(self) -> None:
        """The run is over: keep nothing of it but numbers."""
        self._moment = self._hashed = self._substitute = None

    # ---- private --------------------------------------------------------------------------------------------------

    def _take(self, moment: _Moment, guider: Any, conds: Any, x0: Any, call: dict[str, Any], executor: Any) -> None:
        name = next((name for name, own in guider.conds.items() if own is conds), None)
        if conds is None or name is None or name in moment.outputs or not isinstance(x0, Tensor):
            return
        patches = (call.get("model_options") or {}).get("transformer_options")
        if not moment.outputs:
            moment.x, moment.sigma, moment.transformer_options = call["x_in"], call["timestep"], patches
        elif call["x_in"] is not moment.x or patches is not moment.transformer_options:
            return
        moment.outputs[name] = _Output(x0, conds, call, executor)

    def _pair(self, guider: Any, names: Names, cond: _Output, uncond: _Output) -> Tensor | None:
        """Emit an evaluation; what the sampler is to be given for the conditional x0, where somebody intervened."""
        self.unconditional = names.uncond
        x, sigma, model = cond.call["x_in"], cond.call["timestep"], cond.call["model"]
        batch = x.shape[0]
        self._count_substitution(cond.conds, x.device)
        with torch.inference_mode(mode=False), torch.no_grad():
            x0_cond, x0_uncond, at, level = (thawed(tensor) for tensor in (cond.x0, uncond.x0, x, sigma))
            where = covered(x0_cond, x0_uncond)
            present = where.flatten(1).any(dim=1).all()  # () bool
            conditioning, unconditional = self._conditioning(cond.conds, uncond.conds, batch)
            row = Row(
                magnitude(*(torch.where(where, x0, torch.zeros_like(x0)) for x0 in (x0_cond, x0_uncond))) / level.reshape(-1),
                sigma=level,
                conditioning=conditioning,
                unconditional=unconditional,
                shape=tuple(x0_cond.shape[1:]),
                roles="matched",
                scale=_scale(guider, batch),
                settle=lambda row: self._settle(row, present),
                continues=self._rows > 0,
            )
            self._rows += 1
            pred_cond, pred_uncond = (to_noise(x0, at, level, where) for x0 in (x0_cond, x0_uncond))
        if not self._watcher.wants_roles:
            self._watcher.emit(Evaluation(pred_cond, pred_uncond, space=space_of(model), roles="matched", sigma=level), row)
            return None
        if not bool(present):
            self._watcher.missing(NOT_COVERED)
            row.magnitude, row.settle = None, None
            self._watcher.emit(Evaluation(pred_cond, None, space=space_of(model), roles="matched", sigma=level), row)
            return None
        if not self._watcher.wants_evaluations:
            self._watcher.emit(Evaluation(pred_cond, pred_uncond, space=space_of(model), roles="matched", sigma=level), row)
            return None
        evaluation = self._evaluation(guider, cond, pred_cond, pred_uncond, where, space_of(model))
        answer = self._watcher.emit(evaluation, row)
        if answer is None:
            return None
        return self._change(guider, names, cond, evaluation, answer, where)

    def _settle(self, row: Row, present: Tensor) -> bool:
        if not bool(present):
            row.magnitude = None
            self._watcher.missing(NOT_COVERED)
        return True

    def _evaluation(self, guider: Any, cond: _Output, pred_cond: Tensor, pred_uncond: Tensor, where: Tensor, space: Space) -> Evaluation:
        call = cond.call
        kept = CondCall(
            cond.executor, call["model"], guider.model_patcher, cond.conds, call["x_in"], call["timestep"], call.get("model_options") or {}
        )
        embedding = read_embedding(cond.conds, call["x_in"].shape[0])
        replay = None if embedding is None else make_replay(kept, embedding, pred_cond, where)
        return Evaluation(pred_cond, pred_uncond, space=space, roles="matched", sigma=kept.sigma, embedding=embedding, replay=replay)

    def _change(self, guider: Any, names: Names, cond: _Output, evaluation: Evaluation, answer: Intervention, where: Tensor) -> Tensor | None:
        """Do what was answered to an evaluation."""
        if answer.embedding is not None:
            # The run's own list, which is made anew for every run: all later calls, also those of other nodes' patches, take it from there.
            replaced = write_embedding(guider.conds[names.cond], thawed(answer.embedding))
            guider.conds[names.cond] = replaced
            self._substitute = replaced, answer.substituted
        if answer.pred_cond is None:
            return None
        new = answer.pred_cond.detach()
        moved = (new != evaluation.pred_cond).flatten(1).any(dim=1)  # (b,): all other samples stay as they were, to the bit
        clean = to_clean(new, cond.call["x_in"], cond.call["timestep"]).to(cond.x0.dtype)
        return torch.where(where & column(moved, where), clean, cond.x0)

    def _count_substitution(self, conds: Conds, device: torch.device) -> None:
        if self._substitute is not None and conds is self._substitute[0]:
            self._substitute[1].append(torch.ones((), dtype=torch.bool, device=device))

    def _alone(self, moment: _Moment, result: Any) -> None:
        """The evaluation has ended without a pair."""
        guider = self._guider()
        if guider is None or not isinstance(result, Tensor):
            return
        names = names_of(guider.conds)
        self._watcher.missing(why_missing(guider, names, moment.options))
        cond = moment.outputs.get(names.cond)
        x0, model = (cond.x0, cond.call["model"]) if cond is not None else (result, getattr(guider, "inner_model", None))
        with torch.inference_mode(mode=False), torch.no_grad():
            level = thawed(moment.sigma)
            predicted = to_noise(thawed(x0), thawed(moment.x), level, None)
        row = Row(None, sigma=level, shape=tuple(x0.shape[1:]), continues=self._rows > 0)
        self._rows += 1
        moment.emitted = True
        self._watcher.emit(Evaluation(predicted, None, space=space_of(model), roles="matched", sigma=level), row)

    def _conditioning(self, cond: Conds, uncond: Conds, batch: int) -> tuple[Tensor | None, Text | None]:
        if self._hashed is not None:
            (first, second, size), found = self._hashed
            if first is cond and second is uncond and size == batch:
                return found
        pair = fingerprints(cond, batch), fingerprints(uncond, batch)
        hashes = torch.stack([pair[0], pair[1]]) if pair[0] is not None and pair[1] is not None else None  # (2, b)
        embedding = read_embedding(uncond, batch)
        found = hashes, None if embedding is None else Text.of(embedding)
        self._hashed = (cond, uncond, batch), found
        return found


def _scale(guider: Any, batch: int) -> np.ndarray | None:
    """The guidance scale that the guider says, ``(b,)``."""
    scale = getattr(guider, "cfg", None)
    return np.full(batch, float(scale)) if isinstance(scale, (int, float)) and not hasattr(guider, "cfg2") else None
