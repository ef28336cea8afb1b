"""More predictions a step, more inputs, and combinations that are no plain weighted sums."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers
from diffusers import FlowMatchEulerDiscreteScheduler

from tests.adapters.zoo import images
from tests.adapters.zoo.family import PROMPTS, STEPS, Host, family, generator, quiet, randn, randomize
from tests.adapters.zoo.models import (
    LENGTH,
    WIDTH,
    clip_text,
    ddim,
    flux_transformer,
    movq,
    pixart_transformer,
    sana_transformer,
    wan_transformer,
    wan_vae,
)
from tests.adapters.zoo.others import Words, run_of
from tests.adapters.zoo.transformers import host, text
from tests.adapters.zoo.videos import VIDEO


def worded(name: str, **call: Any) -> Host:
    """A Stable Diffusion pipeline that wants words."""
    pipeline = quiet(getattr(diffusers, name)(**images.parts(text_encoder=clip_text(), tokenizer=Words())))
    arguments = {"prompt": ["a red apple", "two boats"], "num_inference_steps": STEPS, "output_type": "latent", **call}
    return Host(pipeline, lambda: pipeline(generator=generator(), **arguments)[0])


@family("SemanticStableDiffusionPipeline, an edit", "uce")
def _() -> Host:
    return worded("SemanticStableDiffusionPipeline", editing_prompt=["some glasses"], edit_warmup_steps=0, edit_threshold=0.5)


@family("StableDiffusionPipelineSafe", "ucs")
def _() -> Host:
    return worded("StableDiffusionPipelineSafe")


@family("StableDiffusionXLImg2ImgPipeline", "uc")
def _() -> Host:
    return images.host(
        "StableDiffusionXLImg2ImgPipeline",
        components=images.xl_parts(),
        image=images.picture(),
        strength=0.9,
        num_inference_steps=4,
        **images.xl_text(),
    )


@family("StableDiffusionXLControlNetPAGPipeline", "ucp")
def _() -> Host:
    components = images.xl_parts()
    components["controlnet"] = randomize(diffusers.ControlNetModel.from_unet(components["unet"], conditioning_embedding_out_channels=(4, 4)))
    return images.host("StableDiffusionXLControlNetPAGPipeline", components=components, image=images.picture(), pag_scale=2.0, **images.xl_text())


@family("SanaPAGPipeline", "ucp")
def _() -> Host:
    vae = diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
    )
    components = {"transformer": sana_transformer(2), "vae": vae, "scheduler": FlowMatchEulerDiscreteScheduler()}
    return host(
        "SanaPAGPipeline", components, height=32, width=32, use_resolution_binning=False, negative_prompt=None, pag_scale=2.0, **text(mask=True)
    )


@family("PixArtSigmaPAGPipeline, learned variance", "ucp")
def _() -> Host:
    components = {"transformer": pixart_transformer(), "scheduler": ddim(), "vae": images.vae()}
    call = {"height": 16, "width": 16, "use_resolution_binning": False, "negative_prompt": None, "pag_scale": 2.0}
    return host("PixArtSigmaPAGPipeline", components, **call, **text(mask=True))


@family("FluxKontextPipeline, tokens of a reference image", "c|u")
def _() -> Host:
    vae = images.vae()
    vae.register_to_config(shift_factor=0.0)
    components = {"transformer": flux_transformer(), "scheduler": FlowMatchEulerDiscreteScheduler(), "vae": vae}
    call = {"image": images.picture(size=32), "height": 16, "width": 16, "max_area": 16 * 16, "true_cfg_scale": 4.0, "_auto_resize": False}
    return host("FluxKontextPipeline", components, **call, **text(pooled=6))


@family("WanImageToVideoPipeline, image channels", "c|u")
def _() -> Host:
    components = {"transformer": wan_transformer(in_channels=12), "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0), "vae": wan_vae()}
    image = images.picture(size=32)[:1]
    one = {name: value[:1] for name, value in text().items()}
    return host("WanImageToVideoPipeline", components, image=image, image_embeds=None, **VIDEO, **one)


def cosmos_transformer(**changes: Any) -> torch.nn.Module:
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 1,
        "text_embed_dim": WIDTH,
        "adaln_lora_dim": 4,
        "max_size": (4, 32, 32),
        "patch_size": (1, 2, 2),
        "rope_scale": (1.0, 4.0, 4.0),
        "concat_padding_mask": False,
        "extra_pos_embed_type": None,
    }
    return randomize(diffusers.CosmosTransformer3DModel(**{**config, **changes}))


class Safe:
    """Stands in for Cosmos's checker."""

    def to(self, _: Any) -> None:
        pass

    def check_text_safety(self, _: str) -> bool:
        return True


@family("Cosmos2TextToImagePipeline, c + w (c - u), converted", "c|u")
def _() -> Host:
    components = {"transformer": cosmos_transformer(), "scheduler": FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True), "vae": wan_vae()}
    return host("Cosmos2TextToImagePipeline", {**components, "safety_checker": Safe()}, height=32, width=32, **text())


@family("Kandinsky3Pipeline, (w + 1) c - w u", "uc")
def _() -> Host:
    unet = diffusers.Kandinsky3UNet(
        in_channels=4,
        time_embedding_dim=4,
        groups=2,
        attention_head_dim=4,
        layers_per_block=3,
        block_out_channels=(32, 64),
        cross_attention_dim=4,
        encoder_hid_dim=WIDTH,
    )
    vae = movq(block_out_channels=(32, 64), norm_num_groups=32, norm_type="spatial")
    t5 = transformers.T5EncoderModel(transformers.T5Config(vocab_size=99, d_model=WIDTH, d_kv=2, d_ff=8, num_layers=1, num_heads=2)).eval()
    components = {"unet": randomize(unet), "movq": vae, "tokenizer": Words(), "text_encoder": t5, "scheduler": diffusers.DDPMScheduler()}
    pipeline = quiet(diffusers.Kandinsky3Pipeline(**components))
    ones = torch.ones(PROMPTS, LENGTH)
    call = {"height": 16, "width": 16, "output_type": "latent", "attention_mask": ones, "negative_attention_mask": ones, **images.text()}
    return Host(pipeline, run_of(pipeline, num_inference_steps=STEPS, **call))


@family("PRXPipeline", "uc")
def _() -> Host:
    transformer = diffusers.PRXTransformer2DModel(
        in_channels=4, patch_size=1, context_in_dim=WIDTH, hidden_size=8, mlp_ratio=2.0, num_heads=2, depth=1, axes_dim=[2, 2]
    )
    components = {"transformer": randomize(transformer), "scheduler": FlowMatchEulerDiscreteScheduler(), "vae": images.vae()}
    one = {name: value[:1] for name, value in text().items()}  # its times are made for one prompt
    return host("PRXPipeline", components, height=16, width=16, use_resolution_binning=False, negative_prompt=None, **one)


@family("LEditsPPPipelineStableDiffusion, an edit", "uc", "x|x|x|uc", roles=("fitted", "assumed"))
def _() -> Host:
    scheduler = diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_order=2)
    pipeline = quiet(diffusers.LEditsPPPipelineStableDiffusion(**images.parts(text_encoder=clip_text(), tokenizer=Words(), scheduler=scheduler)))
    picture = images.picture(size=32)[:1] * 2 - 1

    def run() -> Any:
        pipeline.invert(image=picture, num_inversion_steps=STEPS, skip=0.1, generator=generator())
        arguments = {"edit_guidance_scale": 8.0, "edit_threshold": 0.3, "use_intersect_mask": False, "output_type": "latent"}
        return pipeline(editing_prompt=["a red apple"], generator=generator(), **arguments)[0]

    return Host(pipeline, run)


@family("StableDiffusionAttendAndExcitePipeline, calls for its own ends", "x|x|uc", "x|uc", "uc")
def _() -> Host:
    pipeline = quiet(diffusers.StableDiffusionAttendAndExcitePipeline(**images.parts(text_encoder=clip_text(), tokenizer=Words())))
    arguments = {"token_indices": [1, 2], "max_iter_to_alter": 2, "thresholds": {0: 0.0}, "attn_res": (4, 4)}
    arguments |= {"num_inference_steps": STEPS, "output_type": "latent", "height": 16, "width": 16}
    return Host(pipeline, lambda: pipeline("a red apple", generator=generator(), **arguments)[0])


@family("StableVideoDiffusionPipeline, no text", "uc")
def _() -> Host:
    unet = diffusers.UNetSpatioTemporalConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=6,
        num_attention_heads=2,
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=12,
        num_frames=2,
    )
    vae = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4, layers_per_block=1
    ).eval()
    config = transformers.CLIPVisionConfig(
        hidden_size=6, projection_dim=6, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )

    class Features:
        def __call__(self, images: torch.Tensor, **_: Any) -> Any:
            return transformers.BatchFeature({"pixel_values": torch.nn.functional.interpolate(images, (8, 8))})

    encoder = transformers.CLIPVisionModelWithProjection(config).eval()
    config = {"timestep_type": "continuous", "use_karras_sigmas": True, "sigma_min": 0.002, "sigma_max": 700.0}
    scheduler = diffusers.EulerDiscreteScheduler(prediction_type="v_prediction", **config)
    pipeline = quiet(
        diffusers.StableVideoDiffusionPipeline(
            vae=vae, image_encoder=encoder, unet=randomize(unet), scheduler=scheduler, feature_extractor=Features()
        )
    )
    call = {"image": images.picture(size=16), "num_frames": 2, "height": 16, "width": 16, "min_guidance_scale": 1.5, "output_type": "latent"}
    return Host(pipeline, run_of(pipeline, num_inference_steps=STEPS, **call))


@family("HunyuanVideo15Pipeline, guider", "c|u", roles=("matched",))
def _() -> Host:
    transformer = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=WIDTH,
        text_embed_2_dim=WIDTH,
        image_embed_dim=12,
        rope_axes_dim=(2, 2, 4),
        target_size=16,
        task_type="t2v",
    )
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(16, 16), layers_per_block=1, spatial_compression_ratio=2, temporal_compression_ratio=2
    )
    components = {"transformer": randomize(transformer), "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0), "vae": vae.eval()}
    components["guider"] = diffusers.guiders.ClassifierFreeGuidance(guidance_scale=5.0)
    ones = torch.ones(PROMPTS, LENGTH)
    second = {"prompt_embeds_2": randn(PROMPTS, LENGTH, WIDTH, seed=4), "negative_prompt_embeds_2": randn(PROMPTS, LENGTH, WIDTH, seed=5)}
    masks = dict.fromkeys(("prompt_embeds_mask", "negative_prompt_embeds_mask", "prompt_embeds_mask_2", "negative_prompt_embeds_mask_2"), ones)
    return host("HunyuanVideo15Pipeline", components, height=8, width=8, num_frames=5, **text(), **second, **masks)
