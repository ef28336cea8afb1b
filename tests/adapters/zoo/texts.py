"""Text that reaches the denoiser in another form than one embedding ``(b, l, d)``."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers
from diffusers import FlowMatchEulerDiscreteScheduler

from tests.adapters.zoo import images
from tests.adapters.zoo.family import PROMPTS, STEPS, Host, family, generator, quiet, randn, randomize
from tests.adapters.zoo.models import LENGTH, WIDTH, clip_text, ddim, prior, scaled, sound_vae, vocoder, wan_vae, z_image_transformer
from tests.adapters.zoo.others import Words, run_of
from tests.adapters.zoo.transformers import host

TOKENS = 256  # of Ideogram 4's latents


@family("Krea2Pipeline, an axis of encoder layers", "c|u")
def _() -> Host:
    transformer = diffusers.Krea2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=16,
        timestep_embed_dim=8,
        text_hidden_dim=WIDTH,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=8,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
    )
    texts: dict[str, Any] = {"prompt_embeds": randn(PROMPTS, LENGTH, 3, WIDTH), "negative_prompt_embeds": randn(PROMPTS, LENGTH, 3, WIDTH, seed=1)}
    texts |= dict.fromkeys(("prompt_embeds_mask", "negative_prompt_embeds_mask"), torch.ones(PROMPTS, LENGTH, dtype=torch.bool))
    components = {"transformer": randomize(transformer), "scheduler": FlowMatchEulerDiscreteScheduler(), "vae": wan_vae()}
    return host("Krea2Pipeline", components, height=32, width=32, **texts)


@family("BriaFiboPipeline, an embedding for every block", "uc")
def _() -> Host:
    transformer = diffusers.BriaFiboTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        text_encoder_dim=8,
        axes_dims_rope=[2, 2, 4],
    )
    components = {"transformer": randomize(transformer), "scheduler": FlowMatchEulerDiscreteScheduler(), "vae": wan_vae()}
    built = host("BriaFiboPipeline", components, prompt=["a", "b"], height=32, width=32)

    def encode(**_: Any) -> Any:  # as many blocks as rows, so that a list of blocks could be taken for a list of rows
        layers = [[randn(PROMPTS, LENGTH, 8, seed=10 * which + block) for block in range(2 * PROMPTS)] for which in (1, 2)]
        ones = torch.ones(PROMPTS, LENGTH)
        return randn(PROMPTS, LENGTH, WIDTH), randn(PROMPTS, LENGTH, WIDTH, seed=1), torch.zeros(LENGTH, 3), ones, ones, *layers

    built.pipeline.encode_prompt = encode
    return built


@family("Ideogram4Pipeline, tokens of text in the output, a model for each", "c|u")
def _() -> Host:
    def transformer() -> torch.nn.Module:
        model = diffusers.Ideogram4Transformer2DModel(
            in_channels=16,
            num_layers=1,
            attention_head_dim=12,
            num_attention_heads=1,
            intermediate_size=16,
            adaln_dim=8,
            llm_features_dim=WIDTH,
            mrope_section=(2, 2, 2),
        )
        return randomize(model)

    components = {"transformer": transformer(), "unconditional_transformer": scaled(transformer(), 1.1), "vae": None}
    components |= {"scheduler": FlowMatchEulerDiscreteScheduler(), "prompt_enhancer_head": None}
    call = {"height": 256, "width": 256, "guidance_schedule": (7.0, 7.0, 3.0), "max_sequence_length": LENGTH}
    built = host("Ideogram4Pipeline", components, prompt=["a", "b"], **call)

    def encode(**_: Any) -> Any:
        text = torch.cat([randn(PROMPTS, LENGTH, WIDTH), torch.zeros(PROMPTS, TOKENS, WIDTH)], dim=1)
        kinds = torch.tensor([3] * LENGTH + [2] * TOKENS).expand(PROMPTS, -1)
        places = torch.arange(LENGTH + TOKENS)[None, :, None].expand(PROMPTS, -1, 3)
        return text, places, torch.ones_like(kinds), kinds

    built.pipeline.encode_prompt = encode
    built.denoisers, built.read = ("transformer", "unconditional_transformer"), lambda output: output[0][:, -TOKENS:]
    return built


@family("ShapEPipeline, pooled text, learned variance", "uc")
def _() -> Host:
    model = prior(
        num_embeddings=4,
        additional_embeddings=0,
        time_embed_act_fn="gelu",
        norm_in_type="layer",
        encoder_hid_proj_type=None,
        added_emb_type=None,
        time_embed_dim=8,
        embedding_proj_dim=WIDTH,
        clip_embed_dim=12,
    )
    components = {"prior": model, "text_encoder": clip_text(projection=WIDTH), "tokenizer": Words(), "shap_e_renderer": None}
    scheduler = diffusers.HeunDiscreteScheduler(prediction_type="sample", use_karras_sigmas=True)
    pipeline = quiet(diffusers.ShapEPipeline(**components, scheduler=scheduler))
    run = run_of(pipeline, prompt=["a red apple", "two boats"], num_inference_steps=STEPS, output_type="latent")
    return Host(pipeline, run, denoisers=("prior",), read=lambda output: output.predicted_image_embedding[..., :6])


@family("ZImageOmniPipeline, a list of texts and pictures for every row", "cu", replay="nothing to replace")
def _() -> Host:
    components = {"transformer": z_image_transformer(siglip_feat_dim=WIDTH), "scheduler": FlowMatchEulerDiscreteScheduler(), "vae": images.vae()}
    prompts, negatives = ([[randn(3, WIDTH, seed=at + 10 * row + part) for part in range(3)] for row in range(PROMPTS)] for at in (0, 50))
    call = {"height": 32, "width": 32, "prompt_embeds": prompts, "negative_prompt_embeds": negatives}
    built = host("ZImageOmniPipeline", {**components, "siglip": None, "siglip_processor": None}, **call)
    built.pipeline.prepare_image_latents = lambda batch_size, **_: [[randn(4, 1, 8, 8, seed=7)] for _ in range(batch_size)]
    built.pipeline.prepare_siglip_embeds = lambda batch_size, **_: [[randn(2, 2, WIDTH, seed=8)] for _ in range(batch_size)]
    built.read = lambda output: torch.stack(list(output[0]))
    return built


@family("OmniGenPipeline, token ids", "cu", replay=r"nothing to replace.*input_ids \(4, 5\) int64")
def _() -> Host:
    from diffusers.pipelines.omnigen import pipeline_omnigen

    transformer = diffusers.OmniGenTransformer2DModel(
        hidden_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=16,
        num_layers=1,
        in_channels=4,
        time_step_dim=4,
        vocab_size=99,
        pad_token_id=0,
        pos_embed_max_size=8,
        rope_scaling={"long_factor": [1.0] * 4, "short_factor": [1.0] * 4},
    )

    class Processor:
        """Stands for one that needs torchvision."""

        max_image_size = 1024

        def __call__(self, *_: Any, **__: Any) -> dict[str, Any]:
            ids = torch.randint(1, 99, (2 * PROMPTS, LENGTH), generator=torch.Generator().manual_seed(0))
            total = LENGTH + 1 + 16  # and the time, and the latents' tokens
            masks = {"attention_mask": torch.ones(2 * PROMPTS, total, total, dtype=torch.long), "input_pixel_values": [], "input_image_sizes": {}}
            return {"input_ids": ids, "position_ids": torch.arange(total).expand(2 * PROMPTS, -1), **masks}

    pipeline_omnigen.OmniGenMultiModalProcessor = lambda *_, **__: Processor()
    try:
        scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
        pipeline = quiet(diffusers.OmniGenPipeline(transformer=randomize(transformer), scheduler=scheduler, vae=images.vae(), tokenizer=None))
    finally:
        del pipeline_omnigen.OmniGenMultiModalProcessor
    call = {"num_inference_steps": STEPS, "height": 16, "width": 16, "guidance_scale": 3.0, "output_type": "latent"}
    return Host(pipeline, run_of(pipeline, prompt=["a", "b"], **call), denoisers=("transformer",))


@family("WuerstchenPriorPipeline, another name", "cu")
def _() -> Host:
    from diffusers.pipelines.deprecated.wuerstchen import WuerstchenPrior

    model = randomize(WuerstchenPrior(c_in=4, c=16, c_cond=WIDTH, c_r=8, depth=1, nhead=2))
    components = {"tokenizer": Words(), "text_encoder": clip_text(), "prior": model, "scheduler": diffusers.DDPMWuerstchenScheduler()}
    pipeline = quiet(diffusers.WuerstchenPriorPipeline(**components))
    return Host(pipeline, run_of(pipeline, num_inference_steps=STEPS, height=256, width=256, **images.text()), denoisers=("prior",))


@family("AudioLDM2Pipeline, two embeddings", "uc")
def _() -> Host:
    unet = diffusers.AudioLDM2UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=((None, WIDTH, 6),) * 2,
        attention_head_dim=4,
    )
    t5 = transformers.T5EncoderModel(transformers.T5Config(vocab_size=99, d_model=WIDTH, d_kv=2, d_ff=8, num_layers=1, num_heads=2)).eval()
    absent = dict.fromkeys(("text_encoder", "projection_model", "language_model", "tokenizer", "tokenizer_2", "feature_extractor"))
    components = {"vae": sound_vae(), "vocoder": vocoder(), "unet": randomize(unet), "scheduler": ddim(), "text_encoder_2": t5, **absent}
    pipeline = quiet(diffusers.AudioLDM2Pipeline(**components))

    def encode(*_: Any, **__: Any) -> Any:
        embeds, generated = (randn(2 * PROMPTS, length, width, seed=length) for length, width in ((4, 6), (LENGTH, WIDTH)))
        return embeds, torch.ones(2 * PROMPTS, 4), generated

    pipeline.encode_prompt = encode
    call = {"prompt": ["a", "b"], "num_inference_steps": STEPS, "audio_length_in_s": 0.004, "output_type": "latent"}
    return Host(pipeline, lambda: pipeline(generator=generator(), **call).audios)
