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

from memhook.hooks import hook_arguments
from memhook.intervention import Substitution
from memhook.pairs import PairRecorder, Prediction, find_timestep
from memhook.tensors import row_hash
from memhook.trace import Row
from memhook_diffusers.calls import Call, Conditioning, cut, input_hashes, make_call, sample_hashes
from memhook_diffusers.evidence import Observation, observe
from memhook_diffusers.layout import Layout, Reading
from memhook_diffusers.outputs import Reader, readers
from memhook_diffusers.parts import space_of
from memhook_diffusers.repairs import repaired
from memhook_diffusers.replays import make_replay
from memhook_diffusers.roles import Decision

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from memhook.hookspecs import Watcher
    from memhook.intervention import Intervention
    from memhook.prediction import Space

_MOST = 8  # predictions of a step that are looked at, the last ones (Attend-and-Excite makes dozens of calls before)

_Cut = list[tuple[Call, Reader, Tensor, list[Prediction]]]


class Run:
    """What one watch makes of the calls that it sees."""

    def __init__(
        self, watcher: Watcher, *, name: str, denoisers: Sequence[nn.Module], why_missing: Callable[[dict[str, Any]], str], remedy: str
    ) -> None:
        self._watcher, self._name = watcher, name
        self._why_missing, self._remedy = why_missing, remedy
        self._denoisers = [weakref.ref(denoiser) for denoiser in denoisers]
        self.changes = contextlib.ExitStack()  # of the calls' arguments, once somebody intervened
        self._recorder = PairRecorder()
        self._conditioning = Conditioning()
        self._calls: deque[Call] = deque(maxlen=2 * _MOST)
        self._named: dict[str, Any] = {}  # what a guider was given, by name
        self._layouts: dict[Any, Layout] = {}
        self._recorded = False
        self._unread: tuple[int, ...] | None = None  # what a scheduler was given that no output has the form of
        self._timesteps: Any = None  # the scheduler's, weakly: another tensor means another run

    # ---- what the hooks report ------------------------------------------------------------------------------------

    def on_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A module was called."""
        if self._watcher.listening:
            call = make_call(module, args, kwargs, output, keep=self._watcher.wants_evaluations)
            if call is not None:
                self._calls.append(call)

    def on_guider(self, guider: Any, arguments: dict[str, Any]) -> None:  # noqa: ARG002 -- the form of a tap's listener
        """A guider is given its predictions by name."""
        if self._watcher.listening:
            self._named = arguments

    def on_step(self, scheduler: Any, arguments: dict[str, Any]) -> dict[str, Any] | None:
        """The scheduler is about to step; what it is to be given instead, where somebody intervened."""
        model_output = arguments.get("model_output")
        if not self._watcher.listening or not self._calls or not isinstance(model_output, Tensor) or model_output.ndim < 2:
            return None
        calls, named = list(self._calls), self._named
        self._calls.clear()
        self._named = {}
        target = _without_variance(model_output, arguments.get("sample")).detach()
        ways = _readings(calls, tuple(target.shape))
        if not ways:
            self._unread = tuple(target.shape)
            return None  # a step of something that was not watched (the sound track of LTX 2)
        self._recorded = True
        self._new_run(scheduler)
        used = [call for call, _, _, _ in ways[0]]
        seen = find_timestep(used[0].args, used[0].kwargs)
        timestep = seen if seen is not None else arguments.get("timestep")
        if any(call.changed for call in used):
            self._lone(ways[0], space_of(scheduler), timestep, f"{self._name} changed its predictions in place before they could be read")
            return None
        doubled = None
        count = sum(len(predictions) for *_, predictions in ways[0])
        if count == 1:
            halves = _halves(ways[0])
            if halves is None:
                self._lone(ways[0], space_of(scheduler), timestep, self._why_missing(used[-1].kwargs))
                return None
            ways, doubled, target = [halves], _equal_halves(target, halves[0][3]), target.chunk(2)[0]
        changed = self._evaluate(ways, target, space_of(scheduler), timestep, doubled=doubled, named=named)
        if changed is None:
            return None
        if doubled is not None:
            changed = torch.cat([changed, changed])
        if changed.shape != model_output.shape:  # a variance behind it stays
            changed = torch.cat([changed, model_output[:, changed.shape[1] :]], dim=1)
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

    def _new_run(self, scheduler: Any) -> None:
        timesteps = getattr(scheduler, "timesteps", None)
        if isinstance(timesteps, Tensor) and (self._timesteps is None or self._timesteps() is not timesteps):
            self._timesteps = weakref.ref(timesteps)
            self._layouts = {}

    def _lone(self, way: _Cut, space: Space, timestep: Any, reason: str) -> None:
        prediction = way[-1][3][-1]
        self._watcher.missing(f"{reason}. {self._remedy}")
        row = Row(None, timestep, shape=tuple(prediction.values.shape[1:]), space=space)
        evaluation = self._recorder.evaluation(prediction, prediction, space=space, roles="assumed", timestep=timestep)
        self._watcher.emit(replace(evaluation, pred_uncond=None), row)

    def _evaluate(
        self, ways: Sequence[_Cut], target: Tensor, space: Space, timestep: Any, *, doubled: Tensor | None, named: dict[str, Any]
    ) -> Tensor | None:
        readings = [self._reading(way) for way in ways]
        key = (doubled is not None, *((id(call.module), len(predictions)) for call, _, _, predictions in ways[0]))
        layout = self._layouts.setdefault(key, Layout(_prior(ways[0])))
        matched = _matched(ways[0], named)
        if matched is None and layout.wants_observation():
            layout.observe([_observe(way, reading, target) for way, reading in zip(ways, readings, strict=True)], doubled)
        decide = layout.decide if matched is None else lambda: matched
        numbers = [reading.numbers() for reading in readings]
        lone_samples = 2 * numbers[0].samples if doubled is not None else numbers[0].samples
        lone_reason = self._why_missing(ways[0][-1][0].kwargs)

        def settle(row: Row) -> bool:
            decision = decide()
            numbers[decision.reading].fill(row, decision)
            if decision.cond is None:
                row.samples = lone_samples
                self._watcher.missing(f"{f'{self._name} {decision.reason}' if decision.reason else lone_reason}. {self._remedy}")
            return decision.final

        values = readings[0].predictions[0].values
        row = Row(None, timestep, shape=tuple(values.shape[1:]), space=space, settle=settle)
        if self._watcher.wants_evaluations:
            decision = decide()
            answer = self._watcher.emit(self._evaluation(readings, decision, space, timestep, doubled=doubled is not None), row)
            if answer is not None and decision.cond is not None:
                return self._change(answer, ways[decision.reading], readings[decision.reading].predictions, decision.cond, target)
        else:  # roles are decided when somebody asks: nothing here waits for the device
            first, second = readings[0].predictions[:2]
            self._watcher.emit(self._recorder.evaluation(first, second, space=space, roles="assumed", timestep=timestep), row)
        return None

    def _change(self, answer: Intervention, way: _Cut, predictions: list[Prediction], cond: int, target: Tensor) -> Tensor | None:
        """Do what was answered to an evaluation; what the scheduler is to be given instead, or None to leave it."""
        calls = [(call, reader) for call, reader, _, found in way for _ in found]
        (call, reader), prediction = calls[cond], predictions[cond]
        if answer.embedding is not None and prediction.embedding is not None and prediction.path is not None and call.record is not None:
            repeats = len(_embedding_of(call, prediction.path)) // call.record.batch  # the frames of a video
            substitute = Substitution(prediction.path, prediction.embedding, answer.embedding, answer.substituted, repeats=repeats)
            for denoiser in filter(None, (reference() for reference in self._denoisers)):
                self.changes.enter_context(
                    hook_arguments(denoiser, lambda args, kwargs: substitute(args, kwargs) if self._watcher.listening else (args, kwargs))
                )
        if answer.pred_cond is None:
            return None
        changed = repaired(target, predictions, cond, answer.pred_cond, reader)
        if changed is None:
            warnings.warn(
                f"{self._name} combines its predictions in a way that cannot be repaired after the fact, so this one step keeps its "
                "prediction; the new embedding takes effect from the next step on",
                stacklevel=2,
            )
        return changed

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
        return replace(evaluation, replay=make_replay(evaluation.replay, cond, self._name))

    def _reading(self, way: _Cut) -> Reading:
        predictions = [prediction for *_, found in way for prediction in found]
        text = None
        if all(prediction.embedding is not None for prediction in predictions):
            hashes = []
            for number, (call, _, values, found) in enumerate(way):
                path = found[0].path or ()
                whole = _embedding_of(call, path)
                if not isinstance(whole, Tensor) or whole.shape[0] != values.shape[0]:
                    hashes += [row_hash(prediction.embedding) for prediction in found if prediction.embedding is not None]
                else:
                    whole_hashes = self._conditioning.of(whole, (number, *path))
                    hashes += [whole_hashes[prediction.rows] for prediction in found]
            text = torch.stack(hashes)
        return Reading(predictions, text)


def _embedding_of(call: Call, path: tuple[int | str, ...]) -> Any:
    from memhook.replay import look_up

    return look_up(call.args, call.kwargs, path) if path else None


def _without_variance(model_output: Tensor, sample: Any) -> Tensor:
    """What the scheduler is given, without the half that is a variance (DeepFloyd IF, Kandinsky 2)."""
    if isinstance(sample, Tensor) and sample.ndim == model_output.ndim and sample.ndim > 2:
        doubled = (sample.shape[0], 2 * sample.shape[1], *sample.shape[2:])
        if tuple(model_output.shape) == doubled:
            return model_output[:, : sample.shape[1]]
    return model_output


def _readings(calls: Sequence[Call], shape: tuple[int, ...]) -> list[_Cut]:
    """The calls that predicted, cut into predictions, in every way in which they can be read."""
    found = [(call, options) for call in calls if (options := readers(call.output, shape))]
    best = min((options[0].doubt for _, options in found), default=0)
    predicting = {id(call.module) for call, options in found if options[0].doubt == best}  # not a text encoder of a like shape
    found = [(call, options) for call, options in found if id(call.module) in predicting]
    ways = []
    for index in range(min((len(options) for _, options in found), default=0)):
        way: _Cut = []
        for call, options in found:
            values = options[index](call.output).detach()
            way.append((call, options[index], values, cut(call, options[index], values)))
        while len(way) > 1 and sum(len(predictions) for *_, predictions in way) > _MOST:
            way.pop(0)
        ways.append(way)
    return ways


def _halves(way: _Cut) -> _Cut | None:
    """A lone prediction of an even batch as two of half the samples: DiT steps a doubled batch."""
    call, reader, values, _ = way[0]
    if values.shape[0] % 2:
        return None
    half = replace(reader, samples=values.shape[0] // 2)
    return [(call, half, values, cut(call, half, values))]


def _equal_halves(model_output: Tensor, halves: Sequence[Prediction]) -> Tensor:
    """``()`` bool on the device: the two halves of what the scheduler is given are one, and so are the noisy samples."""
    equal = torch.stack([part.eq(other).all() for part, other in [model_output.chunk(2)]]).all()
    first, second = (half.sample for half in halves)
    if first is not None and second is not None and first.is_floating_point():
        equal = equal & first.eq(second).all()
    return equal


def _prior(way: _Cut) -> tuple[int, int] | None:
    """``(cond, uncond)`` by diffusers' habit: batched calls put the unconditional half first, separate calls make it second."""
    if sum(len(predictions) for *_, predictions in way) != 2 or way[0][1].form == "unknown":
        return None
    return (1, 0) if len(way) == 1 else (0, 1)


def _matched(way: _Cut, named: dict[str, Any]) -> Decision | None:
    """The pair that a guider was given by name, if its tensors are the predictions themselves."""
    sources = [call.source[prediction.rows] for call, _, _, found in way for prediction in found if call.source.ndim]

    def find(name: str) -> int | None:
        given = named.get(name)
        if not isinstance(given, Tensor):
            return None
        return next((index for index, source in enumerate(sources) if source.data_ptr() == given.data_ptr() and source.shape == given.shape), None)

    cond, uncond = find("pred_cond"), find("pred_uncond")
    if cond is None:
        return None
    if uncond is None:
        if named.get("pred_uncond") is not None:
            return None
        return Decision(reason="has a guider that was given no unconditional prediction")
    return Decision(0, cond, uncond, "matched")


def _observe(way: _Cut, reading: Reading, target: Tensor) -> Observation:
    inputs, modules = [], []
    for call, _, values, found in way:
        hashes = input_hashes(call, values.shape[0], alone=len(found) == 1)
        inputs += [hashes[prediction.rows] for prediction in found]
        modules += [id(call.module)] * len(found)
    stacked = torch.stack(inputs)
    samples, whole = (sample_hashes(reading.predictions, whole=flag) for flag in (False, True))
    text = stacked if reading.text is None else reading.text
    return observe(
        reading.predictions,
        target,
        reader=way[0][1],
        inputs=stacked,
        text=text,
        samples=samples,
        whole_samples=whole,
        modules=tuple(modules),
    )
