"""Watching a diffusers pipeline: the calls of its denoisers, and what it makes of them for its schedulers."""

from __future__ import annotations

import contextlib
import functools
import weakref
from typing import TYPE_CHECKING, Any

from torch import nn

from memhook.adapting.arguments import hook_calls_as_made
from memhook.adapting.fingerprint import Fingerprinted
from memhook.errors import NoAdapterError
from memhook_diffusers.encoding import PipelineEncoder
from memhook_diffusers.parts import Parts, find_parts
from memhook_diffusers.processors import restored_if_ended
from memhook_diffusers.reasons import remedy, why_missing
from memhook_diffusers.run import Run
from memhook_diffusers.setting import run_setting, scheduler_setting
from memhook_diffusers.taps import listen_to

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from memhook.hookspecs import Watcher
    from memhook_diffusers.calls import Call


class DiffusersAdapter:
    """Watch a pipeline, whatever its guidance layout; see ``docs/hosts.md`` for how roles are found."""

    host = "diffusers"
    intervenes = True

    def __init__(self, pipeline: Any) -> None:
        parts = find_parts(pipeline)
        kind = type(pipeline).__name__
        if not parts.denoisers:
            seen = ", ".join(name for name, part in vars(pipeline).items() if isinstance(part, nn.Module)) or "none"
            raise NoAdapterError(
                f"{kind} has no component that looks like a denoiser (its modules: {seen}); load its components first, "
                "or hook the denoiser with memhook.ModuleAdapter"
            )
        parallel = next((name for name, part in parts.denoisers.items() if isinstance(part, nn.DataParallel)), None)
        if parallel is not None:
            raise NoAdapterError(
                f"{kind}.{parallel} is a DataParallel module, which runs its replicas in other threads, where calls cannot be assigned to a watch; "
                f"set pipeline.{parallel} = pipeline.{parallel}.module, and watch it on one device"
            )
        if not parts.schedulers:
            raise NoAdapterError(f"{kind} has no scheduler, so its steps cannot be told apart; hook its denoiser with memhook.ModuleAdapter instead")
        self._pipeline = weakref.ref(pipeline)
        main = _main(parts)
        others = {name: part for name, part in parts.denoisers.items() if part is not main}
        encoders = {name: part for name, part in vars(pipeline).items() if name.startswith("text_encoder") and isinstance(part, nn.Module)}
        self._fingerprint = Fingerprinted({"model": main, **others, **encoders})
        self._schedulers = {name: weakref.ref(scheduler) for name, scheduler in parts.schedulers.items()}
        self._sampler = "+".join(type(scheduler).__name__ for scheduler in parts.schedulers.values())

    def describe(self) -> Mapping[str, Any]:
        return self.snapshot()()

    def snapshot(self) -> Callable[[], Mapping[str, Any]]:
        """What `describe` says now, to be read later."""
        left = {name: scheduler for name, reference in self._schedulers.items() if (scheduler := reference()) is not None}
        read, plain = self._fingerprint.snapshot(), {"sampler": self._sampler, "scheduler": scheduler_setting(left)}
        return lambda: {**read(), **plain}

    @contextlib.contextmanager
    def attach(self, watcher: Watcher) -> Iterator[None]:
        pipeline = self._pipeline()
        if pipeline is None:
            raise NoAdapterError("the pipeline was deleted before it was watched")
        parts, name = find_parts(pipeline), type(pipeline).__name__
        denoisers, schedulers = list(parts.denoisers.values()), list(parts.schedulers.values())
        why = functools.partial(why_missing, name)
        encode = PipelineEncoder.of(pipeline)

        def setting(calls: Sequence[Call], step: Mapping[str, Any]) -> Callable[[], Mapping[str, Any]]:
            return run_setting(self._pipeline(), self._fingerprint.modules(), calls, step)

        run = Run(
            watcher, setting=setting, name=name, denoisers=denoisers, schedulers=schedulers, why_missing=why, remedy=remedy(pipeline), encode=encode
        )  # fmt: skip
        with contextlib.closing(run.changes), restored_if_ended(denoisers), contextlib.ExitStack() as stack:
            _listen(stack, parts, run)
            if encode is not None:
                stack.enter_context(listen_to(pipeline, "encode_prompt", encode.on_use))
            del pipeline, parts, denoisers, schedulers  # the block must not keep them alive
            yield
            run.finish()


def _listen(stack: contextlib.ExitStack, parts: Parts, run: Run) -> None:
    for module in parts.denoisers.values():
        stack.enter_context(hook_calls_as_made(module, run.on_call, keep=run.keeps))
    for scheduler in parts.schedulers.values():
        stack.enter_context(listen_to(scheduler, "step", run.on_step))
    for guider in parts.guiders.values():
        stack.enter_context(listen_to(guider, "forward", run.on_guider))


def _main(parts: Parts) -> nn.Module:
    """The denoiser that stands for the model in a calibration's setting."""
    for name in ("unet", "transformer"):
        if name in parts.denoisers:
            return parts.denoisers[name]
    return next(iter(parts.denoisers.values()))
