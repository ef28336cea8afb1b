"""Tiny pipelines that read text themselves: a tokenizer of words made here, and random text encoders."""

from __future__ import annotations

from typing import Any

import diffusers
import tokenizers
import torch
import transformers
from diffusers import FlowMatchEulerDiscreteScheduler

from tests.adapters.zoo import images
from tests.adapters.zoo.family import quiet, randomize
from tests.adapters.zoo.models import SIZE, WIDTH, ddim, flux_transformer, pixart_transformer

WORDS = "a red fox in blue snow on old mug with green hat".split()
PROMPT = "a red fox in snow"
WINDOW = 8
PAD, START, END, UNKNOWN = "<pad>", "<start>", "<end>", "<unk>"
SPECIAL = [PAD, START, END, UNKNOWN]


def tokenizer(*, start: bool = True) -> Any:
    """Words of `WORDS`, a start token where asked for, an end token, padding."""
    vocabulary = {word: number for number, word in enumerate(SPECIAL + WORDS)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=UNKNOWN))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    template = "<start> $A <end>" if start else "$A <end>"
    marks = [(START, 1), (END, 2)] if start else [(END, 2)]
    model.post_processor = tokenizers.processors.TemplateProcessing(single=template, special_tokens=marks)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model,
        model_max_length=WINDOW,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        **({"bos_token": START} if start else {}),
    )


def clip(width: int = WIDTH, *, projection: int = 0, layers: int = 2) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=len(SPECIAL + WORDS),
        hidden_size=width,
        intermediate_size=8,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=WINDOW,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **({"projection_dim": projection} if projection else {}),
    )
    return randomize((transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel)(config))


def t5(width: int = WIDTH) -> Any:
    config = transformers.T5Config(vocab_size=len(SPECIAL + WORDS), d_model=width, d_kv=4, d_ff=8, num_layers=2, num_heads=2)
    return randomize(transformers.T5EncoderModel(config))


def sd() -> Any:
    return diffusers.StableDiffusionPipeline(**images.parts(text_encoder=clip(), tokenizer=tokenizer()))


def sdxl() -> Any:
    half = WIDTH // 2
    encoders = {"text_encoder": clip(half), "text_encoder_2": clip(half, projection=WIDTH)}
    return diffusers.StableDiffusionXLPipeline(**images.xl_parts(**encoders, tokenizer=tokenizer(), tokenizer_2=tokenizer()))


def sd3() -> Any:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=SIZE,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=8,
        pooled_projection_dim=6,
        pos_embed_max_size=SIZE,
    )
    half = WIDTH // 2
    return diffusers.StableDiffusion3Pipeline(
        transformer=randomize(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=images.vae(),
        text_encoder=clip(half, projection=2),
        text_encoder_2=clip(half, projection=4),
        text_encoder_3=t5(),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        tokenizer_3=tokenizer(start=False),
    )


def flux() -> Any:
    return diffusers.FluxPipeline(
        transformer=flux_transformer(guidance_embeds=False),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=images.vae(),
        text_encoder=clip(6),
        text_encoder_2=t5(),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(start=False),
    )


def pixart() -> Any:
    return diffusers.PixArtSigmaPipeline(
        transformer=pixart_transformer(), scheduler=ddim(), vae=images.vae(), text_encoder=t5(), tokenizer=tokenizer(start=False)
    )


OPTIONS: dict[str, dict[str, Any]] = {
    "sd": {"guidance_scale": 5.0},
    "sdxl": {"guidance_scale": 5.0},
    "sd3": {"guidance_scale": 5.0, "height": 16, "width": 16, "max_sequence_length": WINDOW},
    "flux": {"true_cfg_scale": 4.0, "negative_prompt": "", "height": 32, "width": 32, "max_sequence_length": WINDOW},
    "pixart": {
        "guidance_scale": 5.0,
        "height": 16,
        "width": 16,
        "use_resolution_binning": False,
        "clean_caption": False,
        "max_sequence_length": WINDOW,
    },
}
BUILD = {"sd": sd, "sdxl": sdxl, "sd3": sd3, "flux": flux, "pixart": pixart}


def build(name: str) -> tuple[Any, dict[str, Any]]:
    """A pipeline, and the options of its calls."""
    pipeline = quiet(BUILD[name]())
    return pipeline, {"num_inference_steps": 2, "output_type": "latent", **OPTIONS[name]}


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + image) for image in range(count)]
