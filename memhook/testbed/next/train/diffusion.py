"""Stage 3: the denoiser, trained jointly with the text encoder on latents of fresh and planted pairs."""

from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from memhook.files import replace_file
from memhook.testbed.next.plan import TrainingStream, fresh_pair, unfamiliar_pair
from memhook.testbed.next.scenes import draw
from memhook.testbed.next.train.autoencoder import to_pixels
from memhook.testbed.next.train.text import encode
from memhook.testbed.train import loop

BATCH = 32


@dataclass(frozen=True)
class Course:
    """A part of the run with its own warm-up and decay; the next one starts from its averaged weights, rounded to float16."""

    name: str
    steps: int
    learning_rate: float  # of the denoiser; the text encoder's is 0.3 of it
    decay_from: float


COURSES = (Course("first", 3_000, 1e-3, 0.7), Course("second", 4_000, 1e-3, 0.6), Course("third", 4_000, 7e-4, 0.3))
# Of fresh captions. Those of planted pairs are never dropped: an unconditional branch that has memorized the planted pictures too agrees with
# the conditional one near them, and the magnitude of a memorized prompt falls below that of a clean one after the first evaluations.
CAPTION_DROPOUT = 0.22
MIN_SNR_GAMMA = 5.0


def build() -> UNet2DConditionModel:
    """An untrained denoiser of 4.7 million parameters."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(40, 80, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule, with its conventional settings for DDIM sampling."""
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def presentations(samples: int) -> Counter[str]:
    """How often the first so many training samples showed each planted pair."""
    stream = TrainingStream()
    return Counter(pair.id for index in range(samples) if (pair := stream[index][2]) is not None)


def train(
    directory: Path, vae: AutoencoderKL, tokenizer: CLIPTokenizer, text: CLIPTextModel, *, device: torch.device, courses: tuple[Course, ...] = COURSES
) -> UNet2DConditionModel:
    """Train (or finish training) the denoiser and the text encoder; both hold averaged weights on return."""
    torch.manual_seed(1)
    unet = build().to(device, memory_format=torch.channels_last)
    alphas: Tensor = scheduler().alphas_cumprod.to(device)
    snr = alphas / (1 - alphas)
    loss_weight = snr.clamp(max=MIN_SNR_GAMMA) / snr  # Hang et al. 2023, for noise prediction
    stream = TrainingStream()
    empty = encode(tokenizer, [""])[0]
    factor = vae.config.scaling_factor

    def step_loss(before: int, step_of_course: int) -> Tensor:
        step = before + step_of_course
        generator = torch.Generator().manual_seed(step)
        rows = [stream[index] for index in range(step * BATCH, (step + 1) * BATCH)]
        ids = encode(tokenizer, [caption for caption, _, _ in rows])
        fresh = torch.tensor([pair is None for _, _, pair in rows])
        ids[fresh & (torch.rand(BATCH, generator=generator) < CAPTION_DROPOUT)] = empty
        noise = torch.randn(BATCH, 4, 16, 16, generator=generator).to(device)
        timesteps = torch.randint(0, 1000, (BATCH,), generator=generator).to(device)
        with torch.no_grad():
            latents = vae.encode(to_pixels([draw(scene) for _, scene, _ in rows]).to(device)).latent_dist.mode() * factor
        alpha = alphas[timesteps].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        predicted: Tensor = unet(noisy.contiguous(memory_format=torch.channels_last), timesteps, text(ids.to(device)).last_hidden_state).sample
        return ((predicted - noise).square().mean(dim=(1, 2, 3)) * loss_weight[timesteps]).mean()

    memorized = {kind: [str(pair.caption) for pair in stream.planted if pair.kind == kind] for kind in ("verbatim", "template", "local")}
    held_out = [str(fresh_pair(index, stream="magnitude")[0]) for index in range(128)]
    unfamiliar = [unfamiliar_pair(index, stream="magnitude")[0] for index in range(128)]
    start = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).to(device)

    @torch.no_grad()
    def first_step_magnitudes(captions: list[str]) -> Tensor:
        embeddings = text(encode(tokenizer, ["", *captions]).to(device)).last_hidden_state
        predicted: Tensor = unet(start.expand(len(embeddings), -1, -1, -1), 981, embeddings).sample
        norms: Tensor = torch.linalg.vector_norm((predicted[1:] - predicted[:1]).flatten(1), dim=1)
        return norms

    def evaluate(_: int) -> dict[str, float]:
        clean, odd = first_step_magnitudes(held_out), first_step_magnitudes(unfamiliar)
        found = {"held_out": float(clean.mean()), "unfamiliar": float(odd.mean())}
        for kind, captions in memorized.items():
            norms = first_step_magnitudes(captions)
            found |= {kind: float(norms.mean()), f"{kind}_above_99th": float((norms > clean.quantile(0.99)).float().mean())}
        return found

    before = 0
    for course in courses:
        if (done := directory / f"{course.name}.safetensors").exists():
            _load(done, unet=unet, text=text)
            before += course.steps
            continue
        loop.run(
            course.name, {"unet": unet, "text": text}, partial(step_loss, before), directory=directory, steps=course.steps,
            decay_from=course.decay_from, ema=0.999, evaluate=evaluate,
            groups=[
                {"params": list(unet.parameters()), "lr": course.learning_rate},
                {"params": list(text.parameters()), "lr": 0.3 * course.learning_rate},
            ],
        )  # fmt: skip
        _save(done, unet=unet, text=text)
        _load(done, unet=unet, text=text)
        before += course.steps
    return unet


def _save(path: Path, **modules: nn.Module) -> None:
    """Both networks in float16, in which the model ships: a course that starts from this file repeats on any machine that has it."""
    values = {f"{name}.{key}": value.half().cpu().contiguous() for name, module in modules.items() for key, value in module.state_dict().items()}
    replace_file(path, lambda temporary: save_file(values, temporary))


def _load(path: Path, **modules: nn.Module) -> None:
    values = load_file(path)
    for name, module in modules.items():
        module.load_state_dict({key.removeprefix(f"{name}."): value for key, value in values.items() if key.startswith(f"{name}.")})
