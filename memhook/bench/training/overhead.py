"""What the filter costs: time against the same step without it, and memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from memhook.bench.training.finetune import Model, Steps, noised
from memhook.bench.training.recipe import Data, Recipe, Way

if TYPE_CHECKING:
    from memhook.training import FilterCalibration


_JUDGED = 4  # times as many steps where a few samples of each are judged: how many, is a matter of chance


@dataclass(frozen=True)
class Overhead:
    """Medians over pairs of runs, one right after the other; for ``judged``, whose steps differ, the ratio of the sums.

    Attributes:
        step: A whole step (draw, encode, forward, backward, optimizer) with the filter over one without.
        half: The same with the unconditional pass at every other step.
        judged: The same with the pass for the samples at noisy timesteps alone.
        judged_share: The share of samples that went through that pass.
        denoiser: Forward and backward pass alone, with the filter over without.
        forward: The extra pass over the forward pass of the loop.
        step_seconds: CPU time of the step without the filter.
        peak: Most bytes allocated during forward and backward pass, with the filter over without.
        judged_peak: The same with the pass for the samples at noisy timesteps alone.
    """

    step: float
    half: float
    judged: float
    judged_share: float
    denoiser: float
    forward: float
    step_seconds: float
    peak: float
    judged_peak: float


def overhead(model: Model, recipe: Recipe, calibration: FilterCalibration, *, rounds: int) -> Overhead:
    """Measure, with nothing dropped, so that both do the same work."""
    data = Data(recipe, 0)
    keep_all = float("inf")
    plain, whole, half, judged = (
        Steps(model, recipe, way, data, calibration)
        for way in (
            Way("plain"),
            Way("filter", tau=keep_all),
            Way("half", tau=keep_all, fraction=0.5),
            Way("judged", tau=keep_all, noisy=True, remember=10),
        )
    )
    batch = noised(model, data.batch(0), [str(pair.caption) for pair in data.batch(0)], seed=(4,))

    def passes(steps: Steps) -> Callable[[], None]:
        def run() -> None:
            losses = batch.losses(steps.unet)
            (losses.mean() if steps.filter is None else steps.filter.mean(losses, keys=range(len(losses)))).backward()  # type: ignore[no-untyped-call]

        return run

    def forward(*, grad: bool) -> Callable[[], object]:
        def run() -> object:
            with torch.set_grad_enabled(grad):
                return batch.losses(plain.unet)

        return run

    times: dict[str, list[float]] = {name: [] for name in ("plain", "whole", "half", "passes", "filtered", "forward", "extra")}
    alike: dict[str, list[float]] = {"plain": [], "judged": []}
    with whole.block(), half.block(), judged.block():
        for number in range(-1, rounds):
            found = {
                "plain": _seconds(lambda number=number: plain(2 * number + 2)),  # type: ignore[misc]
                "whole": _seconds(lambda number=number: whole(2 * number + 2)),  # type: ignore[misc]
                # two steps, of which one has the pass
                "half": _seconds(lambda number=number: (half(2 * number + 2), half(2 * number + 3))) / 2,  # type: ignore[misc, func-returns-value]
                "passes": _seconds(passes(plain)),
                "filtered": _seconds(passes(whole)),
                "forward": _seconds(forward(grad=True)),
                "extra": _seconds(forward(grad=False)),
            }
            if number >= 0:  # the first round warms up
                for name, seconds in found.items():
                    times[name].append(seconds)
        for number in range(_JUDGED * rounds):
            alike["plain"].append(_seconds(lambda number=number: plain(number)))  # type: ignore[misc]
            alike["judged"].append(_seconds(lambda number=number: judged(number)))  # type: ignore[misc]
        share = _share(judged)
        peaks = [_peak_bytes(passes(steps)) for steps in (plain, whole, judged)]

    def ratio(a: str, b: str) -> float:
        return float(np.median(np.array(times[a]) / np.array(times[b])))

    return Overhead(
        step=ratio("whole", "plain"),
        half=ratio("half", "plain"),
        judged=float(np.sum(alike["judged"]) / np.sum(alike["plain"])),
        judged_share=share,
        denoiser=ratio("filtered", "passes"),
        forward=ratio("extra", "forward"),
        step_seconds=float(np.median(times["plain"])),
        peak=peaks[1] / peaks[0],
        judged_peak=peaks[2] / peaks[0],
    )


def _share(steps: Steps) -> float:
    report = steps.filter.report() if steps.filter is not None else None
    return report.passed / report.samples if report is not None else 0.0


def _seconds(run: Callable[[], object]) -> float:
    """CPU seconds of this process: on a shared machine the clock on the wall counts the others too."""
    start = time.process_time()
    run()
    return time.process_time() - start


def _peak_bytes(run: Callable[[], object]) -> float:
    """The most bytes of tensors that were allocated at once, beyond those before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    changes = [(event.start_ns(), event.nbytes()) for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    return float(np.cumsum([size for _, size in sorted(changes)]).max())
