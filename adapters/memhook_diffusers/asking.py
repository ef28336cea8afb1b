"""Asking a pipeline about other texts: each time the same noise, and no further than the first evaluations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from memhook.capture.watching import probe
from memhook.errors import MemhookError

if TYPE_CHECKING:
    from memhook.capture.trace import Trace


def asking(pipeline: Any, *, images: int = 4, seed: int = 0, evaluations: int = 1, **options: Any) -> Callable[[Sequence[str]], Trace]:
    """A function ``ask(texts)`` for `memhook.leave_one_out` and `memhook.suggest_edits`: runs the pipeline itself on other texts.

    Slower than a trace, since the unconditional prediction is made again for every text, but right for every pipeline: whatever it
    makes of a text, it makes of these.

    Args:
        pipeline: A diffusers pipeline that takes a list of prompts.
        images: Samples a text, with the seeds ``seed``, ``seed + 1``, ... for every text.
        seed: Of the first sample.
        evaluations: How far to run. A calibration is then used for a score over so many.
        options: For the pipeline's call, such as ``num_inference_steps`` and ``guidance_scale``.
    """
    if images < 1:
        raise MemhookError(f"images is {images}; expected 1 or more")

    def ask(texts: Sequence[str]) -> Trace:
        generators = [torch.Generator().manual_seed(seed + image) for _ in texts for image in range(images)]
        # Some pipelines (Flux) do not repeat a single negative prompt for a list of prompts.
        negative = {name: [value] * len(texts) for name, value in options.items() if name.startswith("negative_prompt") and isinstance(value, str)}
        call = {**options, **negative, "prompt": list(texts), "num_images_per_prompt": images, "generator": generators}
        return probe(pipeline, lambda: pipeline(**call), evaluations=evaluations)

    return ask
