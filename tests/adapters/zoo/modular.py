"""Modular pipelines, with every kind of guider: the guider is given its predictions by name."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers import guiders
from diffusers.modular_pipelines.stable_diffusion_xl.modular_blocks_stable_diffusion_xl import StableDiffusionXLCoreDenoiseStep

from tests.adapters.zoo import images
from tests.adapters.zoo.family import STEPS, Host, family, generator, quiet

LAYERS = "down_blocks.1.attentions.0.transformer_blocks"


def host(guider: Any) -> Host:
    components = images.xl_parts()
    pipeline = StableDiffusionXLCoreDenoiseStep().init_pipeline()
    scheduler = diffusers.EulerDiscreteScheduler()
    pipeline.update_components(unet=components["unet"], vae=components["vae"], scheduler=scheduler, guider=guider)
    quiet(pipeline)
    arguments = {"num_inference_steps": STEPS, "height": 16, "width": 16, **images.text(), **images.xl_text()}
    return Host(pipeline, lambda: pipeline(generator=generator(), output="latents", **arguments))


def skip(**what: bool) -> Any:
    return diffusers.hooks.LayerSkipConfig(indices=[0], fqn=LAYERS, **what)


MATCHED: dict[str, Any] = {"roles": ("matched",)}


@family("Modular SDXL, ClassifierFreeGuidance", "c|u", **MATCHED)
def _() -> Host:
    return host(guiders.ClassifierFreeGuidance(guidance_scale=5.0))


@family("Modular SDXL, ClassifierFreeGuidance in an interval", "c|u", "c", **MATCHED)
def _() -> Host:
    return host(guiders.ClassifierFreeGuidance(guidance_scale=5.0, start=0.3, stop=0.9))


@family("Modular SDXL, guidance off", "c", missing="Give the pipeline a guider")
def _() -> Host:
    return host(guiders.ClassifierFreeGuidance(guidance_scale=1.0))


@family("Modular SDXL, AdaptiveProjectedGuidance", "c|u", **MATCHED)
def _() -> Host:
    return host(guiders.AdaptiveProjectedGuidance(guidance_scale=5.0))


@family("Modular SDXL, AutoGuidance", "c|u", **MATCHED)
def _() -> Host:
    return host(guiders.AutoGuidance(guidance_scale=5.0, auto_guidance_config=skip()))


@family("Modular SDXL, ClassifierFreeZeroStarGuidance", "c|u", **MATCHED)
def _() -> Host:
    return host(guiders.ClassifierFreeZeroStarGuidance(guidance_scale=5.0, zero_init_steps=1))


@family("Modular SDXL, PerturbedAttentionGuidance", "c|u|p", "c|u", **MATCHED)
def _() -> Host:
    return host(guiders.PerturbedAttentionGuidance(guidance_scale=5.0, perturbed_guidance_config=skip(), perturbed_guidance_stop=1.0))


@family("Modular SDXL, SkipLayerGuidance", "c|u|p", "c|u", **MATCHED)
def _() -> Host:
    return host(guiders.SkipLayerGuidance(guidance_scale=5.0, skip_layer_config=skip(), skip_layer_guidance_start=0.3, skip_layer_guidance_stop=1.0))


@family("Modular SDXL, SmoothedEnergyGuidance", "c|u|p", "c|u", **MATCHED)
def _() -> Host:
    config = diffusers.hooks.SmoothedEnergyGuidanceConfig(indices=[0], fqn=LAYERS)
    return host(guiders.SmoothedEnergyGuidance(guidance_scale=5.0, seg_guidance_config=config, seg_guidance_stop=1.0))


@family("Modular SDXL, TangentialClassifierFreeGuidance", "c|u", **MATCHED)
def _() -> Host:
    return host(guiders.TangentialClassifierFreeGuidance(guidance_scale=5.0))
