"""The gradient at the embeddings that enter a pipeline's text encoders."""

import numpy as np
import pytest
import torch

import memhook
from memhook import attribute_tokens
from memhook.errors import MemhookError
from tests.adapters.written import BUILD, PROMPT, build, generators

OTHER = "green hat with old mug"


def probed(pipe, options, prompt=PROMPT, **more):
    images = more.pop("images", 2)
    count = images * (1 if isinstance(prompt, str) else len(prompt))
    call = {"prompt": prompt, "num_images_per_prompt": images, "generator": generators(count), **options, **more}
    if not isinstance(prompt, str) and isinstance(call.get("negative_prompt"), str):
        call["negative_prompt"] = [call["negative_prompt"]] * len(prompt)
    return memhook.probe(pipe, lambda: pipe(**call))


def encoders(pipe):
    return [part for name, part in vars(pipe).items() if name.startswith("text_encoder") and part is not None]


@pytest.mark.parametrize("name", BUILD)
def test_scores_are_norms_of_finite_differences_through_the_whole_pipeline(name):
    """The embedding table of one word is moved, and the pipeline run again: pooled vectors, both encoders, T5 and all."""
    pipe, options = build(name)
    for part in (*encoders(pipe), getattr(pipe, "unet", None) or pipe.transformer):
        part.double()
    options = {**options, "num_inference_steps": 1}
    found = attribute_tokens(probed(pipe, options, images=1), at="input")
    assert found.at == "input"
    words = [word.text for word in found.words[0]]
    assert words == PROMPT.split() * (len(words) // len(PROMPT.split()))
    assert len(words) == 5 * (2 if name in ("sd3", "flux") else 1)  # CLIP and T5 have positions of their own
    encoder = encoders(pipe)[0]
    same = [part for part in encoders(pipe) if type(part).__name__ != "T5EncoderModel"] or [encoder]  # these read the same tokens
    number = pipe.tokenizer.convert_tokens_to_ids("fox")
    at = next(word for word in found.words[0] if word.text == "fox").positions[0]
    total, step = 0.0, 1e-4
    for one in same:
        table = next(part for part in one.modules() if isinstance(part, torch.nn.Embedding))
        for column in range(table.weight.shape[1]):
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    table.weight[number, column] += sign * step
                    values.append(float(probed(pipe, options, images=1).magnitudes[0, 0]))
                    table.weight[number, column] -= sign * step
            total += ((values[0] - values[1]) / (2 * step)) ** 2
    assert found.scores[0, at] == pytest.approx(np.sqrt(total), rel=0.05, abs=1e-3)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_samples_do_not_depend_on_each_other_and_prompts_are_told_apart(name):
    pipe, options = build(name)
    whole = attribute_tokens(probed(pipe, options, [PROMPT, OTHER]), at="input")
    assert [tokens.prompt for tokens in whole.prompts] == [PROMPT, OTHER]
    assert whole.groups.tolist() == [0, 0, 1, 1]
    alone = attribute_tokens(probed(pipe, options, PROMPT), at="input")
    assert np.allclose(whole.scores[:2], alone.scores, rtol=1e-3, atol=1e-5)
    first = attribute_tokens(probed(pipe, options, PROMPT, images=1), at="input")
    assert np.allclose(alone.scores[:1], first.scores, rtol=1e-3, atol=1e-5)


def test_several_evaluations_are_averaged():
    pipe, options = build("sd")
    run = lambda: pipe(prompt=PROMPT, generator=generators(1), **options)  # noqa: E731
    trace = memhook.probe(pipe, run, evaluations=2)
    both = attribute_tokens(trace)
    each = [attribute_tokens(trace.evaluations[number : number + 1]) for number in range(2)]
    assert both.at == "input"
    assert np.allclose(both.gradients, np.concatenate([one.gradients for one in each]), rtol=1e-4, atol=1e-6)


def test_it_is_the_default_and_the_papers_stays():
    pipe, options = build("sd")
    trace = probed(pipe, options)
    assert attribute_tokens(trace).at == "input"
    output = attribute_tokens(trace, at="output")
    assert output.at == "output"
    evaluation = trace.evaluations[0]
    assert np.array_equal(output.gradients[0], memhook.attribution.token_gradient(evaluation.objective, evaluation.embedding).numpy())
    assert attribute_tokens(evaluation.objective, evaluation.embedding).at == "output"
    assert not np.allclose(attribute_tokens(trace).scores, output.scores)
    assert "at the encoder's input" in repr(attribute_tokens(trace))
    assert attribute_tokens(trace).to_dict()["at"] == "input"


def test_nothing_is_left_on_the_encoders():
    pipe, options = build("sdxl")
    trace = probed(pipe, options)  # transformers itself leaves hooks when it is first asked for hidden states
    before = [{name: part._forward_hooks.copy() for name, part in encoder.named_modules()} for encoder in encoders(pipe)]
    attribute_tokens(trace, at="input")
    for encoder, hooks in zip(encoders(pipe), before, strict=True):
        assert all(parameter.grad is None and parameter.requires_grad for parameter in encoder.parameters())
        assert all(part._forward_hooks == hooks[name] for name, part in encoder.named_modules())
    assert len(trace) == 1


def test_the_call_that_made_the_embedding_is_found_among_others():
    """Encoded first, then passed in; and another prompt encoded after it."""
    pipe, options = build("sd")
    encode = lambda text: pipe.encode_prompt(text, "cpu", 1, do_classifier_free_guidance=False)[0]  # noqa: E731

    def run():
        embeds, negative = encode(PROMPT), encode(OTHER)
        pipe(prompt_embeds=embeds, negative_prompt_embeds=negative, generator=generators(1), **options)

    found = attribute_tokens(memhook.probe(pipe, run), at="input")
    assert found.prompts[0].prompt == PROMPT
    plain = probed(pipe, options, images=1, negative_prompt=OTHER)
    assert np.allclose(found.scores, attribute_tokens(plain, at="input").scores, rtol=1e-4, atol=1e-6)


def test_embeddings_from_elsewhere_are_refused_and_taken_at_the_output_by_default():
    pipe, options = build("sd")
    embeds = pipe.encode_prompt(PROMPT, "cpu", 1, do_classifier_free_guidance=False)[0]
    call = {"prompt_embeds": embeds, "negative_prompt_embeds": torch.zeros_like(embeds), **options}
    outside = memhook.probe(pipe, lambda: pipe(generator=generators(1), **call))
    with pytest.raises(memhook.ReplayError, match=r"encoded no prompt inside the watched block.*leaving them out"):
        attribute_tokens(outside, at="input")
    assert attribute_tokens(outside).at == "output"

    def moved():
        found = pipe.encode_prompt(PROMPT, "cpu", 1, do_classifier_free_guidance=False)[0] + 0.5
        pipe(generator=generators(1), **{**call, "prompt_embeds": found})

    with pytest.raises(memhook.ReplayError, match="made the captured embedding: it was changed on the way"):
        attribute_tokens(memhook.probe(pipe, moved), at="input")


def test_hosts_whose_encoder_is_not_seen_say_so():
    from memhook.testing import sample, tiny_unet

    unet = tiny_unet()
    trace = memhook.probe(unet, lambda: sample(unet), adapter=memhook.ModuleAdapter(unet, layout="uncond_first"))
    with pytest.raises(memhook.ReplayError, match=r"no text encoder of this host was seen at work.*leave words out"):
        attribute_tokens(trace, at="input")
    with pytest.raises(memhook.ReplayError, match="an embedding or objectives of your own were given"):
        attribute_tokens(trace, trace.evaluations[0].embedding, at="input")
    with pytest.raises(MemhookError, match="at is 'middle'"):
        attribute_tokens(trace, at="middle")
    assert attribute_tokens(trace).at == "output"


def test_under_inference_mode():
    pipe, options = build("sd")
    plain = attribute_tokens(probed(pipe, options), at="input")
    with torch.inference_mode():
        trace = probed(pipe, options)
        inside = attribute_tokens(trace, at="input")
    assert np.allclose(inside.scores, plain.scores, rtol=1e-3, atol=1e-5)
