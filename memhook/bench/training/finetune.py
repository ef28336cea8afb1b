"""A fine-tune of the bundled model's denoiser, step by step as the recipe of its training has it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from memhook.bench.training.recipe import NOISY, Data, Pair, Recipe, Way
from memhook.testbed.scenes import draw
from memhook.testbed.train.autoencoder import to_pixels
from memhook.testbed.train.diffusion import CAPTION_DROPOUT
from memhook.testbed.train.loop import warmup_then_decay
from memhook.training import FilterCalibration, FilterReport, TrainingFilter, training_filter

MIN_SNR_GAMMA = 5.0
WARMUP = 20
DECAY_FROM = 0.6  # of the steps; the figures of a run that ends at the full rate change from step to step


@dataclass(frozen=True, eq=False)
class Model:
    """The bundled model's parts; what is trained is a copy of the denoiser."""

    pipeline: Any

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """Text embeddings ``(n, l, d)``."""
        tokenizer = self.pipeline.tokenizer
        ids = tokenizer(list(texts), padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt").input_ids
        embeddings: Tensor = self.pipeline.text_encoder(ids).last_hidden_state
        return embeddings

    @torch.no_grad()
    def latents(self, pairs: Sequence[Pair]) -> Tensor:
        """The pairs' pictures as latents ``(n, 4, 16, 16)``."""
        vae = self.pipeline.vae
        latents: Tensor = vae.encode(to_pixels([draw(pair.scene) for pair in pairs])).latent_dist.mode() * vae.config.scaling_factor
        return latents

    def denoiser(self) -> nn.Module:
        """A copy of the denoiser to train."""
        unet: nn.Module = copy.deepcopy(self.pipeline.unet)
        return unet.requires_grad_(True).train()


@dataclass(frozen=True, eq=False)
class Noised:
    """A batch as the denoiser sees it."""

    noisy: Tensor  # (b, 4, 16, 16)
    noise: Tensor
    timesteps: Tensor  # (b,)
    embeddings: Tensor  # (b, l, d)
    weights: Tensor  # (b,), min-SNR

    def losses(self, unet: nn.Module) -> Tensor:
        """``(b,)``, one forward pass."""
        predicted: Tensor = unet(self.noisy, self.timesteps, encoder_hidden_states=self.embeddings).sample
        return (predicted - self.noise).square().mean(dim=(1, 2, 3)) * self.weights


def noised(model: Model, pairs: Sequence[Pair], texts: Sequence[str], *, seed: Sequence[int], dropout: float = CAPTION_DROPOUT) -> Noised:
    """Draw, encode and noise a batch; the random numbers depend on the seed alone."""
    rng = np.random.default_rng(list(seed))
    count = len(pairs)
    latents = model.latents(pairs)
    noise = torch.from_numpy(rng.standard_normal(latents.shape, np.float32))
    alphas: Tensor = model.pipeline.scheduler.alphas_cumprod
    timesteps = torch.from_numpy(rng.integers(len(alphas), size=count))
    kept = [text if stays else "" for text, stays in zip(texts, rng.random(count) >= dropout, strict=True)]
    alpha = alphas[timesteps].view(-1, 1, 1, 1)
    snr = alphas[timesteps] / (1 - alphas[timesteps])
    return Noised(alpha.sqrt() * latents + (1 - alpha).sqrt() * noise, noise, timesteps, model.encode(kept), snr.clamp(max=MIN_SNR_GAMMA) / snr)


def observe(model: Model, recipe: Recipe) -> FilterCalibration:
    """The magnitudes of clean pairs on the model as it is before the fine-tune."""
    data, unet = Data(recipe, 0), model.denoiser()
    with training_filter(unet, null_embedding=model.encode([""])[0], threshold=None) as f, torch.no_grad():
        for number in range(recipe.observed):
            pairs = data.clean_batch(number)
            f.mean(noised(model, pairs, [str(pair.caption) for pair in pairs], seed=(1, number), dropout=0.0).losses(unet))
    return f.calibration(bins=recipe.bins)


def filter_of(way: Way, unet: nn.Module, null: Tensor, calibration: FilterCalibration, *, bins: int) -> TrainingFilter | None:
    """The filter of a way; None where it has none. ``bins`` are those of a calibration at the noisy timesteps."""
    if not way.filters:
        return None
    threshold: Any = way.tau
    if way.fpr is not None:
        threshold = (calibration.within(*NOISY, bins=bins) if way.noisy else calibration).threshold(fpr=way.fpr)
    timesteps = NOISY if way.noisy else None
    return training_filter(unet, null_embedding=null, threshold=threshold, timesteps=timesteps, remember=way.remember, fraction=way.fraction)


class Steps:
    """The optimizer's steps of one way."""

    def __init__(self, model: Model, recipe: Recipe, way: Way, data: Data, calibration: FilterCalibration) -> None:
        self.model, self.recipe, self.way, self.data = model, recipe, way, data
        self.unet = model.denoiser()
        self.filter = filter_of(way, self.unet, model.encode([""])[0], calibration, bins=recipe.noisy_bins)
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), lr=recipe.learning_rate, weight_decay=0.01)

    def block(self) -> AbstractContextManager[object]:
        """The filter's block, if there is one."""
        return self.filter if self.filter is not None else nullcontext()

    def __call__(self, step: int) -> None:
        """One step, from the pictures to the new weights."""
        pairs = self.data.batch(step)
        texts = self.data.captions(pairs, self.way, self.model.pipeline.tokenizer, step)
        losses = noised(self.model, pairs, texts, seed=(2, self.data.seed, step)).losses(self.unet)
        loss = losses.mean() if self.filter is None else self.filter.mean(losses, keys=[pair.key for pair in pairs])
        factor = warmup_then_decay(step, steps=self.recipe.steps, warmup=WARMUP, decay_from=DECAY_FROM)
        self.optimizer.param_groups[0]["lr"] = self.recipe.learning_rate * factor
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()


def fine_tune(steps: Steps, *, track: Callable[[Sequence[int]], Iterator[int]]) -> FilterReport | None:
    """Train; gives what the filter dropped."""
    with steps.block():
        for step in track(range(steps.recipe.steps)):
            steps(step)
    return None if steps.filter is None else steps.filter.report()
