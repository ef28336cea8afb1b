"""Predictions in other forms: logits, channels last beside sound, more channels, a picture beside them, several stages."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from tests.adapters.zoo import images
from tests.adapters.zoo.family import PROMPTS, STEPS, Host, family, quiet, randn, randomize
from tests.adapters.zoo.models import LENGTH, WIDTH, clip_text, ddim, movq, prior, wan_vae
from tests.adapters.zoo.others import Words, run_of
from tests.adapters.zoo.transformers import host, text


@family("AmusedPipeline, logits", "uc")
def _() -> Host:
    transformer = diffusers.UVit2DModel(
        hidden_size=8,
        cond_embed_dim=8,
        micro_cond_encode_dim=2,
        micro_cond_embed_dim=10,
        encoder_hidden_size=WIDTH,
        vocab_size=20,
        codebook_size=12,
        in_channels=8,
        block_out_channels=8,
        num_res_blocks=1,
        block_num_heads=2,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        sample_size=8,
    )
    pooled = {"prompt_embeds": randn(PROMPTS, 8), "negative_prompt_embeds": randn(PROMPTS, 8, seed=1)}
    texts = {"encoder_hidden_states": randn(PROMPTS, LENGTH, WIDTH, seed=2), "negative_encoder_hidden_states": randn(PROMPTS, LENGTH, WIDTH, seed=3)}
    components = {"vqvae": movq(), "tokenizer": None, "text_encoder": None, "transformer": randomize(transformer)}
    pipeline = quiet(diffusers.AmusedPipeline(**components, scheduler=diffusers.AmusedScheduler(mask_token_id=19)))
    run = run_of(pipeline, num_inference_steps=STEPS, output_type="latent", height=16, width=16, **pooled, **texts)
    return Host(pipeline, run, denoisers=("transformer",))


@family("VQDiffusionPipeline, log probabilities", "uc")
def _() -> Host:
    from diffusers.pipelines.deprecated.vq_diffusion.pipeline_vq_diffusion import LearnedClassifierFreeSamplingEmbeddings

    transformer = diffusers.Transformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        num_layers=1,
        norm_num_groups=4,
        cross_attention_dim=WIDTH,
        sample_size=4,
        num_vector_embeds=12,
        activation_fn="geglu-approximate",
        num_embeds_ada_norm=10,
        norm_type="ada_norm",
        attention_bias=True,
    )
    components = {"vqvae": movq(num_vq_embeddings=11), "text_encoder": clip_text(), "tokenizer": Words(), "transformer": randomize(transformer)}
    components["learned_classifier_free_sampling_embeddings"] = LearnedClassifierFreeSamplingEmbeddings(learnable=False)
    scheduler = diffusers.VQDiffusionScheduler(num_vec_classes=12, num_train_timesteps=10)
    pipeline = quiet(diffusers.VQDiffusionPipeline(**components, scheduler=scheduler))
    run = run_of(pipeline, prompt=["a red apple", "two boats"], num_inference_steps=STEPS, output_type="pt")
    return Host(pipeline, run, denoisers=("transformer",))


@family("StableDiffusionLatentUpscalePipeline, one more channel", "uc")
def _() -> Host:
    components = {"vae": images.vae(), "text_encoder": None, "tokenizer": None}
    components["unet"] = images.unet(in_channels=8, out_channels=5, time_cond_proj_dim=128 + WIDTH)
    scheduler = diffusers.EulerDiscreteScheduler(prediction_type="sample")
    pipeline = quiet(diffusers.StableDiffusionLatentUpscalePipeline(**components, scheduler=scheduler))
    call = {"image": randn(PROMPTS, 4, 4, 4), "num_inference_steps": STEPS, "output_type": "latent", **images.text(), **images.xl_text()}
    return Host(pipeline, run_of(pipeline, **call), read=lambda output: output[0][:, :4])


@family("StableDiffusionUpscalePipeline, noise levels", "uc")
def _() -> Host:
    components = {"vae": images.vae(), "text_encoder": None, "tokenizer": None, "unet": images.unet(in_channels=7, num_class_embeds=100)}
    components |= {"low_res_scheduler": diffusers.DDPMScheduler(), "scheduler": ddim(prediction_type="v_prediction")}
    pipeline = quiet(diffusers.StableDiffusionUpscalePipeline(**components))
    return Host(pipeline, run_of(pipeline, image=images.picture(size=8), num_inference_steps=STEPS, output_type="latent", **images.text()))


@family("DreamLitePipeline, an edit beside its picture", "nuc", roles=("matched",))
def _() -> Host:
    components = {"text_encoder": clip_text(), "tokenizer": None, "processor": None, "vae": images.vae(), "unet": images.unet()}
    pipeline = quiet(diffusers.DreamLitePipeline(**components, scheduler=FlowMatchEulerDiscreteScheduler()))
    negative = randn(1, LENGTH, WIDTH)
    pipeline.encode_prompt = lambda **_: (torch.cat([negative, negative, randn(1, LENGTH, WIDTH, seed=1)]), torch.ones(3, LENGTH))
    pipeline.prepare_image_latents = lambda *_, **__: randn(1, 4, 8, 8, seed=7)
    call = {"image": images.picture(size=64)[:1], "num_inference_steps": STEPS, "height": 64, "width": 64, "output_type": "latent"}
    return Host(pipeline, run_of(pipeline, prompt="a", **call), read=lambda output: output[0][..., :8])


class Sound(torch.nn.Module):
    """Stands for Kandinsky 6's audio decoder and vocoder, of which only a few numbers are asked."""

    config = SimpleNamespace(sample_rate=16000, scaling_factor=1.0)
    latent_hop_length, dtype, device = 400, torch.float32, torch.device("cpu")


@family("Kandinsky6TI2VAPipeline, channels last, sound", "c|u")
def _() -> Host:
    transformer = diffusers.Kandinsky6Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=WIDTH,
        in_text_dim2=6,
        time_dim=8,
        model_dim=16,
        ff_dim=16,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(4, 2, 2),
        in_audio_dim=3,
        out_audio_dim=3,
        model_dim_a=16,
        time_dim_a=8,
        ff_dim_a=16,
        axes_dims_a=(8,),
    )
    components = {"transformer": randomize(transformer), "scheduler": FlowMatchEulerDiscreteScheduler(), "audio_vae": Sound(), "vocoder": Sound()}
    components |= {"text_encoder": clip_text(), "tokenizer": Words()}
    pooled = {"pooled_prompt_embeds": randn(PROMPTS, 6, seed=2), "negative_pooled_prompt_embeds": randn(PROMPTS, 6, seed=3)}
    return host("Kandinsky6TI2VAPipeline", components, height=32, width=32, num_frames=5, **text(), **pooled)


@family("NucleusMoEImagePipeline, renormalized at every token and negated", "c|u")
def _() -> Host:
    transformer = diffusers.NucleusMoEImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(2, 2, 4),
        dense_moe_strategy="all_moe",
        num_experts=2,
        moe_intermediate_dim=8,
        capacity_factors=0.5,
    )
    masks = dict.fromkeys(("prompt_embeds_mask", "negative_prompt_embeds_mask"), torch.ones(PROMPTS, LENGTH, dtype=torch.long))
    components = {"transformer": randomize(transformer), "scheduler": FlowMatchEulerDiscreteScheduler(), "vae": wan_vae(), "processor": None}
    return host("NucleusMoEImagePipeline", components, height=32, width=32, **text(), **masks)


class Conditions(torch.nn.Module):
    """Stands for ACE-Step's encoder of text, lyrics and timbre."""

    device = torch.device("cpu")
    silence_latent, null_condition_emb = randn(1, 800, 4, seed=5), randn(1, 1, WIDTH, seed=6)

    def forward(self, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return randn(PROMPTS, LENGTH, WIDTH), torch.ones(PROMPTS, LENGTH)


@family("AceStepPipeline, projected at every channel, with momentum", "cu")
def _() -> Host:
    transformer = diffusers.AceStepTransformer1DModel(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        in_channels=12,
        audio_acoustic_hidden_dim=4,
        encoder_hidden_size=WIDTH,
        sliding_window=8,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0)
    components = {"transformer": randomize(transformer), "scheduler": scheduler, "condition_encoder": Conditions(), "tokenizer": Words()}
    built = host("AceStepPipeline", components, prompt=["a", "b"], audio_duration=1.0, guidance_scale=7.0)
    built.pipeline.encode_prompt = lambda **_: (None,) * 4
    return built


@family("UnCLIPPipeline, a prior, a decoder, upscalers without guidance", "uc", "c")
def _() -> Host:
    from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel

    blocks = {
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "resnet_time_scale_shift": "scale_shift",
    }
    decoder = images.unet(in_channels=3, out_channels=6, cross_attention_dim=6, class_embed_type="identity", **blocks)

    def upscaler() -> torch.nn.Module:
        unet = diffusers.UNet2DModel(
            sample_size=16,
            in_channels=6,
            out_channels=3,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("ResnetDownsampleBlock2D",) * 2,
            up_block_types=("ResnetUpsampleBlock2D",) * 2,
            norm_num_groups=4,
            add_attention=False,
        )
        return randomize(unet)

    def scheduler(**config: Any) -> Any:
        return diffusers.UnCLIPScheduler(**{"variance_type": "fixed_small_log", "num_train_timesteps": 1000, **config})

    components = {"prior": prior(), "decoder": decoder, "super_res_first": upscaler(), "super_res_last": upscaler()}
    components |= {"text_encoder": clip_text(6, projection=6), "tokenizer": Words()}
    components["text_proj"] = randomize(UnCLIPTextProjModel(clip_embeddings_dim=6, time_embed_dim=32, cross_attention_dim=6))
    components["prior_scheduler"] = scheduler(prediction_type="sample", clip_sample_range=5.0)
    components |= {"decoder_scheduler": scheduler(variance_type="learned_range"), "super_res_scheduler": scheduler()}
    pipeline = quiet(diffusers.UnCLIPPipeline(**components))
    stages = ("prior", "decoder", "super_res")
    call = {f"{stage}_num_inference_steps": STEPS for stage in stages}
    run = run_of(pipeline, prompt=["a red apple", "two boats"], output_type="pt", **call)
    denoisers = ("prior", "decoder", "super_res_first", "super_res_last")
    return Host(pipeline, run, denoisers=denoisers, schedulers=tuple(f"{stage}_scheduler" for stage in stages))
