"""Denoisers that take what they are given apart, times of their own for a part of a sample, and other corners."""

from __future__ import annotations

from typing import TYPE_CHECKING

import diffusers
from diffusers import FlowMatchEulerDiscreteScheduler

from tests.adapters.zoo import images
from tests.adapters.zoo.extras import Safe, cosmos_transformer
from tests.adapters.zoo.family import Host, family, randomize
from tests.adapters.zoo.models import wan_transformer, wan_vae
from tests.adapters.zoo.transformers import host, hunyuan_dit, text
from tests.adapters.zoo.videos import VIDEO

if TYPE_CHECKING:
    import torch


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


@family("WanPipeline, a time for every token", "c|u")
def _() -> Host:
    components = {"transformer": wan_transformer(), "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0), "vae": wan_vae()}
    return host("WanPipeline", {**components, "expand_timesteps": True}, **VIDEO, **text())


@family("WanImageToVideoPipeline, a time for every token", "c|u")
def _() -> Host:
    components = {"transformer": wan_transformer(), "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0), "vae": wan_vae()}
    one = {name: value[:1] for name, value in text().items()}
    return host("WanImageToVideoPipeline", {**components, "expand_timesteps": True}, image=images.picture(size=32)[:1], **VIDEO, **one)


@family("Cosmos2VideoToWorldPipeline, a time for every frame", "c|u", roles=("assumed",))  # the given frame is put over the predictions
def _() -> Host:
    components = {"transformer": cosmos_transformer(in_channels=5), "scheduler": FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)}
    components |= {"vae": wan_vae(), "safety_checker": Safe()}
    return host("Cosmos2VideoToWorldPipeline", components, image=images.picture(size=32)[:1], **VIDEO, **{n: v[:1] for n, v in text().items()})
