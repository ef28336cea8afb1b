"""Stage 1: the autoencoder, 32 x 32 x 3 pixels to 16 x 16 x 4 latents."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from memhook.testbed.next import plan
from memhook.testbed.next.plan import fresh_pair
from memhook.testbed.next.regions import FORMS, random_region
from memhook.testbed.next.scenes import SIZE, draw
from memhook.testbed.train import loop

BATCH = 16
KL_WEIGHT = 1e-4  # per latent element, against the mean squared error of pixels in -1..1


def build() -> AutoencoderKL:
    """An untrained autoencoder of 0.35 million parameters."""
    return AutoencoderKL(
        block_out_channels=(24, 48),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=SIZE,
    )


def to_pixels(pictures: list[np.ndarray]) -> Tensor:
    """uint8 pictures to a float tensor ``(b, 3, 32, 32)`` in -1..1."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)


def pictures(start: int, count: int, *, stream: str = "autoencoder") -> Tensor:
    """Fresh pictures of a stream, from index ``start`` on; one in eight has a region painted over it."""
    scenes = [fresh_pair(index, stream=stream)[1] for index in range(start, start + count)]
    for offset in range(-start % 8, count, 8):
        rng = plan.stream(f"{stream} regions", start + offset)
        scenes[offset] = replace(scenes[offset], region=random_region(rng, FORMS[int(rng.integers(len(FORMS)))]))
    return to_pixels([draw(scene) for scene in scenes])


def train(directory: Path, *, steps: int, device: torch.device) -> AutoencoderKL:
    """Train (or finish training) the autoencoder; sets its ``scaling_factor`` so that latents have unit variance."""
    vae = build().to(device, memory_format=torch.channels_last)
    held_out = pictures(0, 128, stream="autoencoder held out").to(device)

    def step_loss(step: int) -> Tensor:
        torch.manual_seed(step)
        x = pictures(step * BATCH, BATCH).to(device)
        posterior = vae.encode(x).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        error: Tensor = decoded - x
        divergence: Tensor = posterior.kl().mean() / posterior.mean[0].numel()
        return error.square().mean() + 0.05 * error.abs().mean() + KL_WEIGHT * divergence

    @torch.no_grad()
    def evaluate(_: int) -> dict[str, float]:
        decoded = vae.decode(vae.encode(held_out).latent_dist.mode()).sample
        return {"psnr_db": float(10 * torch.log10(4 / (decoded - held_out).square().mean()))}

    parameters = list(vae.parameters())
    loop.run(
        "autoencoder", {"vae": vae}, step_loss, directory=directory, steps=steps, groups=[{"params": parameters, "lr": 2e-3}], weight_decay=0.0,
        decay_from=0.3, evaluate=evaluate,
    )  # fmt: skip
    with torch.no_grad():
        latents = vae.encode(held_out).latent_dist.mode()
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    return vae.eval().requires_grad_(False)
