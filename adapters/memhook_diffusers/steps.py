"""Seeing what a scheduler is given, without leaving a trace on it."""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

OnStep = Callable[[Any, Any], None]
"""``on_step(model_output, timestep)``, called before the scheduler's own step."""

_lock = threading.Lock()
_taps: weakref.WeakKeyDictionary[Any, _Tap] = weakref.WeakKeyDictionary()


class _Tap:
    """Replaces one scheduler's ``step`` while there are listeners. One tap serves nested watches and several threads."""

    def __init__(self, scheduler: Any) -> None:
        self.listeners: list[OnStep] = []
        self._own = scheduler.__dict__.get("step")  # somebody else's replacement on the instance
        step = scheduler.step

        @functools.wraps(step)  # pipelines inspect the signature of `step`
        def tapped(*args: Any, **kwargs: Any) -> Any:
            # A few pipelines (Stable Cascade) call with keywords only.
            model_output = args[0] if args else kwargs["model_output"]
            timestep = args[1] if len(args) > 1 else kwargs.get("timestep")
            for listener in tuple(self.listeners):
                listener(model_output, timestep)
            return step(*args, **kwargs)

        self._tapped = tapped
        scheduler.step = tapped

    def remove(self, scheduler: Any) -> None:
        # If somebody wrapped ours in the meantime, theirs stays and ours, without listeners, passes everything through.
        if scheduler.__dict__.get("step") is self._tapped:
            if self._own is None:
                del scheduler.step
            else:
                scheduler.step = self._own


@contextlib.contextmanager
def listen_to_steps(scheduler: Any, on_step: OnStep) -> Iterator[None]:
    """Call ``on_step`` before every ``scheduler.step`` inside the block, from whichever thread."""
    with _lock:
        tap = _taps.get(scheduler)
        if tap is None:
            tap = _taps[scheduler] = _Tap(scheduler)
        tap.listeners.append(on_step)
    try:
        yield
    finally:
        with _lock:
            tap.listeners.remove(on_step)
            if not tap.listeners:
                tap.remove(scheduler)
                del _taps[scheduler]
