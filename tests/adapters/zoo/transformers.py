"""Image pipelines around transformers: batched in either order, two calls, distilled, renormalized, doubled batches."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from tests.adapters.zoo.family import PROMPTS, STEPS, Host, family, generator, quiet, randn, randomize
from tests.adapters.zoo.images import vae
from tests.adapters.zoo.models import LENGTH, SIZE, WIDTH, ddim, flux_transformer, pixart_transformer, sana_transformer, z_image_transformer


def host(name: str, components: dict[str, Any], **call: Any) -> Host:
    kind = getattr(diffusers, name)
    absent = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3", "vae"))
    accepted = diffusers.DiffusionPipeline._get_signature_keys(kind)[0]
    pipeline = quiet(kind(**{**{part: None for part in absent if part in accepted}, **components}))
    arguments = {"num_inference_steps": STEPS, "output_type": "latent", **call}
    return Host(pipeline, lambda **more: pipeline(generator=generator(), **{**arguments, **more})[0], denoisers=("transformer",))


def text(width: int = WIDTH, *, pooled: int = 0, mask: bool = False) -> dict[str, torch.Tensor]:
    found = {"prompt_embeds": randn(PROMPTS, LENGTH, width), "negative_prompt_embeds": randn(PROMPTS, LENGTH, width, seed=1)}
    if pooled:
        found |= {"pooled_prompt_embeds": randn(PROMPTS, pooled, seed=2), "negative_pooled_prompt_embeds": randn(PROMPTS, pooled, seed=3)}
    if mask:
        ones = torch.ones(PROMPTS, LENGTH, dtype=torch.long)
        found |= {"prompt_attention_mask": ones, "negative_prompt_attention_mask": ones}
    return found


def sd3(**call: Any) -> Host:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=SIZE,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=8,
        pooled_projection_dim=6,
        pos_embed_max_size=SIZE,
    )
    components = {"transformer": randomize(transformer), "scheduler": FlowMatchEulerDiscreteScheduler(), "vae": vae()}
    return host("StableDiffusion3Pipeline", components, height=16, width=16, **text(pooled=6), **call)


@family("StableDiffusion3Pipeline", "uc")
def _() -> Host:
    return sd3()


@family("StableDiffusion3Pipeline, skip-layer guidance", "uc", "uc|s")
def _() -> Host:
    return sd3(skip_guidance_layers=[0], skip_layer_guidance_start=0.1, skip_layer_guidance_stop=0.9)


def pixart(name: str) -> Host:
    components = {"transformer": pixart_transformer(), "scheduler": ddim(), "vae": vae()}
    return host(name, components, height=16, width=16, use_resolution_binning=False, negative_prompt=None, **text(mask=True))


@family("PixArtAlphaPipeline, learned variance", "uc")
def _() -> Host:
    return pixart("PixArtAlphaPipeline")


@family("PixArtSigmaPipeline, learned variance", "uc")
def _() -> Host:
    return pixart("PixArtSigmaPipeline")


@family("SanaPipeline", "uc")
def _() -> Host:
    components = {"transformer": sana_transformer(), "scheduler": FlowMatchEulerDiscreteScheduler()}
    return host("SanaPipeline", components, height=32, width=32, use_resolution_binning=False, negative_prompt=None, **text(mask=True))


def flux(*, guidance_embeds: bool, **call: Any) -> Host:
    components = {"transformer": flux_transformer(guidance_embeds=guidance_embeds), "scheduler": FlowMatchEulerDiscreteScheduler()}
    return host("FluxPipeline", components, height=32, width=32, **text(pooled=6), **call)


@family("FluxPipeline, true_cfg_scale", "c|u")
def _() -> Host:
    return flux(guidance_embeds=False, true_cfg_scale=4.0)


@family("FluxPipeline, distilled", "c", missing="guidance-distilled.*true_cfg_scale")
def _() -> Host:
    return flux(guidance_embeds=True)


@family("ChromaPipeline", "c|u")
def _() -> Host:
    transformer = diffusers.ChromaTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(2, 2, 4),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    ones = torch.ones(PROMPTS, LENGTH)  # it wants floating-point masks
    masks = {"prompt_attention_mask": ones, "negative_prompt_attention_mask": ones}
    components = {"transformer": randomize(transformer), "scheduler": FlowMatchEulerDiscreteScheduler()}
    return host("ChromaPipeline", components, height=32, width=32, **text(), **masks)


def dit(**call: Any) -> Host:
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=1, sample_size=SIZE, norm_num_groups=1
    )
    components = {"transformer": randomize(transformer), "scheduler": ddim(), "vae": vae()}
    pipeline = quiet(diffusers.DiTPipeline(**components))
    arguments = {"num_inference_steps": STEPS, "output_type": "np", **call}
    return Host(pipeline, lambda: pipeline([1, 2], generator=generator(), **arguments)[0], denoisers=("transformer",))


@family("DiTPipeline, doubled batch", "(cu)", replay=r"nothing to replace.*class_labels \(4,\) int64")
def _() -> Host:
    return dit()


@family("DiTPipeline, guidance off", "c", missing="guidance_scale above 1")
def _() -> Host:
    return dit(guidance_scale=1.0)


@family("LuminaPipeline, learned variance", "cu")
def _() -> Host:
    transformer = diffusers.LuminaNextDiT2DModel(
        sample_size=SIZE,
        patch_size=2,
        in_channels=4,
        hidden_size=8,
        num_layers=1,
        num_attention_heads=1,
        num_kv_heads=1,
        multiple_of=4,
        cross_attention_dim=WIDTH,
    )
    components = {"transformer": randomize(transformer), "scheduler": FlowMatchEulerDiscreteScheduler(), "vae": vae()}
    return host("LuminaPipeline", components, height=16, width=16, **text(mask=True))


@family("Lumina2Pipeline, renormalized, guidance in some steps only", "c|u", "c")
def _() -> Host:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=8,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=1,
        num_kv_heads=1,
        multiple_of=4,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(16, 16, 16),
        cap_feat_dim=WIDTH,
    )
    components = {"transformer": randomize(transformer), "scheduler": FlowMatchEulerDiscreteScheduler()}
    return host("Lumina2Pipeline", components, height=32, width=32, cfg_trunc_ratio=0.7, **text(mask=True))


def z_image(*lengths: int) -> Host:
    components = {"transformer": z_image_transformer(), "scheduler": FlowMatchEulerDiscreteScheduler(), "vae": vae()}
    prompts = [randn(length, WIDTH, seed=10 + place) for place, length in enumerate(lengths)]
    negatives = [randn(3, WIDTH, seed=2), randn(5, WIDTH, seed=3)]
    built = host("ZImagePipeline", components, height=32, width=32, prompt_embeds=prompts, negative_prompt_embeds=negatives)
    built.read = lambda output: torch.stack(list(output[0]))
    return built


@family("ZImagePipeline, negated, a list of embeddings", "cu")
def _() -> Host:
    return z_image(4, 4)


@family("ZImagePipeline, embeddings of different length", "cu", replay=r"different lengths in one call \(4, 6.*one prompt at a time")
def _() -> Host:
    return z_image(4, 6)


@family("QwenImagePipeline, renormalized", "c|u")
def _() -> Host:
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(2, 2, 4),
    )
    components = {"transformer": randomize(transformer), "scheduler": FlowMatchEulerDiscreteScheduler()}
    masks = {
        "prompt_embeds_mask": torch.ones(PROMPTS, LENGTH, dtype=torch.long),
        "negative_prompt_embeds_mask": torch.ones(PROMPTS, LENGTH, dtype=torch.long),
    }
    return host("QwenImagePipeline", components, height=32, width=32, **text(), **masks)


@family("CogView4Pipeline", "c|u")
def _() -> Host:
    transformer = diffusers.CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        text_embed_dim=WIDTH,
        time_embed_dim=8,
        condition_dim=4,
    )
    components = {
        "transformer": randomize(transformer),
        "scheduler": FlowMatchEulerDiscreteScheduler(base_shift=0.25, max_shift=0.75, base_image_seq_len=256),
    }
    return host("CogView4Pipeline", components, height=64, width=64, **text())


@family("AuraFlowPipeline", "uc")
def _() -> Host:
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=SIZE,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=8,
        pos_embed_max_size=64,
    )
    components = {"transformer": randomize(transformer), "scheduler": FlowMatchEulerDiscreteScheduler()}
    return host("AuraFlowPipeline", components, height=64, width=64, **text(mask=True))


def hunyuan_dit(name: str, **call: Any) -> Host:
    """Two texts; with ``controlnet=`` a function that makes one of the denoiser."""
    transformer = diffusers.HunyuanDiT2DModel(
        sample_size=SIZE,
        num_layers=2,
        patch_size=2,
        attention_head_dim=4,
        num_attention_heads=2,
        hidden_size=8,
        in_channels=4,
        cross_attention_dim=WIDTH,
        cross_attention_dim_t5=WIDTH,
        pooled_projection_dim=4,
        text_len=LENGTH,
        text_len_t5=LENGTH,
        activation_fn="gelu-approximate",
    )
    mask = torch.ones(PROMPTS, LENGTH)
    second = {"prompt_embeds_2": randn(PROMPTS, LENGTH, WIDTH, seed=4), "negative_prompt_embeds_2": randn(PROMPTS, LENGTH, WIDTH, seed=5)}
    masks = {"prompt_attention_mask_2": mask, "negative_prompt_attention_mask_2": mask}
    components = {
        "transformer": randomize(transformer),
        "scheduler": diffusers.DDPMScheduler(),
        "vae": vae(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    if "controlnet" in call:
        components["controlnet"] = call.pop("controlnet")(components["transformer"])
    return host(name, components, height=16, width=16, use_resolution_binning=False, **text(mask=True), **second, **masks, **call)


@family("HunyuanDiTPipeline, two text inputs", "uc")
def _() -> Host:
    return hunyuan_dit("HunyuanDiTPipeline")
