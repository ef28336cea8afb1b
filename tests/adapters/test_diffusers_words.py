"""Words left out of a pipeline's prompt: on the captured call, and by asking the pipeline again, which must agree."""

import pytest
import torch

import memhook
from memhook_diffusers.asking import asking
from tests.adapters.written import BUILD, PROMPT, build, generators


def probed(pipe, options, **more):
    return memhook.probe(pipe, lambda: pipe(prompt=PROMPT, num_images_per_prompt=2, generator=generators(2), **options, **more))


@pytest.mark.parametrize("name", BUILD)
def test_the_captured_call_says_of_other_texts_what_the_pipeline_says(name):
    """Pooled vectors (SDXL, SD3, Flux) and masks (PixArt) are exchanged with the embedding."""
    pipe, options = build(name)
    captured = memhook.leave_one_out(probed(pipe, options), PROMPT)
    asked = memhook.leave_one_out(asking(pipe, images=2, **options), PROMPT)
    assert [row.text for row in captured.words] == PROMPT.split()
    assert [row.score for row in captured.words] == pytest.approx([row.score for row in asked.words], rel=1e-4, abs=1e-5)
    assert captured.score == pytest.approx(asked.score, rel=1e-4)
    assert len({round(row.score, 5) for row in captured.words}) == len(captured.words)  # words matter, each in its own way
    assert (captured.samples, asked.samples) == (2, 2)
    assert captured.asked == asked.asked == len(PROMPT.split()) + 1


def test_skipped_layers_of_the_run_are_skipped_for_other_texts_too():
    pipe, options = build("sdxl")
    captured = memhook.leave_one_out(probed(pipe, options, clip_skip=1), PROMPT)
    asked = memhook.leave_one_out(asking(pipe, images=2, clip_skip=1, **options), PROMPT)
    plain = memhook.leave_one_out(probed(pipe, options), PROMPT)
    assert [row.score for row in captured.words] == pytest.approx([row.score for row in asked.words], rel=1e-4, abs=1e-5)
    assert captured.score != pytest.approx(plain.score, rel=1e-3)


def test_watching_leaves_nothing_on_the_pipeline():
    pipe, options = build("sd")
    trace = probed(pipe, options)
    assert "encode_prompt" not in vars(pipe)
    memhook.leave_one_out(trace, PROMPT)
    assert "encode_prompt" not in vars(pipe)
    assert len(trace) == 1


def test_a_prompt_that_the_trace_was_not_made_with():
    pipe, options = build("sd")
    with pytest.raises(memhook.ReplayError, match=r"not what the run was captured with.*Pass a function that runs the host"):
        memhook.leave_one_out(probed(pipe, options), "green hat with mug")


def test_an_encoder_that_answers_the_embedding_alone_where_the_denoiser_sees_more():
    pipe, options = build("sdxl")
    trace = probed(pipe, options)
    encode = trace.evaluations[0].encode
    with pytest.raises(memhook.ReplayError, match=r"added_cond_kwargs\.text_embeds.*pass a function of texts"):
        memhook.leave_one_out(trace, PROMPT, encode=lambda texts: encode(texts)[0])


def test_embeddings_given_by_the_caller_need_an_encoder_of_the_callers():
    pipe, options = build("sd")
    embeds = pipe.encode_prompt([PROMPT], "cpu", 1, do_classifier_free_guidance=False)[0]
    call = {"prompt_embeds": embeds, "negative_prompt_embeds": torch.zeros_like(embeds), "generator": generators(1), **options}
    trace = memhook.probe(pipe, lambda: pipe(**call))
    found = memhook.leave_one_out(trace, PROMPT)  # the pipeline's own encoder reproduces them, which was compared
    assert found.score == pytest.approx(float(trace.magnitudes[0, 0]), rel=1e-4)
    moved = {**call, "prompt_embeds": embeds + 0.5, "generator": generators(1)}
    with pytest.raises(memhook.ReplayError, match="not what the run was captured with"):
        memhook.leave_one_out(memhook.probe(pipe, lambda: pipe(**moved)), PROMPT)


def test_asking_refuses_no_images():
    with pytest.raises(memhook.MemhookError, match="images is 0"):
        asking(build("sd")[0], images=0)
