"""Gathering the denoisers' calls up to each scheduler step, and making one evaluation of them."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from memhook.adapting.hooks import hook_arguments
from memhook.adapting.pairs import PairRecorder, find_timestep
from memhook.adapting.substitution import Substitution
from memhook.capture.trace import Row
from memhook.errors import ReplayError
from memhook_diffusers.calls import Call, Conditioning, make_call
from memhook_diffusers.layout import Layout, Numbers, Reading
from memhook_diffusers.outputs import raw_output
from memhook_diffusers.parts import space_of
from memhook_diffusers.remade import new_variance, remade
from memhook_diffusers.repairs import repaired
from memhook_diffusers.replays import make_replay
from memhook_diffusers.ways import (
    MOST,
    Cut,
    claimed,
    embedding_of,
    equal_halves,
    halves_of,
    matched,
    observe_way,
    prior_of,
    read_way,
    readings_of,
    without_variance,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from memhook.capture.intervention import Intervention
    from memhook.capture.prediction import Space
    from memhook.hookspecs import Watcher
    from memhook_diffusers.encoding import PipelineEncoder
    from memhook_diffusers.roles import Decision


class Run:
    """What one watch makes of the calls that it sees."""

    def __init__(
        self,
        watcher: Watcher,
        *,
        name: str,
        denoisers: Sequence[nn.Module],
        schedulers: Sequence[Any],
        why_missing: Callable[[dict[str, Any]], str],
        remedy: str,
        setting: Callable[[Sequence[Call], Mapping[str, Any]], Callable[[], Mapping[str, Any]]] | None = None,
        encode: PipelineEncoder | None = None,
    ) -> None:
        self._watcher, self._name, self._encode = watcher, name, encode
        self._why_missing, self._remedy = why_missing, remedy
        self._denoisers = [weakref.ref(denoiser) for denoiser in denoisers]
        self._schedulers = [weakref.ref(scheduler) for scheduler in schedulers]
        self.changes = contextlib.ExitStack()  # of the calls' arguments, once somebody intervened
        self._recorder = PairRecorder()
        self._conditioning = Conditioning()
        self._calls: deque[Call] = deque(maxlen=2 * MOST)
        self._named: deque[dict[str, Any]] = deque(maxlen=MOST)  # what guiders were given, by name (LTX 2 has one more for sound)
        self._layouts: dict[Any, Layout] = {}
        self._recorded = False
        self._unread: tuple[int, ...] | None = None  # what a scheduler was given that no output has the form of
        self._setting = setting
        self._about: Callable[[], Mapping[str, Any]] | None = None  # the setting of the run that goes on, as its first step showed it
        self._timesteps: Any = None  # the scheduler's, weakly: another tensor means another run

    # ---- what the hooks report ------------------------------------------------------------------------------------

    def on_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A module was called."""
        if self._watcher.listening:
            clocks = tuple(getattr(scheduler(), "timesteps", None) for scheduler in self._schedulers)
            call = make_call(module, args, kwargs, output, keep=self._watcher.wants_evaluations, clocks=clocks)
            if call is not None:
                self._calls.append(call)

    def keeps(self) -> bool:
        """Whether the call that is about to be made will be kept, with its tensors."""
        return self._watcher.listening and self._watcher.wants_evaluations

    def on_guider(self, guider: Any, arguments: dict[str, Any]) -> None:  # noqa: ARG002 -- the form of a tap's listener
        """A guider is given its predictions by name."""
        if self._watcher.listening:
            self._named.append(arguments)

    def on_step(self, scheduler: Any, arguments: dict[str, Any]) -> dict[str, Any] | None:
        """The scheduler is about to step; what it is to be given instead, where somebody intervened."""
        model_output = arguments.get("model_output")
        if not self._watcher.listening or not self._calls or not isinstance(model_output, Tensor) or model_output.ndim < 2:
            return None
        calls, named = _of_this_run(self._calls, scheduler), list(self._named)
        self._calls.clear()
        self._named.clear()
        target = without_variance(model_output, arguments.get("sample")).detach()
        ways = readings_of(calls, tuple(target.shape))
        if not ways:
            self._unread = tuple(target.shape)
            return None  # a step of something that was not watched (the sound track of LTX 2)
        self._recorded = True
        used = [call for call, _, _, _ in ways[0]]
        self._new_run(scheduler, calls, arguments)
        seen = find_timestep(used[0].args, used[0].kwargs)
        timestep = seen if seen is not None and not _several(seen) else arguments.get("timestep", seen)
        if any(call.changed for call in used):
            self._lone(ways[0], space_of(scheduler), timestep, f"{self._name} changed its predictions in place before they could be read")
            return None
        doubled = None
        count = sum(len(predictions) for *_, predictions in ways[0])
        if count == 1:
            halves = halves_of(ways[0])
            if halves is None:
                self._lone(ways[0], space_of(scheduler), timestep, self._why_missing(used[-1].kwargs))
                return None
            ways, doubled, target = [halves], equal_halves(target, halves[0][3]), target.chunk(2)[0]
        variance = model_output[:, target.shape[1] :] if doubled is None and target.shape != model_output.shape else None
        changed = self._evaluate(ways, target, space_of(scheduler), timestep, doubled=doubled, named=named, variance=variance)
        if changed is None:
            return None
        if doubled is not None:
            changed = torch.cat([changed, changed])
        return {"model_output": changed}

    def finish(self) -> None:
        """The block has ended: say why nothing was recorded, if so."""
        if self._recorded or not (self._calls or self._unread):
            return
        stepped = f"was given {self._unread}, a form that no output has" if self._unread else "was never stepped"
        self._watcher.missing(
            f"{self._name} called its denoiser, but its scheduler {stepped}, so the calls cannot be told apart into evaluations. "
            "Watch the denoiser itself with memhook.ModuleAdapter"
        )

    # ---- private --------------------------------------------------------------------------------------------------

    def _new_run(self, scheduler: Any, calls: Sequence[Call], step: Mapping[str, Any]) -> None:
        timesteps = getattr(scheduler, "timesteps", None)
        if isinstance(timesteps, Tensor) and (self._timesteps is None or self._timesteps() is not timesteps):
            self._timesteps = weakref.ref(timesteps)
            self._layouts = {}
            self._about = None
        if self._about is None and self._setting is not None:
            self._about = self._setting(calls, step)

    def _lone(self, way: Cut, space: Space, timestep: Any, reason: str) -> None:
        prediction = way[-1][3][-1]
        self._watcher.missing(f"{reason}. {self._remedy}")
        row = Row(None, timestep, shape=tuple(prediction.values.shape[1:]), space=space, about=self._about)
        evaluation = self._recorder.evaluation(prediction, prediction, space=space, roles="assumed", timestep=timestep)
        self._watcher.emit(replace(evaluation, pred_uncond=None), row)

    def _evaluate(
        self,
        ways: Sequence[Cut],
        target: Tensor,
        space: Space,
        timestep: Any,
        *,
        doubled: Tensor | None,
        named: Sequence[dict[str, Any]],
        variance: Tensor | None,
    ) -> Tensor | None:
        readings = [read_way(way, self._conditioning) for way in ways]
        key = (doubled is not None, *((id(call.module), len(predictions)) for call, _, _, predictions in ways[0]))
        layout = self._layouts.setdefault(key, Layout(prior_of(ways[0])))
        given = matched(ways[0], named)
        if given is None and layout.wants_observation():
            claims = claimed(named, target)
            layout.observe([observe_way(way, reading, target, claims) for way, reading in zip(ways, readings, strict=True)], doubled)
        decide = layout.decide if given is None else lambda: given
        numbers = [reading.numbers() for reading in readings]
        settle = _settling(
            decide, numbers, samples=2 * numbers[0].samples if doubled is not None else numbers[0].samples, missing=self._watcher.missing,
            name=self._name, reason=self._why_missing(ways[0][-1][0].kwargs), remedy=self._remedy,
        )  # fmt: skip
        values = readings[0].predictions[0].values
        row = Row(None, timestep, shape=tuple(values.shape[1:]), space=space, settle=settle, about=self._about)
        if self._watcher.wants_roles:
            decision = decide()
            answer = self._watcher.emit(self._evaluation(readings, decision, space, timestep, doubled=doubled is not None), row)
            if answer is not None and decision.cond is not None and decision.uncond is not None:
                return self._change(answer, ways[decision.reading], (decision.cond, decision.uncond), target, variance)
        else:  # roles are decided when somebody asks: nothing here waits for the device
            first, second = readings[0].predictions[:2]
            self._watcher.emit(self._recorder.evaluation(first, second, space=space, roles="assumed", timestep=timestep), row)
        return None

    def _change(self, answer: Intervention, way: Cut, pair: tuple[int, int], target: Tensor, variance: Tensor | None) -> Tensor | None:
        """Do what was answered to an evaluation; what the scheduler is to be given instead, or None to leave it."""
        predictions = [prediction for *_, found in way for prediction in found]
        calls = [(call, reader) for call, reader, _, found in way for _ in found]
        (cond, uncond), (call, reader) = pair, calls[pair[0]]
        prediction = predictions[cond]
        if answer.embedding is not None and prediction.embedding is not None and prediction.path is not None and call.record is not None:
            repeats = len(embedding_of(call, prediction.path)) // call.record.batch  # the frames of a video
            substitute = Substitution(prediction.path, prediction.embedding, answer.embedding, answer.substituted, repeats=repeats)
            # Compared with None: a compiled module has no truth value.
            for denoiser in [found for reference in self._denoisers if (found := reference()) is not None]:
                self.changes.enter_context(
                    hook_arguments(denoiser, lambda args, kwargs: substitute(args, kwargs) if self._watcher.listening else (args, kwargs))
                )
        if answer.pred_cond is None:
            return None
        raw: dict[int, Tensor] = {}
        if answer.embedding is not None:
            try:
                raw = remade(way, cond, answer.embedding, also=variance is not None)
            except ReplayError as error:
                self._partial(f"what it predicts from the prompt a second time cannot be made anew ({error}), so the step keeps it")
        others = {number: reader.part(values) for number, values in raw.items() if number != cond}
        changed = repaired(target, predictions, cond, answer.pred_cond, reader, uncond=uncond, others=others)
        if changed is None:
            self._partial("it combines its predictions in a way that cannot be repaired after the fact, so this one step keeps its prediction")
            return None
        if variance is None:
            return changed
        values, moved = raw_output(call.output), (prediction.values != answer.pred_cond).flatten(1).any(1)
        old = variance[:0] if values is None else values[prediction.rows][:, target.shape[1] :]
        new = new_variance(variance, old, raw[cond][:, target.shape[1] :] if cond in raw else None, moved)
        if new is None:
            self._partial("the variance that its scheduler is given cannot be made anew, so this one step keeps it")
        return torch.cat([changed, variance if new is None else new], dim=1)

    def _partial(self, what: str) -> None:
        warnings.warn(f"{self._name}: {what}; the new embedding takes effect from the next step on", stacklevel=2)

    def _evaluation(self, readings: Sequence[Reading], decision: Decision, space: Space, timestep: Any, *, doubled: bool) -> Any:
        predictions = readings[decision.reading].predictions
        if decision.cond is None or decision.uncond is None:
            lone = predictions[0]
            if doubled:  # not doubled after all
                whole = torch.cat([prediction.values for prediction in predictions])
                text = torch.cat([p.embedding for p in predictions if p.embedding is not None]) if lone.embedding is not None else None
                lone = replace(lone, values=whole, embedding=text, rows=slice(0, len(whole)))
            evaluation = self._recorder.evaluation(lone, lone, space=space, roles=decision.roles, timestep=timestep)
            return replace(evaluation, pred_uncond=None)
        cond, uncond = predictions[decision.cond], predictions[decision.uncond]
        evaluation = self._recorder.evaluation(cond, uncond, space=space, roles=decision.roles, timestep=timestep)
        return replace(evaluation, replay=make_replay(evaluation.replay, cond, self._name), encode=self._encode)


def _settling(
    decide: Callable[[], Decision], numbers: Sequence[Numbers], *, samples: int, missing: Callable[[str], None], name: str, reason: str, remedy: str
) -> Callable[[Row], bool]:
    """What fills in a row once somebody asks. A row lives on with its trace, so this holds a few numbers and texts, and nothing of the run."""

    def settle(row: Row) -> bool:
        decision = decide()
        numbers[decision.reading].fill(row, decision)
        if decision.cond is None:
            row.samples = samples
            missing(f"{f'{name} {decision.reason}' if decision.reason else reason}. {decision.remedy or remedy}")
        return decision.final

    return settle


def _several(timestep: Any) -> bool:
    """Whether tokens or frames of a sample have times of their own, of which some are given and stand still (Wan 2.2 5B, Cosmos 2)."""
    return isinstance(timestep, Tensor) and timestep.ndim > 1 and timestep.shape[1:].numel() > 1


def _of_this_run(calls: Sequence[Call], scheduler: Any) -> list[Call]:
    """The calls made since the scheduler got its timesteps; those before belong to a run that broke off, or to an inversion.

    All of them where that does not show: a copied scheduler may have a copy of the timesteps.
    """
    timesteps = getattr(scheduler, "timesteps", None)
    fresh = [call for call in calls if any(clock is timesteps for clock in call.clocks)] if timesteps is not None else []
    return fresh or list(calls)
