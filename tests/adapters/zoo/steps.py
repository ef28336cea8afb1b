"""Steps that are made in another way: in chunks and stages, by a model that changes on the way, for a lone sample, without guidance."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from tests.adapters.zoo import images
from tests.adapters.zoo.family import PROMPTS, Host, family, generator, quiet, randn, randomize
from tests.adapters.zoo.models import LENGTH, WIDTH, clip_text, sana_transformer, wan_vae
from tests.adapters.zoo.others import Words, run_of
from tests.adapters.zoo.transformers import host, text


@family("HeliosPyramidPipeline, sizes that grow, a first step of zeros", "c|u", roles=("fitted", "assumed"))
def _() -> Host:
    transformer = diffusers.HeliosTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=WIDTH,
        freq_dim=8,
        ffn_dim=16,
        num_layers=1,
        rope_dim=(4, 4, 4),
        guidance_cross_attn=False,
    )
    scheduler = diffusers.HeliosScheduler(stages=2, stage_range=[0, 0.5, 1], gamma=0.3)
    components = {"transformer": randomize(transformer), "scheduler": scheduler, "vae": wan_vae(), "text_encoder": None, "tokenizer": None}
    pipeline = quiet(diffusers.HeliosPyramidPipeline(is_cfg_zero_star=True, **components))
    chunks = {"num_frames": 9, "num_latent_frames_per_chunk": 3, "history_sizes": [4, 2, 1], "pyramid_num_inference_steps_list": [2, 2]}
    return Host(pipeline, run_of(pipeline, output_type="latent", height=64, width=64, **chunks, **text()), denoisers=("transformer",))


class TokenIds(Words):
    eos_token_id = 4

    def convert_tokens_to_ids(self, _: str) -> int:
        return 3


@family("Cosmos3OmniPipeline, a lone sample without its axis, token ids", "c|u", replay=r"nothing to replace.*input_ids \(\d+,\) int64")
def _() -> Host:
    transformer = diffusers.Cosmos3OmniTransformer(
        dtype="float32",
        head_dim=12,
        hidden_size=24,
        intermediate_size=16,
        latent_channel=4,
        num_attention_heads=2,
        num_hidden_layers=1,
        num_key_value_heads=2,
        patch_latent_dim=16,
        rope_scaling={"mrope_section": [2, 2, 2]},
        vocab_size=99,
    )
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    components = {"transformer": randomize(transformer), "text_tokenizer": TokenIds(), "scheduler": scheduler, "vae": wan_vae()}
    call = {"num_frames": 5, "height": 32, "width": 32, "enable_safety_check": False}
    built = host("Cosmos3OmniPipeline", {**components, "enable_safety_checker": False}, prompt="a", **call)
    built.pipeline.tokenize_prompt = lambda *_, **__: ([5, 6, 7, 8], [9, 10, 11, 12])  # as many: only the ids differ
    built.read = lambda output: torch.stack(list(output[0]))
    return built


@family("StableDiffusionGLIGENPipeline, layers switched off on the way", "uc", replay="have changed since")
def _() -> Host:
    components = images.parts(unet=images.unet(attention_type="gated"), text_encoder=clip_text(), tokenizer=Words())
    boxes = {"gligen_phrases": ["a"], "gligen_boxes": [[0.1, 0.1, 0.5, 0.5]], "gligen_scheduled_sampling_beta": 0.5}
    return images.host("StableDiffusionGLIGENPipeline", components=components, **boxes)


@family("StableDiffusionDiffEditPipeline, a scheduler for the way back", "uc")
def _() -> Host:
    inverse = diffusers.DDIMInverseScheduler(clip_sample=False)
    pipeline = quiet(
        diffusers.StableDiffusionDiffEditPipeline(**images.parts(text_encoder=clip_text(), tokenizer=Words(), inverse_scheduler=inverse))
    )
    call = {"mask_image": torch.ones(1, 8, 8), "image_latents": randn(1, 3, 4, 8, 8), "inpaint_strength": 0.75, "num_inference_steps": 4}
    return Host(pipeline, lambda: pipeline(prompt=["a red apple"], generator=generator(), output_type="latent", **call)[0])


@family("StableDiffusionControlNetPipeline, guess mode", "uc")
def _() -> Host:
    components = images.parts()
    components["controlnet"] = randomize(diffusers.ControlNetModel.from_unet(components["unet"], conditioning_embedding_out_channels=(4, 4)))
    return images.host("StableDiffusionControlNetPipeline", components=components, image=images.picture(), guess_mode=True)


@family("SanaSprintPipeline, distilled", "c", missing="guidance-distilled")
def _() -> Host:
    transformer = sana_transformer(guidance_embeds=True, qk_norm="rms_norm_across_heads")
    texts: dict[str, Any] = {"prompt_embeds": text()["prompt_embeds"], "prompt_attention_mask": torch.ones(PROMPTS, LENGTH)}
    components = {"transformer": transformer, "scheduler": diffusers.SCMScheduler()}
    return host("SanaSprintPipeline", components, height=32, width=32, use_resolution_binning=False, intermediate_timesteps=None, **texts)


@family("LTXConditionPipeline, frames given, times for every token", "uc")
def _() -> Host:
    import PIL.Image

    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=4,
        cross_attention_dim=8,
        num_layers=1,
        caption_channels=WIDTH,
    )
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        patch_size=1,
        encoder_causal=True,
    )
    components = {"transformer": randomize(transformer), "scheduler": FlowMatchEulerDiscreteScheduler(), "vae": vae.eval()}
    one = {name: value[:1] for name, value in text(mask=True).items()}
    call = {"image": PIL.Image.new("RGB", (32, 32), (200, 10, 10)), "frame_index": 4, "height": 32, "width": 32, "num_frames": 9}
    return host("LTXConditionPipeline", components, **call, **one)
