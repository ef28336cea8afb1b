"""The first evaluations of a run like the one that KSampler would make, with their calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import memhook

from .host import comfy, unpatched

if TYPE_CHECKING:
    from memhook.capture.trace import Trace

Conditioning = list[list[Any]]


def probe(
    model: Any,
    positive: Conditioning,
    negative: Conditioning,
    latent: dict[str, Any],
    *,
    evaluations: int,
    seed: int,
    steps: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
) -> tuple[Trace, Any]:
    """Run a sampler only so far.

    Returns:
        The trace, and the model that replays need: keep it while they are used.
    """
    sampling = comfy("comfy.sample")
    own = unpatched(model)
    start = sampling.fix_empty_latent_channels(own, latent["samples"])
    noise = sampling.prepare_noise(start, seed, latent.get("batch_index"))

    def run() -> None:
        sampling.sample(
            own, noise, steps, cfg, sampler_name, scheduler, positive, negative, start, denoise=1.0, noise_mask=latent.get("noise_mask"),
            callback=None, disable_pbar=True, seed=seed,
        )  # fmt: skip

    return memhook.probe(own, run, evaluations=evaluations), own


def encode(clip: Any, text: str) -> Conditioning:
    """What CLIPTextEncode makes of a text."""
    encoded: Conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    return encoded
