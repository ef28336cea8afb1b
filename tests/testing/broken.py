"""A small correct adapter for `memhook.testing.sample`, and what it becomes when one thing in it is broken."""

import contextlib
from dataclasses import replace
from typing import ClassVar

from memhook.adapting.hooks import hook_calls
from memhook.adapting.pairs import PairRecorder, split_call
from memhook.capture.trace import Row


class GoodAdapter:
    """One batched call per evaluation, unconditional half first; no second half when guidance is off."""

    host = "tiny"

    def __init__(self, unet):
        self.unet = unet

    def describe(self):
        return {}

    @contextlib.contextmanager
    def attach(self, watcher):
        recorder = PairRecorder()

        def on_call(module, args, kwargs, output):
            if self.ignores(watcher):
                return
            guided = len(args[0]) == 2 * self.unet.samples  # the tests' `run` says how many
            chunks = split_call(module, args, kwargs, output, chunks=2 if guided else 1, keep=True)
            self.emit(watcher, recorder, self.order(chunks), args[1])

        with self.hooked(on_call):
            yield

    def hooked(self, on_call):
        return hook_calls(self.unet, on_call)

    def ignores(self, watcher):
        return not watcher.listening

    def order(self, chunks):
        return chunks[::-1]  # cond, uncond

    def emit(self, watcher, recorder, chunks, timestep):
        if len(chunks) == 1:
            watcher.missing("guidance is off; use a scale above 1")
            lone = recorder.evaluation(chunks[0], chunks[0], space="eps", roles="declared", timestep=timestep)
            watcher.emit(replace(lone, pred_uncond=None), Row(None, timestep))
        else:
            self.emit_pair(watcher, recorder, *chunks, timestep)

    def emit_pair(self, watcher, recorder, cond, uncond, timestep):
        watcher.emit(self.evaluation(recorder, cond, uncond, timestep), recorder.row(cond, uncond, timestep=timestep))

    def evaluation(self, recorder, cond, uncond, timestep):
        return recorder.evaluation(cond, uncond, space="eps", roles="declared", timestep=timestep)


class Swapped(GoodAdapter):
    def order(self, chunks):
        return chunks


class Leaking(GoodAdapter):
    @contextlib.contextmanager
    def hooked(self, on_call):
        contextlib.ExitStack().push(manager := hook_calls(self.unet, on_call))
        manager.__enter__()
        yield
        leaks.append(manager)  # closing it would remove the hook


leaks = []


class LeakingOnError(GoodAdapter):
    @contextlib.contextmanager
    def hooked(self, on_call):
        handle = self.unet.register_forward_hook(lambda module, args, output: on_call(module, args, {}, output))
        yield
        handle.remove()


class ZeroFilling(GoodAdapter):
    def order(self, chunks):
        return chunks * 2 if len(chunks) == 1 else chunks[::-1]  # the conditional prediction stands in for the missing one


class LosingTheFirst(GoodAdapter):
    def __init__(self, unet):
        super().__init__(unet)
        self.seen = 0

    def emit(self, watcher, recorder, chunks, timestep):
        self.seen += 1
        if self.seen > 1:
            super().emit(watcher, recorder, chunks, timestep)


class OffByOneCall(GoodAdapter):
    """Pairs the conditional prediction with the unconditional one of the evaluation before."""

    def __init__(self, unet):
        super().__init__(unet)
        self.last = None

    def emit_pair(self, watcher, recorder, cond, uncond, timestep):
        last, self.last = self.last or uncond, uncond
        evaluation = self.evaluation(recorder, cond, last, timestep)
        watcher.emit(evaluation)


class OffByOneRow(GoodAdapter):
    """Pairs the conditional prediction of one sample with the unconditional one of its neighbor."""

    def emit_pair(self, watcher, recorder, cond, uncond, timestep):
        super().emit_pair(watcher, recorder, cond, replace(uncond, values=uncond.values.roll(1, 0), sample=uncond.sample.roll(1, 0)), timestep)


class OneNormPerBatch(GoodAdapter):
    def emit_pair(self, watcher, recorder, cond, uncond, timestep):
        row = recorder.row(cond, uncond, timestep=timestep)
        row.magnitude = row.magnitude.norm().expand_as(row.magnitude)
        watcher.emit(self.evaluation(recorder, cond, uncond, timestep), row)


class Detaching(GoodAdapter):
    def evaluation(self, recorder, cond, uncond, timestep):
        good = super().evaluation(recorder, cond, uncond, timestep)
        return replace(good, replay=lambda embedding: good.replay(embedding).detach() + 0 * embedding.sum())


class StaleReplay(GoodAdapter):
    """Replays the first call for every evaluation."""

    first = None

    def evaluation(self, recorder, cond, uncond, timestep):
        good = super().evaluation(recorder, cond, uncond, timestep)
        self.first = self.first or good.replay
        return replace(good, replay=self.first)


class Replayless(GoodAdapter):
    def evaluation(self, recorder, cond, uncond, timestep):
        return replace(super().evaluation(recorder, cond, uncond, timestep), replay=None)


class Touching(GoodAdapter):
    def emit_pair(self, watcher, recorder, cond, uncond, timestep):
        super().emit_pair(watcher, recorder, cond, uncond, timestep)
        cond.values.mul_(1.001)


class HearingEverybody(GoodAdapter):
    def ignores(self, watcher):
        return False


class Swallowing(GoodAdapter):
    def emit(self, watcher, recorder, chunks, timestep):
        with contextlib.suppress(BaseException):
            super().emit(watcher, recorder, chunks, timestep)


class Remembering(GoodAdapter):
    """Keeps state where two watches share it: only the first of nested watches sees an evaluation."""

    taken: ClassVar = set()

    def emit_pair(self, watcher, recorder, cond, uncond, timestep):
        key = (float(timestep), cond.values.data_ptr())
        if key not in self.taken:
            self.taken.add(key)
            super().emit_pair(watcher, recorder, cond, uncond, timestep)
