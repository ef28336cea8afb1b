"""Tiny denoisers and encoders that several families share."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers
from diffusers import DDIMScheduler

from tests.adapters.zoo.family import randomize

LENGTH, WIDTH = 5, 8  # of the texts
SIZE = 8  # of the latents


def ddim(**changes: Any) -> DDIMScheduler:
    return DDIMScheduler(**{"clip_sample": False, "steps_offset": 1, **changes})


def clip_text(width: int = WIDTH, *, projection: int = 0) -> torch.nn.Module:
    config = transformers.CLIPTextConfig(
        vocab_size=99,
        hidden_size=width,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        **({"projection_dim": projection} if projection else {}),
    )
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return randomize(kind(config))


def movq(**changes: Any) -> torch.nn.Module:
    config = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "num_vq_embeddings": 12,
        "vq_embed_dim": 4,
        **changes,
    }
    return diffusers.VQModel(**config).eval()


def prior(width: int = 6, **changes: Any) -> torch.nn.Module:
    config = {"num_embeddings": 8, "additional_embeddings": 4, **changes}
    return randomize(diffusers.PriorTransformer(num_attention_heads=2, attention_head_dim=4, embedding_dim=width, num_layers=1, **config))


def pixart_transformer() -> torch.nn.Module:
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=8,
        sample_size=SIZE,
        patch_size=2,
        caption_channels=WIDTH,
        use_additional_conditions=False,
    )
    return randomize(transformer)


def sana_transformer(layers: int = 1, **changes: Any) -> torch.nn.Module:
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=WIDTH,
        sample_size=SIZE,
        **changes,
    )
    return randomize(transformer)


def flux_transformer(**changes: Any) -> torch.nn.Module:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=6,
        axes_dims_rope=(2, 2, 4),
        **changes,
    )
    return randomize(transformer)


def z_image_transformer(**changes: Any) -> torch.nn.Module:
    transformer = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=16,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=1,
        n_kv_heads=1,
        cap_feat_dim=WIDTH,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
        **changes,
    )
    return randomize(transformer)


def wan_transformer(*, times: float = 1.0, **changes: Any) -> torch.nn.Module:
    """``times``: all weights are multiplied by it, for a second model that is another one."""
    config = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 1,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": WIDTH,
        "freq_dim": 8,
        "ffn_dim": 8,
        "num_layers": 1,
        "rope_max_seq_len": 16,
        **changes,
    }
    return scaled(randomize(diffusers.WanTransformer3DModel(**config)), times)


def scaled(module: torch.nn.Module, times: float) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(times)
    return module


def wan_vae() -> torch.nn.Module:
    return diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    ).eval()


def ltx2_transformer(**changes: Any) -> torch.nn.Module:
    transformer = diffusers.LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=1,
        caption_channels=WIDTH,
        rope_double_precision=False,
        rope_type="split",
        **changes,
    )
    return randomize(transformer)


def sound_vae() -> torch.nn.Module:
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 4),
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
    ).eval()


def vocoder() -> torch.nn.Module:
    config = transformers.SpeechT5HifiGanConfig(
        model_in_dim=8,
        sampling_rate=16000,
        upsample_initial_channel=8,
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1]],
        normalize_before=False,
    )
    return transformers.SpeechT5HifiGan(config).eval()
