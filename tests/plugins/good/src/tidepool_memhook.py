"""The host's adapter for memhook. It imports memhook's public parts, and not the host."""

import contextlib
import sys
from dataclasses import replace

from memhook import hookimpl
from memhook.fingerprint import Fingerprinted
from memhook.hooks import hook_calls
from memhook.pairs import PairRecorder, split_call
from memhook.trace import Row


class TidepoolAdapter:
    host = "tidepool"

    def __init__(self, sampler):
        self._sampler, self._fingerprint = sampler, Fingerprinted({"model": sampler.net})

    def describe(self):
        return self._fingerprint.describe()

    @contextlib.contextmanager
    def attach(self, watcher):
        recorder = PairRecorder()

        def on_call(module, args, kwargs, output):
            if not watcher.listening:
                return
            latents, level = kwargs["latents"], kwargs["level"]
            half = len(latents) // 2
            about = {"space": "eps", "roles": "declared", "timestep": level}
            # This host guides where both halves hold the same latents, which it knows by itself: it made them.
            guided = len(latents) % 2 == 0 and bool((latents[:half] == latents[half:]).all()) and bool(kwargs["text"][half:].eq(0).all())
            parts = split_call(module, args, kwargs, output, chunks=2 if guided else 1, keep=watcher.wants_evaluations, path=("text",))
            parts = [replace(part, sample=latents[part.rows]) for part in parts]
            if guided:
                watcher.emit(recorder.evaluation(*parts, **about), recorder.row(*parts, timestep=level))
            else:
                watcher.missing("tidepool was run with a scale of 1 or less, so there is no unconditional prediction; use a scale above 1")
                watcher.emit(replace(recorder.evaluation(parts[0], parts[0], **about), pred_uncond=None), Row(None, level))

        with hook_calls(self._sampler.net, on_call):
            yield


@hookimpl
def memhook_adapt(target):
    host = sys.modules.get("tidepool")
    return TidepoolAdapter(target) if host is not None and isinstance(target, host.Sampler) else None
