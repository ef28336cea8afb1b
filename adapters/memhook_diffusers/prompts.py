"""Running many prompts through a text-to-image pipeline and keeping their magnitudes."""

from __future__ import annotations

import contextlib
import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from memhook.capture.watching import watch
from memhook.errors import MemhookError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from memhook.capture.trace import Trace
    from memhook.hookspecs import Score
from memhook_diffusers.loading import quiet_libraries
from memhook_diffusers.previews import clean_estimates, decode


@dataclass(frozen=True)
class PromptRun:
    """One batch of prompts after its run; the trace's samples and the images stand prompt by prompt."""

    prompts: tuple[str, ...]
    trace: Trace
    images: list[Any]  # PIL images, prompt by prompt; empty where the run was cut short
    previews: dict[int, list[Any]] = field(default_factory=dict)  # step -> PIL images of the clean samples implied there


def run_prompts(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    images_per_prompt: int = 4,
    steps: int = 50,
    guidance_scale: float = 7.5,
    seed: int = 0,
    evaluations: int | None = None,
    batch_size: int = 8,
    previews: Sequence[int] = (),
    score: Score | str | None = None,
) -> Iterator[PromptRun]:
    """Watch a pipeline on each prompt, several prompts at a time.

    Every sample has a seed of its own, ``seed + 1000 * (number of the prompt) + (number of the image)``, so a result does not depend on
    how prompts were batched, but for rounding.

    Args:
        pipeline: A diffusers text-to-image pipeline.
        prompts: Not empty, none of them blank.
        images_per_prompt: Samples a prompt.
        steps: Steps of the sampler.
        guidance_scale: Above 1.
        seed: Of the first prompt's first image.
        evaluations: Stop each run after so many steps and return no images; None for whole runs with images.
        batch_size: Prompts per run.
        previews: Steps (from 1) whose implied clean samples are decoded too.
        score: As in `memhook.watch`.

    Yields:
        A `PromptRun` per batch.

    Raises:
        MemhookError: A prompt is blank, or the pipeline cannot be stopped early.
    """
    blank = next((number for number, prompt in enumerate(prompts) if not prompt.strip()), None)
    if blank is not None:
        raise MemhookError(
            f"prompt {blank} is empty; an empty prompt is the unconditional one, so there is nothing to compare it with. Give it some text"
        )
    options: dict[str, Any] = {}
    if evaluations is not None:
        if "callback_on_step_end" not in inspect.signature(pipeline.__call__).parameters:
            raise MemhookError(f"{type(pipeline).__name__} takes no callback_on_step_end, so it cannot be stopped early; leave evaluations out")

        def stop(pipe: Any, step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            if step + 1 >= evaluations:
                pipe._interrupt = True  # diffusers' own way to end the loop
            return values

        options = {"callback_on_step_end": stop, "output_type": "latent"}
    for start in range(0, len(prompts), batch_size):
        batch = tuple(prompts[start : start + batch_size])
        seeds = [seed + 1000 * (start + number) + image for number in range(len(batch)) for image in range(images_per_prompt)]
        generators = [torch.Generator().manual_seed(value) for value in seeds]
        # diffusers logs every cut-off prompt of a batch at length
        with quiet_libraries(), contextlib.ExitStack() as stack, watch(pipeline, score=score) as trace:
            latents = stack.enter_context(clean_estimates(pipeline, previews)) if previews else {}
            output = pipeline(
                prompt=list(batch),
                num_images_per_prompt=images_per_prompt,
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                generator=generators,
                **options,
            )
        early = {step: decode(pipeline, found) for step, found in latents.items()}
        yield PromptRun(batch, trace, [] if evaluations is not None else list(output.images), early)
