"""Video pipelines: two calls, two denoisers, frames as an axis or as a part of the batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import diffusers
from diffusers import FlowMatchEulerDiscreteScheduler

from tests.adapters.zoo import images
from tests.adapters.zoo.family import PROMPTS, Host, family, randomize
from tests.adapters.zoo.models import LENGTH, WIDTH, ddim, wan_transformer, wan_vae
from tests.adapters.zoo.transformers import host, text

if TYPE_CHECKING:
    import torch

VIDEO: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 5}


@family("WanPipeline", "c|u")
def _() -> Host:
    components = {"transformer": wan_transformer(), "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0), "vae": wan_vae()}
    return host("WanPipeline", components, **VIDEO, **text())


@family("WanPipeline, UniPC", "c|u")
def _() -> Host:
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return host("WanPipeline", {"transformer": wan_transformer(), "scheduler": scheduler, "vae": wan_vae()}, **VIDEO, **text())


@family("WanPipeline 2.2, two denoisers", "c|u")
def _() -> Host:
    components = {
        "transformer": wan_transformer(),
        "transformer_2": wan_transformer(times=1.1),
        "boundary_ratio": 0.8,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae": wan_vae(),
    }
    built = host("WanPipeline", components, guidance_scale_2=3.0, **VIDEO, **text())
    built.denoisers = ("transformer", "transformer_2")
    return built


@family("LTXPipeline", "uc")
def _() -> Host:
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=4,
        cross_attention_dim=8,
        num_layers=1,
        caption_channels=WIDTH,
    )
    components = {"transformer": randomize(transformer), "scheduler": FlowMatchEulerDiscreteScheduler()}
    return host("LTXPipeline", components, height=64, width=64, num_frames=9, **text(mask=True))


def cogvideox(scheduler: Any) -> Host:
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=4,
        text_embed_dim=WIDTH,
        num_layers=1,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=LENGTH,
    )
    components = {"transformer": randomize(transformer), "scheduler": scheduler}
    return host("CogVideoXPipeline", components, height=16, width=16, num_frames=8, max_sequence_length=LENGTH, **text())


@family("CogVideoXPipeline", "uc")
def _() -> Host:
    return cogvideox(diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction"))


@family("CogVideoXPipeline, DPM", "uc")
def _() -> Host:
    return cogvideox(diffusers.CogVideoXDPMScheduler(prediction_type="v_prediction"))


@family("AnimateDiffPipeline", "uc")
def _() -> Host:
    adapter = diffusers.MotionAdapter(
        block_out_channels=(8, 16), motion_layers_per_block=1, motion_norm_num_groups=2, motion_num_attention_heads=2, motion_max_seq_length=8
    )
    components = images.parts(motion_adapter=adapter)
    for name in ("safety_checker", "feature_extractor", "requires_safety_checker"):
        components.pop(name)
    components["unet"] = diffusers.UNetMotionModel.from_unet2d(images.unet(), adapter)
    return images.host("AnimateDiffPipeline", components=components, num_frames=4)


def frames_unet(kind: str, **changes: Any) -> torch.nn.Module:
    config = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
        "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "cross_attention_dim": WIDTH,
        "norm_num_groups": 4,
        **changes,
    }
    return randomize(getattr(diffusers, kind)(**config))


@family("TextToVideoSDPipeline, frames in the batch", "uc")
def _() -> Host:
    components = {"vae": images.vae(), "text_encoder": None, "tokenizer": None, "scheduler": ddim()}
    components["unet"] = frames_unet("UNet3DConditionModel", attention_head_dim=4)
    built = images.host("TextToVideoSDPipeline", components=components, num_frames=3, height=16, width=16)
    built.samples = PROMPTS
    return built


@family("LattePipeline, learned variance", "uc")
def _() -> Host:
    transformer = diffusers.LatteTransformer3DModel(
        sample_size=8,
        video_length=2,
        num_layers=1,
        patch_size=2,
        attention_head_dim=4,
        num_attention_heads=2,
        caption_channels=WIDTH,
        in_channels=4,
        cross_attention_dim=8,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
    )
    components = {"transformer": randomize(transformer), "scheduler": ddim(), "vae": images.vae()}
    return host("LattePipeline", components, height=16, width=16, video_length=2, negative_prompt=None, **text())


@family("MochiPipeline", "uc")
def _() -> Host:
    transformer = diffusers.MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=4,
        qk_norm="rms_norm",
        text_embed_dim=WIDTH,
        time_embed_dim=4,
        max_sequence_length=LENGTH,
    )
    components = {"transformer": randomize(transformer), "scheduler": FlowMatchEulerDiscreteScheduler()}
    bools = {name: value.bool() if "mask" in name else value for name, value in text(mask=True).items()}
    return host("MochiPipeline", components, height=32, width=32, num_frames=7, **bools)


@family("HunyuanVideoPipeline, true_cfg_scale", "c|u")
def _() -> Host:
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=WIDTH,
        pooled_projection_dim=6,
        rope_axes_dim=(2, 4, 4),
    )
    components = {"transformer": randomize(transformer), "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0)}
    bools = {name: value.bool() if "mask" in name else value for name, value in text(mask=True, pooled=6).items()}
    return host("HunyuanVideoPipeline", components, height=16, width=16, num_frames=5, true_cfg_scale=4.0, negative_prompt=None, **bools)
