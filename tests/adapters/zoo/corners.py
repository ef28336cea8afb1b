"""Denoisers that take what they are given apart, times of their own for a part of a sample, and other corners."""

from __future__ import annotations

import diffusers
import torch

from tests.adapters.zoo import images
from tests.adapters.zoo.family import Host, family, randomize
from tests.adapters.zoo.transformers import hunyuan_dit


def adapter(channels: tuple[int, ...], kind: str) -> torch.nn.Module:
    return randomize(diffusers.T2IAdapter(in_channels=3, channels=list(channels), num_res_blocks=1, downscale_factor=2, adapter_type=kind))


BLOCKS = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}


@family("StableDiffusionAdapterPipeline, residuals that the denoiser pops", "uc")
def _() -> Host:
    components = images.parts(unet=images.unet(**BLOCKS), adapter=adapter((8, 16), "full_adapter"))
    return images.host("StableDiffusionAdapterPipeline", components=components, image=images.picture(), height=16, width=16)


@family("StableDiffusionXLAdapterPipeline, residuals that the denoiser pops", "uc")
def _() -> Host:
    components = {**images.xl_parts(), "adapter": adapter((8, 16), "full_adapter")}
    components["unet"] = images.unet(**{**components["unet"].config, **BLOCKS})
    return images.host("StableDiffusionXLAdapterPipeline", components=components, image=images.picture(), height=16, width=16, **images.xl_text())


@family("HunyuanDiTControlNetPipeline, residuals that the denoiser pops", "uc")
def _() -> Host:
    def controlnet(transformer: torch.nn.Module) -> torch.nn.Module:
        return randomize(
            diffusers.HunyuanDiT2DControlNetModel.from_transformer(transformer, transformer_num_layers=2, load_weights_from_transformer=False)
        )

    return hunyuan_dit("HunyuanDiTControlNetPipeline", controlnet=controlnet, control_image=images.picture())
