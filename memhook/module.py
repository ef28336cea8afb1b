"""The adapter for a bare denoiser: any `torch.nn.Module` that is called with guided batches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal, get_args

from torch import Tensor, nn

from memhook.errors import GuidanceLayoutError, MemhookError
from memhook.fingerprint import Fingerprinted
from memhook.hooks import hook_calls
from memhook.hookspecs import Watcher
from memhook.pairs import PairRecorder, Prediction, find_timestep, read_output, split_call
from memhook.prediction import SPACES, Space
from memhook.replay import Path
from memhook.trace import Row

Layout = Literal["uncond_first", "cond_first", "two_calls_uncond_first", "two_calls_cond_first"]
_UNCOND_FIRST = ("uncond_first", "two_calls_uncond_first")


class ModuleAdapter:
    """Watch a bare UNet or DiT whose guided calls have a declared layout.

    * The module is called as ``module(sample, timestep, embedding, ...)`` or with keywords, and returns a tensor, a tuple
      that begins with one, or an object with ``.sample``, of shape ``(batch, ...)``.
    * ``layout`` says what a guided evaluation is: one call on a batch of ``2 b`` rows, whose first half is unconditional
      (``"uncond_first"``) or conditional (``"cond_first"``); or two calls on ``b`` rows each, in the order named.

    Args:
        module: The denoiser.
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

    def __init__(self, module: nn.Module, *, layout: Layout, embedding: str | int | Path | None = None, space: Space = "eps") -> None:
        if layout not in get_args(Layout):
            raise MemhookError(f"layout is {layout!r}; expected one of {', '.join(get_args(Layout))}")
        if space not in SPACES:
            raise MemhookError(f"space is {space!r}; expected one of {', '.join(SPACES)}")
        if isinstance(module, nn.DataParallel):
            raise MemhookError("a DataParallel module runs its replicas in other threads, where calls cannot be assigned to a watch; watch module.module on one device")
        self._module: nn.Module = module
        self._fingerprint = Fingerprinted({"model": module})
        self._layout: Layout = layout
        self._path: Path | None = embedding if isinstance(embedding, tuple) or embedding is None else (embedding,)
        self._space: Space = space

    @contextlib.contextmanager
    def attach(self, watcher: Watcher) -> Iterator[None]:
        recorder = PairRecorder()
        waiting: list[Prediction] = []
        seen: list[int] = []  # samples of guided evaluations so far

        def emit(first: Prediction, second: Prediction, timestep: Tensor | float | None) -> None:
            cond, uncond = (second, first) if self._layout in _UNCOND_FIRST else (first, second)
            row = recorder.row(cond, uncond, timestep=timestep)
            evaluation = recorder.evaluation(cond, uncond, space=self._space, roles="declared", timestep=timestep)
            seen.append(cond.values.shape[0])
            if watcher.wants_evaluations and row.same_inputs is not None and not bool(row.same_inputs.all()):
                raise GuidanceLayoutError(
                    f"the two predictions of {seen[-1]} samples were made from different noisy samples; layout={self._layout!r} does not fit the calls"
                )
            watcher.emit(evaluation, row)

        def missing(prediction: Prediction, timestep: Tensor | float | None) -> None:
            watcher.missing("the denoiser was called without an unconditional half")
            evaluation = recorder.evaluation(prediction, prediction, space=self._space, roles="declared", timestep=timestep)
            watcher.emit(replace(evaluation, pred_uncond=None), Row(None, timestep, shape=tuple(prediction.values.shape[1:])))

        def on_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if not watcher.listening:
                return
            timestep = find_timestep(args, kwargs)
            batch = read_output(output).shape[0]
            keep = watcher.wants_evaluations
            if self._layout.startswith("two_calls"):
                waiting.extend(split_call(module, args, kwargs, output, chunks=1, keep=keep, path=self._path))
                if len(waiting) == 2:
                    first, second = waiting
                    waiting.clear()
                    if first.values.shape != second.values.shape:
                        raise GuidanceLayoutError(
                            f"two calls in a row returned {tuple(first.values.shape)} and {tuple(second.values.shape)}; layout={self._layout!r} "
                            "expects pairs of equal shape. Guidance may be off, or the calls batched"
                        )
                    emit(first, second, timestep)
            elif batch % 2 == 0 and not (seen and batch == seen[-1]):
                first, second = split_call(module, args, kwargs, output, chunks=2, keep=keep, path=self._path)
                emit(first, second, timestep)
            elif seen and batch == seen[-1]:  # guidance switched off for a part of the run
                missing(split_call(module, args, kwargs, output, chunks=1, keep=keep, path=self._path)[0], timestep)
            else:
                raise GuidanceLayoutError(
                    f"the denoiser returned a batch of {batch}, shape {tuple(read_output(output).shape)}; layout={self._layout!r} expects two halves. "
                    'Guidance may be off (use a scale above 1), or the host makes two calls (layout="two_calls_cond_first")'
                )

        with hook_calls(self._module, on_call):
            yield
        if waiting:
            watcher.missing(f"layout={self._layout!r} expects pairs of calls, but the number of calls was odd")

    def describe(self) -> Mapping[str, Any]:
        return self._fingerprint.describe()

