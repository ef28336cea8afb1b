"""Pipelines that differ: pixels, priors and decoders, sound, and text that comes as something else than an embedding."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers
from diffusers import DDPMScheduler, DDPMWuerstchenScheduler

from tests.adapters.zoo import images
from tests.adapters.zoo.family import PROMPTS, STEPS, Host, family, generator, quiet, randn, randomize
from tests.adapters.zoo.models import WIDTH, clip_text, ddim, movq, prior, sound_vae, vocoder


def run_of(pipeline: Any, **arguments: Any) -> Any:
    return lambda **more: pipeline(generator=generator(), **{**arguments, **more})[0]


@family("IFPipeline, learned variance", "uc")
def _() -> Host:
    unet = images.unet(
        in_channels=3,
        out_channels=6,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        encoder_hid_dim=WIDTH,
        class_embed_type=None,
        act_fn="gelu",
        resnet_time_scale_shift="scale_shift",
        time_embedding_type="positional",
    )
    components = {"unet": unet, "scheduler": DDPMScheduler(variance_type="learned_range"), "safety_checker": None, "feature_extractor": None}
    pipeline = quiet(diffusers.IFPipeline(tokenizer=None, text_encoder=None, watermarker=None, requires_safety_checker=False, **components))
    return Host(pipeline, run_of(pipeline, num_inference_steps=STEPS, output_type="pt", height=8, width=8, **images.text()))


MOVQ: dict[str, Any] = {"block_out_channels": (32, 32), "norm_num_groups": 8, "num_vq_embeddings": 4, "norm_type": "spatial"}


def kandinsky_unet() -> torch.nn.Module:
    return images.unet(
        out_channels=8,
        encoder_hid_dim=6,
        encoder_hid_dim_type="image_proj",
        addition_embed_type="image",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        class_embed_type=None,
        resnet_time_scale_shift="scale_shift",
    )


@family("KandinskyV22Pipeline, image embeddings", "uc", replay=r"nothing to replace.*image_embeds \(4, 6\) float32")
def _() -> Host:
    pipeline = quiet(diffusers.KandinskyV22Pipeline(unet=kandinsky_unet(), movq=movq(**MOVQ), scheduler=ddim()))
    embeds = {"image_embeds": randn(PROMPTS, 6), "negative_image_embeds": randn(PROMPTS, 6, seed=1)}
    return Host(pipeline, run_of(pipeline, num_inference_steps=STEPS, height=16, width=16, output_type="latent", **embeds))


class Words:
    """A tokenizer that needs no files: every word has a number."""

    model_max_length = 8
    added_tokens_encoder: dict[str, int] = {}  # noqa: RUF012 -- a name of the real class

    def tokenize(self, text: str) -> list[str]:
        return text.split()

    def __call__(self, texts: Any, **_: Any) -> Any:
        texts = [texts] if isinstance(texts, str) else list(texts)
        ids = torch.zeros(len(texts), self.model_max_length, dtype=torch.long)
        for row, text in enumerate(texts):
            for place, word in enumerate(text.split()[: self.model_max_length]):
                ids[row, place] = 1 + sum(map(ord, word)) % 97
        lengths = torch.full((len(texts),), self.model_max_length)
        return transformers.BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids), "length": lengths})

    def batch_decode(self, ids: torch.Tensor) -> list[str]:
        return ["..."] * len(ids)


def kandinsky_prior_parts() -> dict[str, Any]:
    vision = transformers.CLIPVisionConfig(
        hidden_size=6, projection_dim=6, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    return {
        "prior": prior(),
        "text_encoder": clip_text(6, projection=6),
        "image_encoder": transformers.CLIPVisionModelWithProjection(vision).eval(),
        "tokenizer": Words(),
        "scheduler": diffusers.UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample", num_train_timesteps=1000),
        "image_processor": None,
    }


@family("KandinskyV22PriorPipeline", "uc")
def _() -> Host:
    pipeline = quiet(diffusers.KandinskyV22PriorPipeline(**kandinsky_prior_parts()))
    run = run_of(pipeline, prompt=["a red apple", "two boats"], num_inference_steps=STEPS)
    return Host(pipeline, run, denoisers=("prior",))


@family("KandinskyV22CombinedPipeline, two stages", "uc")
def _() -> Host:
    first = {f"prior_{name}": part for name, part in kandinsky_prior_parts().items()}
    pipeline = quiet(diffusers.KandinskyV22CombinedPipeline(unet=kandinsky_unet(), movq=movq(**MOVQ), scheduler=ddim(), **first))
    run = run_of(
        pipeline,
        prompt=["a red apple", "two boats"],
        num_inference_steps=STEPS,
        prior_num_inference_steps=STEPS,
        height=16,
        width=16,
        output_type="pt",
    )
    return Host(pipeline, run, denoisers=("prior_prior", "unet"), schedulers=("prior_scheduler", "scheduler"))


def cascade(kind: str, **changes: Any) -> torch.nn.Module:
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "conditioning_dim": 8,
        "block_out_channels": (8,),
        "num_attention_heads": (2,),
        "down_num_layers_per_block": (1,),
        "up_num_layers_per_block": (1,),
        "down_blocks_repeat_mappers": (1,),
        "up_blocks_repeat_mappers": (1,),
        "block_types_per_layer": (("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),),
        "clip_text_pooled_in_channels": 6,
        "clip_seq": 1,
        "switch_level": (False,),
        "patch_size": 1,
        **changes,
    }
    assert kind == "StableCascadeUNet"
    return randomize(diffusers.StableCascadeUNet(**config))


def cascade_text() -> dict[str, torch.Tensor]:
    pooled = {"prompt_embeds_pooled": randn(PROMPTS, 1, 6, seed=2), "negative_prompt_embeds_pooled": randn(PROMPTS, 1, 6, seed=3)}
    return {**images.text(), **pooled}


@family("StableCascadePriorPipeline", "cu")
def _() -> Host:
    model = cascade("StableCascadeUNet", clip_text_in_channels=WIDTH, clip_image_in_channels=6)
    components = {"prior": model, "text_encoder": clip_text(projection=6), "tokenizer": Words(), "scheduler": DDPMWuerstchenScheduler()}
    pipeline = quiet(diffusers.StableCascadePriorPipeline(**components))
    call = {"num_inference_steps": STEPS, "height": 128, "width": 128, "output_type": "pt", **cascade_text()}
    return Host(pipeline, run_of(pipeline, **call), denoisers=("prior",))


@family("AudioLDMPipeline, pooled text", "uc")
def _() -> Host:
    unet = images.unet(
        cross_attention_dim=(8, 16),
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=WIDTH,
        class_embeddings_concat=True,
    )
    config = transformers.ClapTextConfig(
        vocab_size=99, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, projection_dim=WIDTH
    )
    encoder = transformers.ClapTextModelWithProjection(config).eval()
    components = {"vae": sound_vae(), "text_encoder": encoder, "tokenizer": None, "unet": unet, "scheduler": ddim(), "vocoder": vocoder()}
    pipeline = quiet(diffusers.AudioLDMPipeline(**components))
    embeds = {"prompt_embeds": randn(PROMPTS, WIDTH), "negative_prompt_embeds": randn(PROMPTS, WIDTH, seed=1)}
    arguments = {"num_inference_steps": STEPS, "audio_length_in_s": 0.004, "output_type": "pt", **embeds}
    return Host(pipeline, run_of(pipeline, **arguments))


@family("StableAudioPipeline", "uc")
def _() -> Host:
    transformer = diffusers.StableAudioDiTModel(
        sample_size=4,
        in_channels=3,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        num_key_value_attention_heads=2,
        out_channels=3,
        cross_attention_dim=4,
        time_proj_dim=8,
        global_states_input_dim=8,
        cross_attention_input_dim=4,
    )
    vae = diffusers.AutoencoderOobleck(
        encoder_hidden_size=6,
        downsampling_ratios=[1, 2],
        decoder_channels=3,
        decoder_input_channels=3,
        audio_channels=2,
        channel_multiples=[2, 4],
        sampling_rate=4,
    ).eval()
    t5 = transformers.T5EncoderModel(transformers.T5Config(vocab_size=99, d_model=4, d_kv=2, d_ff=8, num_layers=1, num_heads=2)).eval()
    projection = diffusers.StableAudioProjectionModel(text_encoder_dim=4, conditioning_dim=4, min_value=0, max_value=32)
    scheduler = diffusers.EulerDiscreteScheduler(prediction_type="v_prediction")
    components = {"vae": vae, "text_encoder": t5, "projection_model": projection, "tokenizer": Words(), "scheduler": scheduler}
    pipeline = quiet(diffusers.StableAudioPipeline(transformer=randomize(transformer), **components))
    prompts = {"prompt": ["a red apple", "two boats"], "negative_prompt": ["low", "bad sound"]}
    arguments = {"num_inference_steps": STEPS, "audio_end_in_s": 2.0, "output_type": "latent", **prompts}
    return Host(pipeline, run_of(pipeline, **arguments), denoisers=("transformer",))
