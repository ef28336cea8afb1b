"""Denoising loops of modular pipelines, and guiders that are not given the very predictions: copies, negated, converted, or parts."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, guiders
from diffusers.modular_pipelines.flux2.denoise import Flux2KleinBaseDenoiseStep
from diffusers.modular_pipelines.ltx2.denoise import LTX2DenoiseStep
from diffusers.modular_pipelines.qwenimage21.denoise import QwenImage21ImageConditionedDenoiseStep
from diffusers.modular_pipelines.wan.denoise import Wan22DenoiseStep
from diffusers.modular_pipelines.z_image.denoise import ZImageDenoiseStep

from tests.adapters.zoo.family import PROMPTS, STEPS, Host, family, quiet, randn, randomize
from tests.adapters.zoo.models import LENGTH, WIDTH, ltx2_transformer, wan_transformer, wan_vae, z_image_transformer
from tests.adapters.zoo.transformers import host, text

MATCHED: dict[str, Any] = {"roles": ("matched",)}


def loop(step: Any, components: dict[str, Any], *, latents: torch.Tensor, sound: bool = False, **inputs: Any) -> Host:
    """The denoising loop of a modular pipeline, given what the blocks before it would have made."""
    pipeline, scheduler = quiet(step().init_pipeline()), FlowMatchEulerDiscreteScheduler()
    guided = {"guider": guiders.ClassifierFreeGuidance(guidance_scale=5.0), **components}
    pipeline.update_components(scheduler=scheduler, **guided)

    def run(**_: Any) -> Any:
        scheduler.set_timesteps(STEPS)
        more = {"audio_scheduler": copy.deepcopy(scheduler), "audio_latents": randn(PROMPTS, 5, 4, seed=8)} if sound else {}
        times = {"timesteps": scheduler.timesteps, "num_inference_steps": STEPS}
        return pipeline(latents=latents.clone(), output="latents", **times, **more, **inputs)

    return Host(pipeline, run, denoisers=("transformer",))


@family("Modular Z-Image, guider given negated predictions", "c|u", **MATCHED)
def _() -> Host:
    texts = {name: list(value) for name, value in text().items()}
    built = loop(ZImageDenoiseStep, {"transformer": z_image_transformer()}, latents=randn(PROMPTS, 4, 8, 8, seed=9), dtype=torch.float32, **texts)
    built.read = lambda output: torch.stack(list(output[0]))
    return built


@family("Modular Wan 2.2, a guider for each denoiser", "c|u", **MATCHED)
def _() -> Host:
    components = {"transformer": wan_transformer(), "transformer_2": wan_transformer(times=1.1)}
    components["guider_2"] = guiders.ClassifierFreeGuidance(guidance_scale=3.0)
    built = loop(Wan22DenoiseStep, components, latents=randn(PROMPTS, 4, 2, 4, 4, seed=9), dtype=torch.float32, **text())
    built.pipeline.update_components(boundary_ratio=0.8)
    built.denoisers = ("transformer", "transformer_2")
    return built


@family("Modular QwenImage 2.1, tokens of an image first", "c|u", **MATCHED)
def _() -> Host:
    transformer = diffusers.QwenImage21Transformer2DModel(
        patch_size=1,
        in_channels=16,
        out_channels=16,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        context_in_dim=WIDTH,
        axes_dims_rope=(2, 2, 4),
    )
    masks = dict.fromkeys(("prompt_embeds_mask", "negative_prompt_embeds_mask"), torch.ones(PROMPTS, LENGTH, dtype=torch.bool))
    places = torch.tensor([[0, 1, 1, 1, 1]] * PROMPTS, dtype=torch.bool)  # of the picture in the text
    inputs = dict.fromkeys(("image_pad_mask", "negative_image_pad_mask"), places)
    inputs["img_shapes"] = [[(1, 4, 4), (1, 4, 4)]] * PROMPTS
    latents = {"latents": randn(PROMPTS, 16, 16, seed=9), "image_latents": randn(PROMPTS, 16, 16, seed=8)}
    fields = {**text(), **masks, **inputs}
    components = {"transformer": randomize(transformer)}
    built = loop(QwenImage21ImageConditionedDenoiseStep, components, use_kv_cache=False, denoiser_input_fields=fields, **latents, **inputs)
    built.read = lambda output: output[0][:, -16:]
    return built


@family("Modular Flux 2 Klein, tokens of an image last", "c|u", **MATCHED)
def _() -> Host:
    transformer = diffusers.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        timestep_guidance_channels=8,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=False,
    )
    places = dict.fromkeys(("image_latent_ids", "latent_ids"), torch.zeros(PROMPTS, 16, 4))
    places |= dict.fromkeys(("txt_ids", "negative_txt_ids"), torch.zeros(PROMPTS, LENGTH, 4))
    latents = {"latents": randn(PROMPTS, 16, 16, seed=9), "image_latents": randn(PROMPTS, 16, 16, seed=8)}
    return loop(Flux2KleinBaseDenoiseStep, {"transformer": randomize(transformer)}, **latents, **places, **text())


@family("Modular LTX 2, guiders for picture and sound given clean samples", "c|u|s|m", **MATCHED)
def _() -> Host:
    def guider(scale: float, **more: Any) -> Any:
        return guiders.LTX2Guidance(guidance_scale=scale, stg_scale=1.0, modality_scale=3.0, guidance_rescale=0.7, **more)

    components = {"guider": guider(3.0, spatio_temporal_guidance_blocks=[0]), "audio_guider": guider(7.0)}
    components["transformer"] = ltx2_transformer(perturbed_attn=True)
    names = ("connector_prompt_embeds", "negative_connector_prompt_embeds", "connector_audio_prompt_embeds", "negative_connector_audio_prompt_embeds")
    inputs: dict[str, Any] = {name: randn(PROMPTS, LENGTH, WIDTH, seed=seed) for seed, name in enumerate(names)}
    inputs |= dict.fromkeys(("connector_attention_mask", "negative_connector_attention_mask"), torch.ones(PROMPTS, LENGTH, dtype=torch.long))
    places = {"video_coords": randn(PROMPTS, 3, 3, 2).sigmoid(), "audio_coords": randn(PROMPTS, 1, 5, 2).sigmoid()}
    size = {"height": 32, "width": 32, "num_frames": 17, "frame_rate": 25.0, "dtype": torch.float32}
    fields = {"audio_num_frames": 5, **places}
    return loop(LTX2DenoiseStep, components, latents=randn(PROMPTS, 3, 4, seed=9), sound=True, denoiser_input_fields=fields, **size, **inputs)


@family("MotifVideoPipeline, guider given copies", "c|u", **MATCHED)
def _() -> Host:
    transformer = diffusers.MotifVideoTransformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_single_layers=1,
        patch_size=2,
        patch_size_t=1,
        text_embed_dim=WIDTH,
        rope_axes_dim=(4, 4, 4),
    )
    guider = guiders.AdaptiveProjectedGuidance(guidance_scale=8.0, adaptive_projected_guidance_rescale=12.0, use_original_formulation=True)
    components = {"transformer": randomize(transformer), "scheduler": FlowMatchEulerDiscreteScheduler(), "vae": wan_vae()}
    components |= {"feature_extractor": None, "guider": guider}
    return host("MotifVideoPipeline", components, height=32, width=32, num_frames=5, **text(mask=True))


@family("HunyuanImagePipeline, AdaptiveProjectedMixGuidance", "c|u", **MATCHED)
def _() -> Host:
    transformer = diffusers.HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=WIDTH,
        text_embed_2_dim=WIDTH,
        rope_axes_dim=(4, 4),
    )
    guider = guiders.AdaptiveProjectedMixGuidance(guidance_scale=5.0, adaptive_projected_guidance_start_step=1)
    components = {"transformer": randomize(transformer), "scheduler": FlowMatchEulerDiscreteScheduler(), "vae": None, "guider": guider}
    second = {"prompt_embeds_2": randn(PROMPTS, LENGTH, WIDTH, seed=4), "negative_prompt_embeds_2": randn(PROMPTS, LENGTH, WIDTH, seed=5)}
    names = ("prompt_embeds_mask", "negative_prompt_embeds_mask", "prompt_embeds_mask_2", "negative_prompt_embeds_mask_2")
    return host("HunyuanImagePipeline", components, height=128, width=128, **text(), **second, **dict.fromkeys(names, torch.ones(PROMPTS, LENGTH)))
