"""Stable Diffusion 1 and XL with everything that can be put on them; one batched call with the unconditional half first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import diffusers
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel

from tests.adapters.zoo.family import PROMPTS, STEPS, Host, family, generator, quiet, randn, randomize
from tests.adapters.zoo.models import LENGTH, WIDTH, ddim

if TYPE_CHECKING:
    import torch


def unet(**changes: Any) -> UNet2DConditionModel:
    config = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }
    return randomize(UNet2DConditionModel(**{**config, **changes}))


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=2
    ).eval()


def parts(**changes: Any) -> dict[str, Any]:
    return {
        "vae": vae(),
        "text_encoder": None,
        "tokenizer": None,
        "unet": unet(),
        "scheduler": ddim(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
        **changes,
    }


def text() -> dict[str, Any]:
    return {"prompt_embeds": randn(PROMPTS, LENGTH, WIDTH), "negative_prompt_embeds": randn(PROMPTS, LENGTH, WIDTH, seed=1)}


def picture(channels: int = 3, size: int = 16) -> torch.Tensor:
    return randn(PROMPTS, channels, size, size, seed=7).sigmoid()


def host(name: str, *, components: dict[str, Any] | None = None, **call: Any) -> Host:
    pipeline = quiet(getattr(diffusers, name)(**(components or parts())))
    arguments = {**text(), "num_inference_steps": STEPS, "output_type": "latent", **call}
    return Host(pipeline, lambda **more: pipeline(generator=generator(), **{**arguments, **more})[0])


@family("StableDiffusionPipeline", "uc")
def _() -> Host:
    return host("StableDiffusionPipeline")


@family("StableDiffusionPipeline, guidance_rescale", "uc")
def _() -> Host:
    return host("StableDiffusionPipeline", guidance_rescale=0.7)


@family("StableDiffusionPipeline, two images a prompt", "uc")
def _() -> Host:
    return host("StableDiffusionPipeline", num_images_per_prompt=2)


@family("StableDiffusionPipeline, Heun", "uc")
def _() -> Host:
    return host("StableDiffusionPipeline", components=parts(scheduler=diffusers.HeunDiscreteScheduler()))


@family("StableDiffusionPipeline, PNDM", "uc")
def _() -> Host:
    return host("StableDiffusionPipeline", components=parts(scheduler=diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1)))


@family("StableDiffusionPipeline, v-prediction", "uc")
def _() -> Host:
    return host("StableDiffusionPipeline", components=parts(scheduler=ddim(prediction_type="v_prediction")))


@family("StableDiffusionPipeline, guidance off", "c", missing="guidance_scale above 1")
def _() -> Host:
    return host("StableDiffusionPipeline", guidance_scale=1.0)


@family("StableDiffusionPipeline, distilled", "c", missing="guidance-distilled")
def _() -> Host:
    return host("StableDiffusionPipeline", components=parts(unet=unet(time_cond_proj_dim=8)))


@family("StableDiffusionImg2ImgPipeline", "uc")
def _() -> Host:
    return host("StableDiffusionImg2ImgPipeline", image=picture(), strength=0.7, num_inference_steps=4)


@family("StableDiffusionInpaintPipeline", "uc")
def _() -> Host:
    components = parts(unet=unet(in_channels=9))
    return host("StableDiffusionInpaintPipeline", components=components, image=picture(), mask_image=picture(1).round(), height=16, width=16)


@family("StableDiffusionControlNetPipeline", "uc")
def _() -> Host:
    components = parts()
    components["controlnet"] = randomize(ControlNetModel.from_unet(components["unet"], conditioning_embedding_out_channels=(4, 4)))
    return host("StableDiffusionControlNetPipeline", components=components, image=picture())


@family("StableDiffusionPAGPipeline", "ucp")
def _() -> Host:
    return host("StableDiffusionPAGPipeline", pag_scale=3.0)


@family("StableDiffusionPAGPipeline, perturbed attention alone", "cp", missing="same conditioning")
def _() -> Host:
    return host("StableDiffusionPAGPipeline", pag_scale=3.0, guidance_scale=0.0)


@family("StableDiffusionInstructPix2PixPipeline", "cun", roles=("matched",))
def _() -> Host:
    # The second prediction is made without the text, the third without the image too: what the text does shows in the first two.
    name, components = "StableDiffusionInstructPix2PixPipeline", parts(unet=unet(in_channels=8))
    return host(name, components=components, image=picture(), guidance_scale=7.5, image_guidance_scale=1.5)


@family("StableDiffusionSAGPipeline", "uc|s")
def _() -> Host:
    components = parts()
    components.pop("requires_safety_checker")
    return host("StableDiffusionSAGPipeline", components=components, sag_scale=0.75)


@family("StableDiffusionPanoramaPipeline", "uc")
def _() -> Host:
    embeds = {"prompt_embeds": randn(1, LENGTH, WIDTH), "negative_prompt_embeds": randn(1, LENGTH, WIDTH, seed=1)}
    return host("StableDiffusionPanoramaPipeline", height=16, width=32, **embeds)


def xl_parts(**changes: Any) -> dict[str, Any]:
    denoiser = unet(addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=6 * 4 + WIDTH)
    return {
        "vae": vae(),
        "text_encoder": None,
        "tokenizer": None,
        "text_encoder_2": None,
        "tokenizer_2": None,
        "unet": denoiser,
        "scheduler": ddim(),
        **changes,
    }


def xl_text() -> dict[str, Any]:
    return {"pooled_prompt_embeds": randn(PROMPTS, WIDTH, seed=2), "negative_pooled_prompt_embeds": randn(PROMPTS, WIDTH, seed=3)}


@family("StableDiffusionXLPipeline", "uc")
def _() -> Host:
    return host("StableDiffusionXLPipeline", components=xl_parts(), **xl_text())


@family("StableDiffusionXLPAGPipeline", "ucp")
def _() -> Host:
    return host("StableDiffusionXLPAGPipeline", components=xl_parts(), pag_scale=2.0, **xl_text())
