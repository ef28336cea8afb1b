"""Watching a diffusers pipeline: the calls of its denoiser, and what it makes of them for its scheduler."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from memhook.errors import GuidanceLayoutError, NoAdapterError
from memhook.fingerprint import Fingerprinted
from memhook.hooks import hook_calls
from memhook.hookspecs import Watcher
from memhook.pairs import PairRecorder, Prediction, find_timestep, read_output, same_samples, split_call
from memhook.prediction import Roles, Space
from memhook.trace import Evidence, Row
from memhook_diffusers.arithmetic import guidance_evidence
from memhook_diffusers.steps import listen_to_steps
from torch import Tensor, nn

_SPACES: dict[str, Space] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0", "flow_prediction": "flow"}
_DENOISERS = ("unet", "transformer")
_TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
_FITS = 4  # evaluations whose arithmetic is looked at; the first that can tell decides


class DiffusersAdapter:
    """Watch a pipeline that guides in one batched call or in two calls per scheduler step."""

    host = "diffusers"

    def __init__(self, pipeline: Any) -> None:
        name = next((name for name in _DENOISERS if isinstance(getattr(pipeline, name, None), nn.Module)), None)
        if name is None:
            raise NoAdapterError(
                f"{type(pipeline).__name__} has no component named {' or '.join(_DENOISERS)}, so there is no denoiser to watch; "
                "hook it with memhook.ModuleAdapter instead"
            )
        second = getattr(pipeline, f"{name}_2", None)
        if isinstance(second, nn.Module):
            raise NoAdapterError(f"{type(pipeline).__name__} has two denoisers, {name} and {name}_2, which is not supported yet; watch each with memhook.ModuleAdapter")
        self._pipeline = weakref.ref(pipeline)
        self._denoiser = name
        encoders = {name: encoder for name in _TEXT_ENCODERS if isinstance(encoder := getattr(pipeline, name, None), nn.Module)}
        self._fingerprint = Fingerprinted({"model": getattr(pipeline, name), **encoders})
        self._sampler = type(pipeline.scheduler).__name__

    def describe(self) -> Mapping[str, Any]:
        return {**self._fingerprint.describe(), "sampler": self._sampler}

    @contextlib.contextmanager
    def attach(self, watcher: Watcher) -> Iterator[None]:
        pipeline = self._pipeline()
        if pipeline is None:
            raise NoAdapterError("the pipeline was deleted before it was watched")
        run = _Run(watcher, space=_space(pipeline.scheduler), name=type(pipeline).__name__)
        denoiser, scheduler = getattr(pipeline, self._denoiser), pipeline.scheduler
        del pipeline  # the block must not keep it alive
        with hook_calls(denoiser, run.on_call), listen_to_steps(scheduler, run.on_step):
            yield


def _space(scheduler: Any) -> Space:
    kind = getattr(scheduler.config, "prediction_type", None)
    if kind in _SPACES:
        return _SPACES[kind]
    return "flow" if "FlowMatch" in type(scheduler).__name__ else "eps"


class _Run:
    """Gathers the denoiser's calls up to each scheduler step and makes one evaluation of them."""

    def __init__(self, watcher: Watcher, *, space: Space, name: str) -> None:
        self._watcher, self._space, self._name = watcher, space, name
        self._recorder = PairRecorder()
        self._calls: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any], Any]] = []
        self._fits = 0
        self._first_is_cond: bool | None = None  # once decided

    def on_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._watcher.listening:
            self._calls.append((module, args, kwargs, output))

    def on_step(self, model_output: Any, timestep: Any) -> None:
        if not self._watcher.listening or not self._calls:
            return
        calls, self._calls = self._calls, []
        predictions = [prediction for call in calls for prediction in self._split(call, model_output)]
        seen = find_timestep(calls[0][1], calls[0][2])
        timestep = seen if seen is not None else timestep
        if len(predictions) == 1:
            self._unguided(predictions[0], timestep)
        elif len(predictions) == 2:
            self._guided(predictions[0], predictions[1], model_output, timestep, batched=len(calls) == 1)
        else:
            raise GuidanceLayoutError(
                f"{self._name} makes {len(predictions)} predictions of {model_output.shape[0]} samples in {len(calls)} calls per step; "
                "only pipelines that make one conditional and one unconditional prediction are supported yet. Turn off perturbed-attention, "
                "image or skip-layer guidance, or watch the denoiser with memhook.ModuleAdapter"
            )

    def _split(self, call: tuple[nn.Module, tuple[Any, ...], dict[str, Any], Any], model_output: Tensor) -> list[Prediction]:
        module, args, kwargs, output = call
        values = read_output(output)
        batch, samples = values.shape[0], model_output.shape[0]
        if batch % samples != 0:
            raise GuidanceLayoutError(f"{self._name}'s denoiser returned a batch of {batch} for {samples} samples given to its scheduler; expected a multiple")
        channels = model_output.shape[1] if values.ndim > 1 and values.shape[1] == 2 * model_output.shape[1] else None  # learned variance
        return split_call(module, args, kwargs, output, chunks=batch // samples, keep=self._watcher.wants_evaluations, channels=channels)

    def _guided(self, first: Prediction, second: Prediction, model_output: Tensor, timestep: Any, *, batched: bool) -> None:
        if first.values.shape != model_output.shape or second.values.shape != model_output.shape:
            raise GuidanceLayoutError(
                f"{self._name} made predictions of shapes {tuple(first.values.shape)} and {tuple(second.values.shape)}, but gave its scheduler {tuple(model_output.shape)}"
            )
        evidence = None
        if self._first_is_cond is None and self._fits < _FITS:
            self._fits += 1
            evidence = guidance_evidence(first.values, second.values, model_output)
        row = self._recorder.row(first, second, timestep=timestep, evidence=evidence)
        first_is_cond, roles = self._roles(evidence, batched=batched)
        cond, uncond = (first, second) if first_is_cond else (second, first)
        self._watcher.emit(self._recorder.evaluation(cond, uncond, space=self._space, roles=roles, timestep=timestep), row)

    def _roles(self, evidence: Evidence | None, *, batched: bool) -> tuple[bool, Roles]:
        """Decide now only if evaluations are wanted: reading the evidence waits for the device, once a run."""
        if self._watcher.wants_evaluations and evidence is not None:
            self._first_is_cond, _ = evidence.decide()
        if self._first_is_cond is not None:
            return self._first_is_cond, "fitted"
        return not batched, "assumed"  # diffusers' habit: batched calls put the unconditional half first

    def _unguided(self, prediction: Prediction, timestep: Any) -> None:
        self._watcher.missing(f"{self._name} made no unconditional prediction: guidance is off (guidance_scale of 1 or less), or the model is guidance-distilled")
        row = Row(None, timestep, shape=tuple(prediction.values.shape[1:]), doubled=_doubled(prediction))
        evaluation = self._recorder.evaluation(prediction, prediction, space=self._space, roles="assumed", timestep=timestep)
        self._watcher.emit(replace(evaluation, pred_uncond=None), row)


def _doubled(prediction: Prediction) -> Tensor | None:
    """Whether the pipeline steps a doubled batch (DiT): a lone prediction of a batch with two equal halves."""
    samples = prediction.values.shape[0]
    if prediction.sample is None or samples % 2:
        return None
    halves = [replace(prediction, values=part, sample=sample) for part, sample in zip(prediction.values.chunk(2), prediction.sample.chunk(2), strict=True)]
    same = same_samples(halves[0], halves[1])
    return None if same is None else same.all()
