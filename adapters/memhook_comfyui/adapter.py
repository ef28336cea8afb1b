"""Watching the runs of a ComfyUI model."""

from __future__ import annotations

import contextlib
import weakref
from typing import TYPE_CHECKING, Any

from memhook.errors import MemhookError
from memhook_comfyui.post_cfg import PostCfgAdapter
from memhook_comfyui.run import Run
from memhook_comfyui.setting import DELETED, describe_model
from memhook_comfyui.wrappers import CALC_COND_BATCH, OUTER_SAMPLE, PREDICT_NOISE, has_wrappers, on_patcher, on_run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from memhook.hookspecs import Adapter, Watcher


def adapter_for(patcher: Any) -> Adapter:
    """The adapter for a model patcher, whatever its version of ComfyUI offers."""
    return ComfyAdapter(patcher) if has_wrappers(patcher) else PostCfgAdapter(patcher)


class _Described:
    """The setting of the latest run of a patcher."""

    host = "comfyui"
    intervenes = True

    def __init__(self, patcher: Any) -> None:
        self._patcher = weakref.ref(patcher)
        self._latest: dict[str, str] = {}
        self._model: Callable[[], dict[str, Any]] | None = None

    def describe(self) -> Mapping[str, Any]:
        """The setting. What it says of the model is kept once it was asked for: nodes ask before ComfyUI lets the model go."""
        return self.snapshot()()

    def snapshot(self) -> Callable[[], Mapping[str, Any]]:
        """What `describe` says now, to be read later."""
        if self._model is None:
            patcher = self._patcher()
            if patcher is None:
                raise MemhookError(DELETED)
            self._model = describe_model(patcher)
        model, latest = self._model, self._latest
        return lambda: {**model(), **latest}

    @contextlib.contextmanager
    def _watching(self, watcher: Watcher, guider: Any, sampler: str) -> Iterator[None]:
        run = Run(watcher, guider)
        try:
            with on_run(guider, {PREDICT_NOISE: run.predict_noise, CALC_COND_BATCH: run.calc_cond_batch}):
                yield
        finally:
            run.end()
            self._latest = {"sampler": sampler, **({} if run.unconditional is None else {"unconditional": run.unconditional})}


class ComfyAdapter(_Described):
    """Watch the runs of a model patcher, and of its clones made inside the block, by any sampler or guider node.

    Args:
        patcher: A ``comfy.model_patcher.ModelPatcher``; not kept alive by the adapter.
    """

    @contextlib.contextmanager
    def attach(self, watcher: Watcher) -> Iterator[None]:
        patcher = self._patcher()
        if patcher is None:
            raise MemhookError("the model of this adapter was deleted before it was watched; make an adapter for the model that runs")

        def outer_sample(executor: Any, *args: Any, **kwargs: Any) -> Any:
            if not watcher.listening:
                return executor(*args, **kwargs)
            with self._watching(watcher, executor.class_obj, sampler_of(args, kwargs)):
                return executor(*args, **kwargs)

        with on_patcher(patcher, OUTER_SAMPLE, outer_sample):
            del patcher  # the block must not keep it alive
            yield


class RunAdapter(_Described):
    """Watch the one run that a guider is in the middle of; for wrappers around ``OUTER_SAMPLE``, where it is too late for the patcher.

    Args:
        guider: ``executor.class_obj`` of the wrapper.
        sampler: The name of the sampler that it runs (`sampler_of`).
    """

    def __init__(self, guider: Any, sampler: str) -> None:
        super().__init__(guider.model_patcher)
        self._guider, self._sampler = weakref.ref(guider), sampler

    @contextlib.contextmanager
    def attach(self, watcher: Watcher) -> Iterator[None]:
        guider = self._guider()
        if guider is None or not hasattr(guider, "conds"):
            raise MemhookError("this guider is in no run; watch its model patcher, or make the adapter inside of a wrapper around OUTER_SAMPLE")
        with self._watching(watcher, guider, self._sampler):
            yield


def sampler_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """The name of the sampler among the arguments of ``CFGGuider.outer_sample(noise, latent_image, sampler, ...)``."""
    sampler = kwargs.get("sampler", args[2] if len(args) > 2 else None)
    return str(getattr(getattr(sampler, "sampler_function", sampler), "__name__", type(sampler).__name__))
