"""The clean pictures that guided predictions imply on the way, for baselines that look at pictures before a run is over."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memhook.errors import MemhookError
from memhook_diffusers.taps import listen_to

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator


@contextlib.contextmanager
def clean_estimates(pipeline: Any, steps: Collection[int]) -> Iterator[dict[int, Tensor]]:
    """Keep the clean sample that the guided prediction implies, at some of the steps that run inside the block.

    Args:
        pipeline: A pipeline whose scheduler has ``alphas_cumprod`` (DDPM, DDIM, PNDM, DPM-Solver and the like).
        steps: Numbers of scheduler steps, from 1.

    Yields:
        A dictionary from step to ``(b, ...)`` latents, filled while the run goes on.

    Raises:
        MemhookError: The scheduler works in another way.
    """
    scheduler = pipeline.scheduler
    kind = getattr(scheduler.config, "prediction_type", None)
    if not hasattr(scheduler, "alphas_cumprod") or kind not in ("epsilon", "v_prediction", "sample"):
        raise MemhookError(
            f"{type(scheduler).__name__} with prediction_type {kind!r} does not say which clean sample a prediction implies; expected one with "
            "alphas_cumprod, such as DDIMScheduler"
        )
    found: dict[int, Tensor] = {}
    seen = 0

    def on_step(_: Any, named: dict[str, Any]) -> None:
        nonlocal seen
        seen += 1
        if seen in steps:
            found[seen] = clean_estimate(named["model_output"], named["sample"], scheduler.alphas_cumprod[int(named["timestep"])], kind)

    with listen_to(scheduler, "step", on_step):
        yield found


@torch.no_grad()
def clean_estimate(prediction: Tensor, sample: Tensor, alpha: Tensor, kind: str) -> Tensor:
    """``x0`` from a noisy sample ``sqrt(alpha) x0 + sqrt(1 - alpha) noise`` and the prediction of ``kind``."""
    alpha = alpha.to(sample.device, torch.float32)
    if kind == "sample":
        return prediction.detach().clone()
    if kind == "epsilon":
        return (sample - (1 - alpha).sqrt() * prediction) / alpha.sqrt()
    return alpha.sqrt() * sample - (1 - alpha).sqrt() * prediction


@torch.no_grad()
def decode(pipeline: Any, latents: Tensor) -> list[Any]:
    """Latents as PIL images, through the pipeline's autoencoder."""
    config = pipeline.vae.config
    latents = latents.to(pipeline.vae.dtype) / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
    return list(pipeline.image_processor.postprocess(pipeline.vae.decode(latents, return_dict=False)[0], output_type="pil"))
