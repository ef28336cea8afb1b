"""Families with several text encoders, with sound beside the picture, with frames that share a text, and second stages."""

from __future__ import annotations

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from tests.adapters.zoo import images
from tests.adapters.zoo.family import PROMPTS, STEPS, Host, family, quiet, randn, randomize
from tests.adapters.zoo.models import LENGTH, WIDTH, clip_text, ltx2_transformer
from tests.adapters.zoo.others import Words, cascade, cascade_text, run_of
from tests.adapters.zoo.transformers import host, text


@family("LTX2Pipeline, all its guidance, sound", "uc|s|m")
def _() -> Host:
    connectors = diffusers.pipelines.ltx2.LTX2TextConnectors(
        caption_channels=WIDTH,
        text_proj_in_factor=1,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=4,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=4,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
        connector_rope_base_seq_len=32,
        rope_theta=10000.0,
        rope_double_precision=False,
        causal_temporal_positioning=False,
        rope_type="split",
    )
    vae = diffusers.AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    audio_vae = diffusers.AutoencoderKLLTX2Audio(
        base_channels=4,
        output_channels=2,
        ch_mult=(1,),
        num_res_blocks=1,
        attn_resolutions=None,
        in_channels=2,
        resolution=32,
        latent_channels=2,
        norm_type="pixel",
        causality_axis="height",
        dropout=0.0,
        mid_block_add_attention=False,
        sample_rate=16000,
        mel_hop_length=160,
        is_causal=True,
        mel_bins=8,
    )
    vocoder = diffusers.pipelines.ltx2.vocoder.LTX2Vocoder(
        in_channels=16,
        hidden_channels=32,
        out_channels=2,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
        leaky_relu_negative_slope=0.1,
        output_sampling_rate=16000,
    )
    components = {"transformer": ltx2_transformer(), "scheduler": FlowMatchEulerDiscreteScheduler(), "vae": vae}
    components |= {"audio_vae": audio_vae, "connectors": connectors, "vocoder": vocoder}
    call = {"height": 32, "width": 32, "num_frames": 5, "frame_rate": 25.0, "spatio_temporal_guidance_blocks": [0]}
    return host("LTX2Pipeline", components, **call, **text(mask=True))


@family("HiDreamImagePipeline, four text encoders", "uc")
def _() -> Host:
    transformer = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=[WIDTH, WIDTH],
        text_emb_dim=6,
        num_routed_experts=2,
        num_activated_experts=2,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(8, 8),
        llama_layers=(0, 1),
        force_inference_output=True,
    )
    components = {"transformer": randomize(transformer), "scheduler": FlowMatchEulerDiscreteScheduler(), "vae": images.vae()}
    embeds = {"prompt_embeds_t5": randn(PROMPTS, LENGTH, WIDTH), "negative_prompt_embeds_t5": randn(PROMPTS, LENGTH, WIDTH, seed=1)}
    embeds["prompt_embeds_llama3"] = randn(2, PROMPTS, LENGTH, WIDTH, seed=2)  # two layers
    embeds["negative_prompt_embeds_llama3"] = randn(2, PROMPTS, LENGTH, WIDTH, seed=3)
    embeds |= {"pooled_prompt_embeds": randn(PROMPTS, 6, seed=4), "negative_pooled_prompt_embeds": randn(PROMPTS, 6, seed=5)}
    built = host("HiDreamImagePipeline", {**components, "text_encoder_4": None, "tokenizer_4": None}, height=16, width=16, **embeds)
    built.pipeline.default_sample_size = 8  # it enlarges what it is asked for to this
    return built


@family("Kandinsky5T2VPipeline", "c|u")
def _() -> Host:
    transformer = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=WIDTH,
        in_text_dim2=6,
        time_dim=8,
        out_visual_dim=4,
        model_dim=16,
        ff_dim=16,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(4, 2, 2),
    )
    components = {"transformer": randomize(transformer), "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0)}
    bounds = torch.tensor([0, LENGTH, 2 * LENGTH], dtype=torch.int32)
    embeds = {"prompt_embeds_qwen": randn(PROMPTS, LENGTH, WIDTH), "negative_prompt_embeds_qwen": randn(PROMPTS, LENGTH, WIDTH, seed=2)}
    embeds |= {"prompt_embeds_clip": randn(PROMPTS, 6, seed=1), "negative_prompt_embeds_clip": randn(PROMPTS, 6, seed=3)}
    embeds |= {"prompt_cu_seqlens": bounds, "negative_prompt_cu_seqlens": bounds}
    return host("Kandinsky5T2VPipeline", components, height=32, width=32, num_frames=5, **embeds)


@family("StableCascadeDecoderPipeline", "cu")
def _() -> Host:
    components = {
        "decoder": cascade("StableCascadeUNet"),
        "text_encoder": clip_text(projection=6),
        "tokenizer": Words(),
    }
    scheduler = diffusers.DDPMWuerstchenScheduler()
    pipeline = quiet(diffusers.StableCascadeDecoderPipeline(**components, scheduler=scheduler, vqgan=None, latent_dim_scale=4.0))
    call = {"image_embeddings": randn(PROMPTS, 4, 4, 4), "guidance_scale": 3.0, "num_inference_steps": STEPS, "output_type": "latent"}
    return Host(pipeline, run_of(pipeline, **call, **cascade_text()), denoisers=("decoder",))


@family("AnimateDiffPAGPipeline, text repeated for every frame", "ucp")
def _() -> Host:
    adapter = diffusers.MotionAdapter(
        block_out_channels=(8, 16), motion_layers_per_block=1, motion_norm_num_groups=2, motion_num_attention_heads=2, motion_max_seq_length=8
    )
    components = images.parts(motion_adapter=adapter)
    for name in ("safety_checker", "feature_extractor", "requires_safety_checker"):
        components.pop(name)
    return images.host("AnimateDiffPAGPipeline", components=components, num_frames=4, pag_scale=2.0)


@family("AllegroPipeline, an axis before the tokens", "uc")
def _() -> Host:
    transformer = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        cross_attention_dim=24,
        sample_width=8,
        sample_height=8,
        sample_frames=8,
        caption_channels=WIDTH,
    )
    vae = diffusers.AutoencoderKLAllegro(
        down_block_types=("AllegroDownBlock3D",) * 4,
        up_block_types=("AllegroUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    components = {"transformer": randomize(transformer), "scheduler": diffusers.EulerAncestralDiscreteScheduler(), "vae": vae.eval()}
    return host("AllegroPipeline", components, height=16, width=16, num_frames=8, negative_prompt=None, **text(mask=True))
