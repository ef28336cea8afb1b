"""How long each detector takes for a prompt, sampling included."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from memhook.bench.detection.sampled import Describe, early_steps, group_sizes, stages
from memhook.scores.density import descriptor_density, pixel_density

if TYPE_CHECKING:
    from memhook.bench.sampling import Sampling


@dataclass(frozen=True)
class Seconds:
    """Seconds a prompt, from its text to the score."""

    detector: str
    images: int
    step: int
    seconds: float


def time_detectors(pipeline: Any, sampling: Sampling, prompts: Sequence[str], *, describe: Describe | None) -> list[Seconds]:
    """Time each detector on each prompt by itself, and give the medians.

    Every measurement runs the sampler as far as the detector needs it: up to its step for the magnitude, and with the pictures decoded and compared
    for a density.
    """
    found = []
    total = sampling.images or 1
    if prompts:  # the first run of a process sets things up
        _one_prompt(
            pipeline, replace(sampling, images=min(2, total), batch_size=1), prompts[0], step=sampling.steps, preview=False, describe=describe
        )
    early = early_steps(pipeline, sampling.steps)
    for size in [1, *group_sizes(total)]:
        one = replace(sampling, images=size, batch_size=1)
        for step in stages(sampling.steps):
            runs = [_one_prompt(pipeline, one, prompt, step=step, preview=step in early, describe=describe) for prompt in prompts]
            found += [Seconds(detector, size, step, statistics.median(run[detector] for run in runs)) for detector in runs[0]]
    return found


def _one_prompt(pipeline: Any, sampling: Sampling, prompt: str, *, step: int, preview: bool, describe: Describe | None) -> dict[str, float]:
    def clock() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    started = clock()
    [run] = sampling.run(pipeline, [prompt], evaluations=step)
    run.trace.score()
    found = {"magnitude": clock() - started}
    last = step == sampling.steps
    if (sampling.images or 1) < 2 or not (preview or last):
        return found
    started = clock()
    [run] = sampling.run(pipeline, [prompt], evaluations=None if last else step, previews=() if last else (step,))
    pictures = np.stack([np.asarray(image.convert("RGB")) for image in (run.images if last else run.previews[step])])
    sampled = clock() - started
    started = clock()
    pixel_density(torch.from_numpy(pictures).permute(0, 3, 1, 2))
    found["pixels"] = sampled + clock() - started
    if describe is not None:
        started = clock()
        descriptor_density(describe(pictures))
        found["descriptors"] = sampled + clock() - started
    return found
