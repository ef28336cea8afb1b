"""The adapter for a bare denoiser: any `torch.nn.Module` that is called with guided batches."""

from __future__ import annotations

import contextlib
import weakref
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from memhook.adapting.arguments import hook_calls_as_made
from memhook.adapting.call_setting import adapter_scale, at_call
from memhook.adapting.fingerprint import Fingerprinted
from memhook.adapting.hooks import Replaced, hook_arguments
from memhook.adapting.module_calls import Layout, Moment, Plan, held, read_layout
from memhook.adapting.pairs import PairRecorder, Prediction, find_sample, find_timestep, read_output, same_samples, split_call
from memhook.adapting.replay import look_up
from memhook.adapting.substitution import Substitution, replace_prediction
from memhook.adapting.whole_batch import RowsOrWhole
from memhook.capture.prediction import SPACES, Space
from memhook.capture.trace import Row
from memhook.errors import GuidanceLayoutError, MemhookError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from memhook.adapting.replay import Path
    from memhook.capture.intervention import Intervention
    from memhook.capture.prediction import Evaluation
    from memhook.hookspecs import Watcher

_OFF = "guidance may be off (use a scale above 1)"


class ModuleAdapter:
    """Watch a bare UNet or DiT whose guided calls have a declared layout.

    * The module is called as ``module(sample, timestep, embedding, ...)`` or with keywords, and returns a tensor, a tuple
      that begins with one, or an object with ``.sample``, of shape ``(batch, ...)``.
    * ``layout`` says what a guided evaluation is: one call on a batch of ``2 b`` rows, whose first half is unconditional
      (``"uncond_first"``) or conditional (``"cond_first"``); or two calls on ``b`` rows each, in the order named.
      With more predictions in the batch it is their roles in order, such as ``("uncond", "cond", "perturbed")``: the magnitude is
      that of ``cond`` and ``uncond``, and the others may have any name. Where several have no text, call that one ``uncond`` which
      differs from ``cond`` in the text alone: for InstructPix2Pix ``("cond", "uncond", "neither")``.
    * Where the output has twice the sample's channels, the second half of them is a learned variance (as in DiT), and no
      part of the prediction.
    * Guidance may be off for a part of a run; those evaluations are missing (NaN). The calls of runs with different numbers
      of samples cannot always be told apart: watch each such run in a block of its own.

    Args:
        module: The denoiser; not kept alive by the adapter.
        layout: How guided calls are laid out.
        embedding: Where the text embedding stands among the arguments: a keyword, a position, or a tuple of keys into
            nested arguments, such as ``("conditioning", "text")``. Found by its usual names where None.
        space: What the module predicts.

    >>> import torch, memhook
    >>> from memhook.testing import tiny_unet, sample
    >>> unet = tiny_unet()
    >>> adapter = memhook.ModuleAdapter(unet, layout="uncond_first")
    >>> with memhook.watch(unet, adapter=adapter) as trace:
    ...     latents = sample(unet, steps=4, samples=2)
    >>> trace.magnitudes.shape
    (4, 2)
    """

    host = "module"
    intervenes = True

    def __init__(self, module: nn.Module, *, layout: Layout | Sequence[str], embedding: str | int | Path | None = None, space: Space = "eps") -> None:
        if not isinstance(module, nn.Module):
            raise MemhookError(f"the denoiser is a {type(module).__name__}; expected the torch.nn.Module that the sampler calls")
        plan = read_layout(layout)
        if space not in SPACES:
            raise MemhookError(f"space is {space!r}; expected one of {', '.join(SPACES)}")
        if isinstance(module, nn.DataParallel):
            raise MemhookError(
                "a DataParallel module runs its replicas in other threads, where calls cannot be assigned to a watch; "
                "watch module.module on one device"
            )
        self._module = weakref.ref(module)
        self._fingerprint = Fingerprinted({"model": module})
        self._plan = plan
        self._path: Path | None = embedding if isinstance(embedding, tuple) or embedding is None else (embedding,)
        self._space: Space = space

    @contextlib.contextmanager
    def attach(self, watcher: Watcher) -> Iterator[None]:
        module = self._module()
        if module is None:
            raise MemhookError("the module of this adapter was deleted before it was watched; make an adapter for the module that runs")
        run = _Run(watcher, plan=self._plan, path=self._path, space=self._space)
        with contextlib.closing(run.changes), hook_calls_as_made(module, run.on_call, keep=run.keeps):
            del module  # the block must not keep it alive
            yield
        run.end()

    def describe(self) -> Mapping[str, Any]:
        return self._fingerprint.describe()

    def snapshot(self) -> Callable[[], Mapping[str, Any]]:
        """What `describe` says now, to be read later."""
        return self._fingerprint.snapshot()


class _Run:
    """Makes evaluations of the calls inside one watch."""

    def __init__(self, watcher: Watcher, *, plan: Plan, path: Path | None, space: Space) -> None:
        self._watcher, self._plan, self._path, self._space = watcher, plan, path, space
        self._recorder = PairRecorder()
        self._about: Callable[[], Mapping[str, Any]] | None = None  # what the first call showed of the setting
        self._scale = 1.0  # of adapters in it
        self._samples: int | None = None  # of the latest guided evaluation
        self._waiting: tuple[Prediction, Moment, Tensor] | None = None  # the first of two calls, and what the sampler has of it
        self.changes = contextlib.ExitStack()  # of the calls' arguments, once somebody intervened
        self._one_sample: bool | None = None  # whether both calls of all pairs so far were given one and the same tensor

    def on_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Replaced | None:
        if not self._watcher.listening:
            return None
        timestep, sample = find_timestep(args, kwargs), find_sample(args, kwargs)
        values = read_output(output)
        channels = _channels(values, sample)

        def split(chunks: int) -> list[Prediction]:
            keep = self._watcher.wants_evaluations
            return split_call(module, args, kwargs, output, chunks=chunks, keep=keep, path=self._path, channels=channels)

        scale = adapter_scale(kwargs)
        if self._about is None or scale != self._scale:
            self._about, self._scale = at_call({"model": module}, {type(module).__name__: kwargs}), scale
        batch, count, answer = values.shape[0], self._plan.count, None
        if self._plan.separate:
            answer = self._one_of_two(split(1)[0], Moment.of(sample, timestep), values)
        elif batch % count:
            self._does_not_divide(split(1)[0], timestep)
        elif batch == self._samples:
            self._as_many_as_samples(split(1)[0], split(count), timestep)
        else:
            answer = self._guided(split(count), timestep)
        return None if answer is None else self._change(module, answer, output, values)

    def keeps(self) -> bool:
        """Whether the call that is about to be made will be kept, with its tensors."""
        return self._watcher.listening and self._watcher.wants_evaluations

    def end(self) -> None:
        """The block ended normally."""
        if self._waiting is not None:
            self._stood_alone(*self._waiting[:2])

    def _guided(self, predictions: Sequence[Prediction], timestep: Tensor | float | None, earlier: Tensor | None = None) -> _Answer | None:
        cond, uncond = self._plan.pair(predictions)
        row = self._recorder.row(cond, uncond, timestep=timestep)
        row.about = self._about
        self._samples = cond.values.shape[0]
        if self._watcher.wants_roles and row.same_inputs is not None and not bool(row.same_inputs.all()):
            raise GuidanceLayoutError(
                f"the two predictions of {self._samples} samples were made from different noisy samples (outputs of shapes "
                f"{_shapes(cond, uncond)}); layout={self._plan.name} does not fit the calls, or {_OFF}"
            )
        intervention = self._watcher.emit(self._evaluation(cond, uncond, timestep), row)
        return None if intervention is None else _Answer(intervention, cond, earlier if cond is predictions[0] else None)

    def _evaluation(self, cond: Prediction, uncond: Prediction, timestep: Tensor | float | None) -> Evaluation:
        evaluation = self._recorder.evaluation(cond, uncond, space=self._space, roles="declared", timestep=timestep)
        call, path = cond.call, cond.path
        if self._plan.count == 2 or evaluation.replay is None or call is None or path is None:
            return evaluation
        return replace(evaluation, replay=RowsOrWhole(evaluation.replay, cond, lambda: look_up(call.args, call.kwargs, path)))

    def _change(self, module: nn.Module, answer: _Answer, output: Any, values: Tensor) -> Replaced | None:
        """Do what was answered to the evaluation that this call completes."""
        intervention, cond = answer.intervention, answer.cond
        if intervention.embedding is not None and cond.embedding is not None and cond.path is not None:
            substitute = Substitution(cond.path, cond.embedding, intervention.embedding, intervention.substituted)
            self.changes.enter_context(
                hook_arguments(module, lambda args, kwargs: substitute(args, kwargs) if self._watcher.listening else (args, kwargs))
            )
        if intervention.pred_cond is None:
            return None
        if answer.earlier is not None:
            # The sampler has the conditional prediction already; its memory is all that can still be reached.
            _write(answer.earlier, slice(None), intervention.pred_cond)
            return None
        changed = values.clone()
        _write(changed, cond.rows, intervention.pred_cond)
        return Replaced(replace_prediction(output, values, changed))

    def _unguided(self, prediction: Prediction, timestep: Tensor | float | None, reason: str, refuted: tuple[Tensor, str] | None = None) -> None:
        if refuted is not None and self._watcher.wants_roles and bool(refuted[0]):
            raise GuidanceLayoutError(refuted[1])
        self._watcher.missing(reason)
        evaluation = self._recorder.evaluation(prediction, prediction, space=self._space, roles="declared", timestep=timestep)
        row = Row(None, timestep, shape=tuple(prediction.values.shape[1:]), refuted=refuted, about=self._about)
        self._watcher.emit(replace(evaluation, pred_uncond=None), row)

    def _does_not_divide(self, whole: Prediction, timestep: Tensor | float | None) -> None:
        """A batch that cannot be cut as declared: without guidance, or of another layout."""
        shape, count, refuted = tuple(whole.values.shape), self._plan.count, None
        seen = f"the denoiser was given a batch of {shape[0]} rows (its output has the shape {shape})"
        if count > 2 and self._samples is not None and shape[0] > self._samples and shape[0] % self._samples == 0:
            message = (
                f"{seen} after guided ones of {count * self._samples}, so some of the {count} predictions of layout={self._plan.name} are not made "
                "any more, and which does not show. Watch that part of the run in a block of its own, with the layout that it has"
            )
            refuted = torch.ones((), dtype=torch.bool, device=whole.values.device), message
        reason = f"{seen}, where layout={self._plan.name} expects {count} equal parts: {_OFF}"
        self._unguided(whole, timestep, f'{reason}, or the host makes two calls (layout="two_calls_cond_first" or the like)', refuted)

    def _as_many_as_samples(self, whole: Prediction, parts: Sequence[Prediction], timestep: Tensor | float | None) -> None:
        """A batch of as many rows as there were samples before: guidance was switched off, unless its parts are equal."""
        batch, count, refuted = whole.values.shape[0], self._plan.count, None
        equal = [same.all() for part in parts[1:] if (same := same_samples(parts[0], part)) is not None]
        if equal:
            message = (
                f"a batch of {batch} rows came after guided ones of {count * batch}, so it was taken for {batch} samples without guidance; yet its "
                f"{'halves' if count == 2 else 'parts'} are equal, as of a guided run of {batch // count} samples. Watch runs with other numbers "
                "of samples in blocks of their own"
            )
            refuted = torch.stack(equal).all(), message
        self._unguided(whole, timestep, f"the denoiser was called without an unconditional part: {_OFF}", refuted)

    def _one_of_two(self, prediction: Prediction, moment: Moment, values: Tensor) -> _Answer | None:
        if self._waiting is not None and self._another_evaluation(*self._waiting[:2], prediction, moment):
            self._stood_alone(*self._waiting[:2], prediction)
            self._waiting = None
        if self._waiting is None:
            self._waiting = held(prediction), moment, values
            return None
        (first, began, earlier), self._waiting = self._waiting, None
        self._one_sample = moment.same_sample(began) and self._one_sample is not False
        return self._guided((first, prediction), moment.timestep, earlier)

    def _another_evaluation(self, first: Prediction, began: Moment, prediction: Prediction, moment: Moment) -> bool:
        """Whether a call cannot belong with the one before it, as far as can be told without waiting for the device."""
        if first.values.shape != prediction.values.shape:
            return True
        if began.level is not None and moment.level is not None and began.level != moment.level:
            return True
        return bool(self._one_sample) and not moment.same_sample(began)

    def _stood_alone(self, first: Prediction, began: Moment, following: Prediction | None = None) -> None:
        unlike = following is not None and following.values.shape != first.values.shape
        shapes = f" (it and the next one gave the shapes {_shapes(first, following)})" if following is not None and unlike else ""
        reason = f"a call of the denoiser stood alone{shapes}, where layout={self._plan.name} expects pairs: {_OFF}"
        self._unguided(first, began.timestep, f'{reason}, or the host batches both halves (layout="uncond_first" or "cond_first")')


@dataclass(frozen=True, eq=False)
class _Answer:
    """An intervention, and where it acts."""

    intervention: Intervention
    cond: Prediction
    earlier: Tensor | None  # the output of the first of two calls, where that was the conditional one


def _shapes(*predictions: Prediction) -> str:
    return " and ".join(str(tuple(prediction.values.shape)) for prediction in predictions)


def _write(values: Tensor, rows: slice, prediction: Tensor) -> None:
    """Put a prediction in the place of these rows; a learned variance behind it stays."""
    place = values[rows]
    (place if place.shape == prediction.shape else place[:, : prediction.shape[1]]).copy_(prediction)


def _channels(values: Tensor, sample: Tensor | None) -> int | None:
    """How many of the channels are the prediction; None for all."""
    if sample is None or values.ndim != sample.ndim or values.ndim < 3:
        return None
    count = sample.shape[1]
    same_elsewhere = values.shape[:1] + values.shape[2:] == sample.shape[:1] + sample.shape[2:]
    return count if same_elsewhere and values.shape[1] == 2 * count else None
