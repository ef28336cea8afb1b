"""The adapter for a bare denoiser: any `torch.nn.Module` that is called with guided batches."""

from __future__ import annotations

import contextlib
import weakref
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import Tensor, nn

from memhook.errors import GuidanceLayoutError, MemhookError
from memhook.fingerprint import Fingerprinted
from memhook.hooks import Replaced, hook_arguments, hook_calls
from memhook.intervention import Intervention, Substitution, replace_prediction
from memhook.pairs import PairRecorder, Prediction, find_sample, find_timestep, read_output, same_samples, split_call
from memhook.prediction import SPACES, Space
from memhook.tensors import copy_of, version
from memhook.trace import Row

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from memhook.hookspecs import Watcher
    from memhook.replay import Path

Layout = Literal["uncond_first", "cond_first", "two_calls_uncond_first", "two_calls_cond_first"]
_UNCOND_FIRST = ("uncond_first", "two_calls_uncond_first")
_OFF = "guidance may be off (use a scale above 1)"


class ModuleAdapter:
    """Watch a bare UNet or DiT whose guided calls have a declared layout.

    * The module is called as ``module(sample, timestep, embedding, ...)`` or with keywords, and returns a tensor, a tuple
      that begins with one, or an object with ``.sample``, of shape ``(batch, ...)``.
    * ``layout`` says what a guided evaluation is: one call on a batch of ``2 b`` rows, whose first half is unconditional
      (``"uncond_first"``) or conditional (``"cond_first"``); or two calls on ``b`` rows each, in the order named.
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

    def __init__(self, module: nn.Module, *, layout: Layout, embedding: str | int | Path | None = None, space: Space = "eps") -> None:
        if not isinstance(module, nn.Module):
            raise MemhookError(f"the denoiser is a {type(module).__name__}; expected the torch.nn.Module that the sampler calls")
        if layout not in get_args(Layout):
            raise MemhookError(f"layout is {layout!r}; expected one of {', '.join(get_args(Layout))}")
        if space not in SPACES:
            raise MemhookError(f"space is {space!r}; expected one of {', '.join(SPACES)}")
        if isinstance(module, nn.DataParallel):
            raise MemhookError(
                "a DataParallel module runs its replicas in other threads, where calls cannot be assigned to a watch; "
                "watch module.module on one device"
            )
        self._module = weakref.ref(module)
        self._fingerprint = Fingerprinted({"model": module})
        self._layout: Layout = layout
        self._path: Path | None = embedding if isinstance(embedding, tuple) or embedding is None else (embedding,)
        self._space: Space = space

    @contextlib.contextmanager
    def attach(self, watcher: Watcher) -> Iterator[None]:
        module = self._module()
        if module is None:
            raise MemhookError("the module of this adapter was deleted before it was watched; make an adapter for the module that runs")
        run = _Run(watcher, layout=self._layout, path=self._path, space=self._space)
        with contextlib.closing(run.changes), hook_calls(module, run.on_call):
            del module  # the block must not keep it alive
            yield
        run.end()

    def describe(self) -> Mapping[str, Any]:
        return self._fingerprint.describe()


class _Run:
    """Makes evaluations of the calls inside one watch."""

    def __init__(self, watcher: Watcher, *, layout: Layout, path: Path | None, space: Space) -> None:
        self._watcher, self._layout, self._path, self._space = watcher, layout, path, space
        self._recorder = PairRecorder()
        self._samples: int | None = None  # of the latest guided evaluation
        self._waiting: tuple[Prediction, _Moment, Tensor] | None = None  # the first of two calls, and what the sampler has of it
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

        answer = None
        if self._layout.startswith("two_calls"):
            answer = self._one_of_two(split(1)[0], _Moment.of(sample, timestep), values)
        elif values.shape[0] % 2:
            reason = f"the denoiser was given a batch of {values.shape[0]}, where layout={self._layout!r} expects two halves: {_OFF}"
            self._unguided(split(1)[0], timestep, f'{reason}, or the host makes two calls (layout="two_calls_cond_first" or the like)')
        elif values.shape[0] == self._samples:
            self._as_many_as_samples(split(1)[0], split(2), timestep)
        else:
            first, second = split(2)
            answer = self._guided(first, second, timestep)
        return None if answer is None else self._change(module, answer, output, values)

    def end(self) -> None:
        """The block ended normally."""
        if self._waiting is not None:
            self._stood_alone(*self._waiting[:2])

    def _guided(self, first: Prediction, second: Prediction, timestep: Tensor | float | None, earlier: Tensor | None = None) -> _Answer | None:
        cond, uncond = (second, first) if self._layout in _UNCOND_FIRST else (first, second)
        row = self._recorder.row(cond, uncond, timestep=timestep)
        self._samples = cond.values.shape[0]
        if self._watcher.wants_evaluations and row.same_inputs is not None and not bool(row.same_inputs.all()):
            raise GuidanceLayoutError(
                f"the two predictions of {self._samples} samples were made from different noisy samples; layout={self._layout!r} does not fit "
                "the calls, or guidance is off (use a scale above 1)"
            )
        intervention = self._watcher.emit(self._recorder.evaluation(cond, uncond, space=self._space, roles="declared", timestep=timestep), row)
        return None if intervention is None else _Answer(intervention, cond, earlier if cond is first else None)

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
        self._watcher.missing(reason)
        evaluation = self._recorder.evaluation(prediction, prediction, space=self._space, roles="declared", timestep=timestep)
        row = Row(None, timestep, shape=tuple(prediction.values.shape[1:]), refuted=refuted)
        self._watcher.emit(replace(evaluation, pred_uncond=None), row)

    def _as_many_as_samples(self, whole: Prediction, halves: list[Prediction], timestep: Tensor | float | None) -> None:
        """A batch of as many rows as there were samples before: guidance was switched off, unless its halves are equal."""
        doubled, refuted = same_samples(*halves), None
        if doubled is not None:
            batch = whole.values.shape[0]
            message = (
                f"a batch of {batch} rows came after guided ones of {2 * batch}, so it was taken for {batch} samples without guidance; yet its "
                f"halves are equal, as of a guided run of {batch // 2} samples. Watch runs with other numbers of samples in blocks of their own"
            )
            refuted = doubled.all(), message
            if self._watcher.wants_evaluations and bool(refuted[0]):
                raise GuidanceLayoutError(message)
        self._unguided(whole, timestep, f"the denoiser was called without an unconditional half: {_OFF}", refuted)

    def _one_of_two(self, prediction: Prediction, moment: _Moment, values: Tensor) -> _Answer | None:
        if self._waiting is not None and self._another_evaluation(*self._waiting[:2], prediction, moment):
            self._stood_alone(*self._waiting[:2])
            self._waiting = None
        if self._waiting is None:
            self._waiting = _held(prediction), moment, values
            return None
        (first, began, earlier), self._waiting = self._waiting, None
        self._one_sample = moment.same_sample(began) and self._one_sample is not False
        return self._guided(first, prediction, moment.timestep, earlier)

    def _another_evaluation(self, first: Prediction, began: _Moment, prediction: Prediction, moment: _Moment) -> bool:
        """Whether a call cannot belong with the one before it, as far as can be told without waiting for the device."""
        if first.values.shape != prediction.values.shape:
            return True
        if began.level is not None and moment.level is not None and began.level != moment.level:
            return True
        return bool(self._one_sample) and not moment.same_sample(began)

    def _stood_alone(self, first: Prediction, began: _Moment) -> None:
        reason = f"a call of the denoiser stood alone, where layout={self._layout!r} expects pairs: {_OFF}"
        self._unguided(first, began.timestep, f'{reason}, or the host batches both halves (layout="uncond_first" or "cond_first")')


@dataclass(frozen=True, eq=False)
class _Answer:
    """An intervention, and where it acts."""

    intervention: Intervention
    cond: Prediction
    earlier: Tensor | None  # the output of the first of two calls, where that was the conditional one


@dataclass(frozen=True, eq=False)
class _Moment:
    """What tells the calls of one evaluation from those of the next, read without waiting for the device."""

    timestep: Tensor | float | None
    level: float | None  # the timestep as a number, where that is known
    sample: weakref.ref[Tensor] | None
    version: int | None

    @staticmethod
    def of(sample: Tensor | None, timestep: Tensor | float | None) -> _Moment:
        level = None
        if isinstance(timestep, Tensor):
            timestep = timestep.detach().clone()  # hosts may count down in place
            level = float(timestep.reshape(-1)[0]) if timestep.device.type == "cpu" and timestep.numel() else None
        elif timestep is not None:
            level = float(timestep)
        if sample is None:
            return _Moment(timestep, level, None, None)
        return _Moment(timestep, level, weakref.ref(sample), version(sample))

    def same_sample(self, other: _Moment) -> bool:
        if self.sample is None or other.sample is None:
            return False
        return self.sample() is not None and self.sample() is other.sample() and self.version == other.version


def _held(prediction: Prediction) -> Prediction:
    """The first of two calls until the second comes; a copy, since the host may change its tensors in place in between."""
    sample, embedding = (None if tensor is None else copy_of(tensor) for tensor in (prediction.sample, prediction.embedding))
    return replace(prediction, values=copy_of(prediction.values), sample=sample, embedding=embedding)


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
