"""The filter on diffusers' own denoisers: keyword embeddings, pooled text, dropout and gradient checkpointing of the blocks."""

import pytest
import torch
from diffusers import UNet2DConditionModel

import memhook

SIZES = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "cross_attention_dim": 6,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
POOLED = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 6 * 4 + 10}
NULL, NULL_POOLED = torch.zeros(5, 6), torch.zeros(10)


def built(**options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DConditionModel(**SIZES, **options).train()


def batch():
    generator = torch.Generator().manual_seed(1)
    noisy, text, pooled = (torch.randn(*shape, generator=generator) for shape in ((3, 4, 8, 8), (3, 5, 6), (3, 10)))
    return noisy, torch.tensor([10, 400, 900]), text, pooled


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_are_those_of_the_loop_without_it(checkpointed):
    """With dropout in the blocks, which are recomputed in the backward pass."""
    found = []
    for filtered in (False, True):
        unet = built(dropout=0.3)
        if checkpointed:
            unet.enable_gradient_checkpointing()
        noisy, t, text, _ = batch()
        torch.manual_seed(5)
        with memhook.training_filter(unet, null_embedding=NULL, threshold=torch.inf) as f:
            for _ in range(2):
                if filtered:
                    losses = (unet(noisy, t, encoder_hidden_states=text).sample - noisy).square()
                    f.mean(losses).backward()
                else:
                    with f.paused():
                        losses = (unet(noisy, t, encoder_hidden_states=text).sample - noisy).square()
                    losses.mean((1, 2, 3)).mean().backward()
        assert f.report().steps == (2 if filtered else 0)
        found.append([parameter.grad for parameter in unet.parameters()])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_pooled_text_is_replaced_with_the_embedding():
    unet = built(**POOLED)
    noisy, t, text, pooled = batch()
    text[0] = NULL  # its pooled text still tells
    added = {"text_embeds": pooled, "time_ids": torch.ones(3, 6)}
    null_arguments = {("added_cond_kwargs", "text_embeds"): NULL_POOLED}
    with memhook.training_filter(unet, null_embedding=NULL, threshold=None, null_arguments=null_arguments) as f:
        f.mean(unet(noisy, t, encoder_hidden_states=text, added_cond_kwargs=added).sample.square(), keys=[0, 1, 2])
    with torch.no_grad():
        cond = unet(noisy, t, encoder_hidden_states=text, added_cond_kwargs=added).sample
        bare = {"text_embeds": NULL_POOLED.expand(3, 10), "time_ids": torch.ones(3, 6)}
        uncond = unet(noisy, t, encoder_hidden_states=NULL.expand(3, 5, 6), added_cond_kwargs=bare).sample
    expected = memhook.magnitude(cond, uncond)
    assert {row.key: row.magnitude for row in f.report().rows} == pytest.approx({1: float(expected[1]), 2: float(expected[2])}, rel=1e-5)
    assert added["text_embeds"] is pooled


def test_pooled_text_that_nobody_mentioned_is_an_error():
    unet = built(**POOLED)
    noisy, t, text, pooled = batch()
    added = {"text_embeds": pooled, "time_ids": torch.ones(3, 6)}
    with pytest.raises(memhook.MemhookError, match="text_embeds"), memhook.training_filter(unet, null_embedding=NULL, threshold=1.0) as f:
        f.mean(unet(noisy, t, encoder_hidden_states=text, added_cond_kwargs=added).sample.square())


@pytest.mark.parametrize("checkpointed", [False, True])
def test_judged_rows_are_cut_out_of_pooled_text_and_sizes_too(checkpointed):
    unet = built(**POOLED)
    if checkpointed:
        unet.enable_gradient_checkpointing()
    noisy, t, text, pooled = batch()
    added = {"text_embeds": pooled, "time_ids": torch.arange(18.0).reshape(3, 6)}
    found = {}
    for timesteps in (None, (300, 999)):
        null_arguments = {("added_cond_kwargs", "text_embeds"): NULL_POOLED}
        with memhook.training_filter(unet, null_embedding=NULL, threshold=None, timesteps=timesteps, null_arguments=null_arguments) as f:
            losses = unet(noisy, t, encoder_hidden_states=text, added_cond_kwargs=added).sample.square()
            f.mean(losses, keys=[0, 1, 2]).backward()
        found[timesteps] = {row.key: row.magnitude for row in f.report().rows}
    assert f.report().passed == 2
    assert found[300, 999] == pytest.approx({key: found[None][key] for key in (1, 2)}, rel=1e-4)
