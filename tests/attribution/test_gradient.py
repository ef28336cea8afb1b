"""Token attribution: the gradient of Eq. 5, per sample, on the true trajectory."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import memhook
from memhook import attribute_tokens
from memhook.attribution.tokens import tokens_of
from memhook.errors import MemhookError, NoGuidanceError
from memhook.testing import sample, tiny_unet

LAYOUTS = ["uncond_first", "cond_first", "two_calls_uncond_first", "two_calls_cond_first"]
SWAPPED = {"uncond_first": "cond_first", "cond_first": "uncond_first"}
SWAPPED |= {f"two_calls_{name}": f"two_calls_{other}" for name, other in SWAPPED.items()}


def probe(layout="uncond_first", *, declared=None, evaluations=2, learned_variance=False, **options):
    unet = tiny_unet(dtype=torch.float64, learned_variance=learned_variance)
    adapter = memhook.ModuleAdapter(unet, layout=declared or layout)
    run = lambda: sample(unet, layout=layout, **options)  # noqa: E731
    return unet, memhook.probe(unet, run, adapter=adapter, evaluations=evaluations)


def embeddings(samples=2):
    generator = torch.Generator().manual_seed(0)
    cond = torch.randn(samples, 5, 6, generator=generator).double()
    return cond, torch.randn(1, 5, 6, generator=generator).double().expand_as(cond)


def transcription(unet, cond, uncond, noise, *, timesteps, guidance_scale=7.5, steps=4):
    """Section 4.1 of the paper as it is written, on the guided trajectory of `memhook.testing.sample`."""
    x, norms = noise, []
    for t in timesteps:
        e = cond.clone().requires_grad_()
        c, u = unet(x, t, e), unet(x, t, uncond)
        loss = (c - u.detach()).flatten(1).pow(2).sum(1).sqrt()  # (5), a sample each
        (gradient,) = torch.autograd.grad(loss.sum(), e)
        norms.append(gradient.pow(2).sum(2).sqrt())
        x = x - (u + guidance_scale * (c - u)).detach() / steps
    return torch.stack(norms).mean(0).numpy()


def agrees_with_the_paper(layout, declared):
    cond, uncond = embeddings()
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    unet, trace = probe(layout, declared=declared, evaluations=3, cond=cond, uncond=uncond, noise=noise)
    expected = transcription(unet, cond, uncond, noise, timesteps=torch.linspace(999, 1, 4).round()[:3])
    return np.allclose(attribute_tokens(trace).scores, expected, rtol=1e-9)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_agrees_with_a_transcription_of_the_paper_and_a_swapped_adapter_does_not(layout):
    assert agrees_with_the_paper(layout, declared=layout)
    assert not agrees_with_the_paper(layout, declared=SWAPPED[layout])


@pytest.mark.parametrize("learned_variance", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_are_norms_of_finite_differences(layout, learned_variance):
    _unet, trace = probe(layout, evaluations=1, learned_variance=learned_variance)
    (evaluation,) = trace.evaluations
    start, step = evaluation.embedding.clone(), 1e-6
    slopes = torch.zeros_like(start)
    for position in range(start.shape[1]):
        for place in range(start.shape[2]):  # all samples at once: none depends on another
            shift = torch.zeros_like(start)
            shift[:, position, place] = step
            with torch.no_grad():
                slopes[:, position, place] = (evaluation.objective(start + shift) - evaluation.objective(start - shift)) / (2 * step)
    assert np.allclose(attribute_tokens(trace).scores, slopes.norm(dim=2).numpy(), rtol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_unconditional_embedding_gives_magnitude_zero_unless_the_adapter_is_swapped(layout):
    cond, uncond = embeddings()
    _unet, right = probe(layout, evaluations=1, cond=cond, uncond=uncond)
    _other, wrong = probe(layout, declared=SWAPPED[layout], evaluations=1, cond=cond, uncond=uncond)
    assert right.evaluations[0].objective(uncond).max() < 1e-12
    assert wrong.evaluations[0].objective(uncond).min() > 1e-3


def test_one_replay_and_no_trace_on_the_model():
    unet, trace = probe(evaluations=2)
    calls = []
    handle = unet.enter.register_forward_hook(lambda *_: calls.append(1))
    attribution = attribute_tokens(trace.evaluations[:1])
    handle.remove()
    assert len(calls) == 1
    assert attribution.gradients.shape == (1, 2, 5)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in unet.parameters())
    assert len(trace) == 2  # a replay is no evaluation


def test_the_mean_over_evaluations_and_over_the_samples_of_a_prompt():
    first, second = embeddings()[0]
    _unet, trace = probe(evaluations=3, cond=torch.stack([first, first, second, second]), uncond=torch.zeros(4, 5, 6).double())
    attribution = attribute_tokens(trace, tokens=[list("abcde"), list("fghij")])
    assert attribution.groups.tolist() == [0, 0, 1, 1]
    assert np.allclose(attribution.scores, attribution.gradients.mean(0))
    assert np.allclose(attribution.prompt_scores, [attribution.scores[:2].mean(0), attribution.scores[2:].mean(0)])
    assert [[word.text for word in words] for words in attribution.words] == [list("abcde"), list("fghij")]
    assert np.allclose([word.score for word in attribution.words[1]], attribution.prompt_scores[1])


def test_a_word_is_scored_as_one_block_and_special_positions_are_no_words():
    _unet, trace = probe(evaluations=2, samples=1)
    tokens = tokens_of(["<s>", "snow", "fall</w>", "in</w>", "</s>"], special=[True, False, False, False, True])
    attribution = attribute_tokens(trace, tokens=tokens)
    gradients = attribution.gradients[:, 0]
    snowfall, inside = attribution.words[0]
    assert snowfall.score == pytest.approx(np.sqrt(gradients[:, 1] ** 2 + gradients[:, 2] ** 2).mean())
    assert inside.score == pytest.approx(attribution.scores[0, 3])
    assert attribution.top(1)[0].score == max(snowfall.score, inside.score)
    assert attribution.special.tolist() == [[True, False, False, False, True]]
    assert len(attribution.top(10)) == 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_trace_made_under_inference_mode_and_a_caller_inside_it(layout):
    unet = tiny_unet(dtype=torch.float64)
    adapter = memhook.ModuleAdapter(unet, layout=layout)
    with torch.inference_mode():
        cond, uncond = embeddings()
        trace = memhook.probe(unet, lambda: sample(unet, layout=layout, cond=cond, uncond=uncond), adapter=adapter, evaluations=2)
        inside = attribute_tokens(trace).scores
    _, plain = probe(layout, cond=embeddings()[0], uncond=embeddings()[1])
    assert np.allclose(inside, attribute_tokens(plain).scores)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in unet.parameters())


def test_a_model_made_under_inference_mode_says_so():
    with torch.inference_mode():
        _unet, trace = probe()
        with pytest.raises(memhook.ReplayError, match="made under torch"):
            attribute_tokens(trace)


@settings(max_examples=25, deadline=None)
@given(scale=st.floats(0.1, 10), seed=st.integers(0, 99), samples=st.integers(1, 4))
def test_scaling_an_objective_scales_its_scores_and_splitting_the_batch_changes_nothing(scale, seed, samples):
    generator = torch.Generator().manual_seed(seed)
    embedding = torch.randn(samples, 3, 4, generator=generator).double()
    weight = torch.randn(3, 4, 5, generator=generator).double()
    objective = lambda e: torch.einsum("bld,ldk->bk", e, weight).norm(dim=1)  # noqa: E731
    whole = attribute_tokens(objective, embedding)
    assert np.allclose(attribute_tokens(lambda e: scale * objective(e), embedding).scores, scale * whole.scores)
    apart = [attribute_tokens(objective, row[None]).scores[0] for row in embedding]
    assert np.allclose(apart, whole.scores)
    order = torch.randperm(samples, generator=generator)
    assert np.allclose(attribute_tokens(objective, embedding[order]).scores, whole.scores[order.numpy()])


def test_half_precision_scores_are_float32_norms():
    embedding = torch.full((1, 2, 4), 1.0, dtype=torch.float16)
    attribution = attribute_tokens(lambda e: (60000 * e).flatten(1).sum(1) / 2, embedding)  # the norm of four times 30,000 overflows float16 squared
    assert attribution.scores.dtype == np.float32
    assert np.allclose(attribution.scores, 60000)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((lambda e: e.sum(),), "pass it as the second argument"),
        ((lambda e: e.sum(), torch.zeros(2, 3, 4)), r"shape \(\) for 2 samples"),
        ((lambda e: e.sum((1, 2)), torch.zeros(3, 4)), r"shape \(3, 4\)"),
        ((lambda e: e.sum((1, 2)), torch.zeros(2, 3, 4, dtype=torch.int64)), "int64"),
        ((lambda e: e.detach().sum((1, 2)), torch.zeros(2, 3, 4)), "does not depend on the embedding"),
        ((lambda e: torch.zeros(2, requires_grad=True), torch.zeros(2, 3, 4)), "does not depend on the embedding"),
        ((lambda e: float("nan") * e.sum((1, 2)), torch.zeros(2, 3, 4)), "sample 0 at evaluation 0 is not finite"),
        ((lambda e: 1.0, torch.zeros(2, 3, 4)), "a float for 2 samples"),
        (([], torch.zeros(2, 3, 4)), "no evaluation to attribute"),
        (("words", torch.zeros(2, 3, 4)), "cannot attribute a str"),
    ],
)
def test_bad_objectives(arguments, message):
    with pytest.raises(MemhookError, match=message):
        attribute_tokens(*arguments)


def test_bad_tokens():
    _unet, trace = probe(evaluations=1)
    with pytest.raises(MemhookError, match="4 tokens; its embedding has 5 positions"):
        attribute_tokens(trace, tokens=[list("abcd"), list("abcd")])
    with pytest.raises(MemhookError, match="for 1 prompts; the run has 2"):
        attribute_tokens(trace, tokens=list("abcde"))
    with pytest.raises(MemhookError, match="list of strings"):
        attribute_tokens(trace, tokens=[[1, 2], [3, 4]])
    with pytest.warns(UserWarning, match="prompt 1 has only special tokens"):
        attribution = attribute_tokens(trace, tokens=[tokens_of(list("abcde")), tokens_of(list("abcde"), special=[True] * 5)])
    assert attribution.top(3, prompt=1) == ()
    assert "prompt 1" in str(attribution)


def test_which_prompt_is_asked_for():
    _unet, trace = probe(evaluations=1)
    attribution = attribute_tokens(trace)
    with pytest.raises(MemhookError, match="2 prompts here, so expected 0 to 1"):
        attribution.top(1)
    with pytest.raises(MemhookError, match="prompt is 2"):
        attribution.top(1, prompt=2)
    with pytest.raises(MemhookError, match="k is 0"):
        attribution.top(0, prompt=0)


def test_tokens_for_samples_and_repeated_prompts():
    prompt = embeddings()[0][:1].expand(2, -1, -1)
    _unet, trace = probe(evaluations=1, cond=prompt, uncond=torch.zeros(2, 5, 6).double())
    for tokens in (list("abcde"), [list("abcde")], [list("abcde"), list("abcde")]):
        assert attribute_tokens(trace, tokens=tokens).tokens == (tuple("abcde"),)


def test_traces_that_cannot_be_attributed():
    unet = tiny_unet()
    adapter = memhook.ModuleAdapter(unet, layout="uncond_first")
    with memhook.watch(unet, adapter=adapter) as numbers:
        sample(unet)
    with pytest.raises(MemhookError, match='keep="calls"'):
        attribute_tokens(numbers)
    with memhook.watch(unet, adapter=adapter, keep="calls") as twice:
        sample(unet)
        sample(unet)
    with pytest.raises(MemhookError, match="2 runs of the sampler"):
        attribute_tokens(twice)
    assert attribute_tokens(twice.runs[1]).gradients.shape == (4, 2, 5)
    bare = memhook.Trace(keep_evaluations=True)
    bare.record(torch.ones(2, 3), None)
    with pytest.raises(NoGuidanceError):
        attribute_tokens(bare)
    bare.record(torch.ones(2, 3), torch.zeros(2, 3))
    with pytest.raises(memhook.ReplayError, match="no text embedding"):
        attribute_tokens(bare)
