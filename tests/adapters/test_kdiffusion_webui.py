"""Watching A1111's wrapper in k-diffusion's samplers: weighted prompts, slices, skipped passes."""

import numpy as np
import pytest
import torch

import memhook
from memhook import NoGuidanceError
from tests.adapters import kdiffusion_wrappers as wild
from tests.adapters.kdiffusion_runs import (
    TOLERANCE,
    agree,
    arguments,
    noise,
    plain_pair,
    prompts,
    several,
    watched,
    webui,
)
from tests.adapters.kdiffusion_samplers import OWN, EpsDenoiser

pytestmark = pytest.mark.filterwarnings("ignore:Should have t:UserWarning")  # torchsde, of rounding in the package's stochastic samplers


@pytest.fixture
def network():
    return wild.Latent()


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("negative_tokens", [wild.TOKENS, 2 * wild.TOKENS, 3])
def test_weighted_prompts_slices_and_unequal_lengths(network, batched, negative_tokens):
    of, extra = several()
    negative = prompts(2, tokens=negative_tokens, seed=2)
    extra["uncond"] = wild.scheduled(negative)
    wrapper = webui(network, batched=batched)
    trace, truth, _ = watched(wrapper, network, OWN["heun"], extra, keep="calls")
    pair = lambda _, sample: ([(cond[None], weight) for cond, weight in of[sample]], negative[sample][None])  # noqa: E731
    agree(trace, truth.magnitudes(pair))
    assert trace.guidance_scale.tolist() == [7.5, 7.5]
    assert wrapper.step == len(trace)
    first = trace.evaluations[0]
    assert first.embedding.shape == (2, 3 * wild.TOKENS, wild.WIDTH)  # three prompts, one after the other
    replayed = first.objective(first.embedding.clone().requires_grad_())
    assert replayed.detach().numpy() == pytest.approx(trace.magnitudes[0], rel=TOLERANCE)
    if negative_tokens == wild.TOKENS:
        zero = first.objective(torch.stack([torch.cat([row] * 3) for row in negative]))
        assert float(zero.max()) < 1e-4 * trace.magnitudes[0].min()
    lone = first.take(torch.tensor([1]))
    assert lone.objective(lone.embedding).item() == pytest.approx(trace.magnitudes[0, 1], rel=TOLERANCE)


def test_skipped_passes_are_missing_and_never_zero(network):
    """The host puts a copy of the conditional prediction in the place of the unconditional one."""
    of, extra = several()
    extra["s_min_uncond"] = 5.0
    trace, truth, _ = watched(webui(network), network, OWN["euler"], extra, steps=6)
    skipped = [index for index, (_, sigma) in enumerate(truth.asked) if index % 2 and sigma[0] < 5]
    assert skipped
    uncond = prompts(2, seed=2)
    pair = lambda n, sample: None if n in skipped else ([(c[None], w) for c, w in of[sample]], uncond[sample][None])  # noqa: E731
    agree(trace, truth.magnitudes(pair))
    assert trace.has_guidance.tolist() == [index not in skipped for index in range(len(trace))]
    assert np.isfinite(trace.score()).all()


@pytest.mark.parametrize("keep", ["scalars", "calls"])
def test_a_run_whose_passes_are_all_skipped_says_so(network, keep):
    wrapper = webui(network)
    wrapper.step = 1
    with memhook.watch(wrapper, keep=keep) as trace:
        extra = {**several()[1], "s_min_uncond": 99.0}
        wrapper(noise(2), torch.full((2,), 12.0), **extra)
    with pytest.raises(NoGuidanceError, match=r"made no unconditional pass.*scale above 1"):
        _ = trace.magnitudes


@pytest.mark.parametrize(("cond_tokens", "uncond_tokens"), [(5, 10), (10, 5)])
@pytest.mark.parametrize("pad", [wild.pad_with_empty, wild.pad_or_cut])
def test_padded_and_cut_prompts(network, pad, cond_tokens, uncond_tokens):
    """The host lengthens one of the two; rows are then compared as far as both go."""
    cond, uncond = prompts(2, tokens=cond_tokens), prompts(2, tokens=uncond_tokens, seed=2)
    extra = {"cond": wild.multicond([[(row, 1.0)] for row in cond]), "uncond": wild.scheduled(uncond), "cond_scale": 7.5}
    trace, truth, _ = watched(webui(network, pad=pad), network, OWN["euler"], extra)
    padded = pad(torch.stack(cond), torch.stack(uncond))
    agree(trace, truth.magnitudes(lambda _, i: ([(padded[0][i : i + 1], 1.0)], padded[1][i : i + 1])))


def test_prompts_that_change_on_the_way(network):
    """``[a:b:1]``: one embedding up to a step, another after it."""
    before, after, uncond = prompts(2), prompts(2, seed=5), prompts(2, seed=2)
    cond = wild.multicond([[([(1, before[i]), (99, after[i])], 1.0)] for i in range(2)])
    trace, truth, _ = watched(webui(network), network, extra={"cond": cond, "uncond": wild.scheduled(uncond), "cond_scale": 7.5})
    agree(trace, truth.magnitudes(lambda n, i: ([((before if n < 2 else after)[i][None], 1.0)], uncond[i][None])))


def test_mappings_with_a_pooled_vector(network):
    """SDXL: text and vector differ between the two."""
    row = lambda text, value: {"crossattn": text, "vector": torch.full((4,), value)}  # noqa: E731
    cond, uncond = [row(t, 0.5 + i) for i, t in enumerate(prompts(2))], [row(t, -0.5) for t in prompts(2, seed=2)]
    extra = {"cond": wild.multicond([[(one, 1.0)] for one in cond]), "uncond": wild.scheduled(uncond), "cond_scale": 7.5}
    one = lambda value: {key: tensor[None] for key, tensor in value.items()}  # noqa: E731
    for batched in (True, False):
        trace, truth, _ = watched(webui(network, batched=batched), network, extra=extra, keep="calls")
        agree(trace, truth.magnitudes(lambda _, i: ([(one(cond[i]), 1.0)], one(uncond[i]))))
        assert trace.evaluations[0].objective(trace.evaluations[0].embedding).detach().numpy() == pytest.approx(trace.magnitudes[0], rel=TOLERANCE)


def test_a_denoiser_that_is_exchanged_on_the_way(network):
    """The refiner of A1111: the one call in which it happens is missing, the ones after it are seen."""
    wrapper = webui(network)
    wrapper.exchange_at = 2
    of, extra = several()
    truth = wild.Truth(wrapper, network)
    with memhook.watch(wrapper) as trace:
        OWN["euler"](truth, noise(2), wild.sigmas_of(4), extra)
    uncond = prompts(2, seed=2)
    agree(trace, truth.magnitudes(lambda n, i: None if n == 2 else ([(c[None], w) for c, w in of[i]], uncond[i][None])))


@pytest.mark.parametrize("keep", ["scalars", "calls"])
def test_passes_for_some_samples_only(network, keep):
    """A host that guides a part of a batch: the other samples are missing, not zero."""

    class Partial(wild.Batched):
        def forward(self, x, sigma, uncond, cond, cond_scale):
            c = self.inner_model(x, sigma, cond=cond)
            u = self.inner_model(x[1:2], sigma[1:2], cond=uncond[1:2])
            return torch.cat([c[:1], u + cond_scale * (c[1:2] - u), c[2:]])

    extra = arguments(3)
    trace, truth, _ = watched(Partial(EpsDenoiser(network)), network, extra=extra, samples=3, keep=keep)
    agree(trace, truth.magnitudes(lambda n, i: plain_pair(extra)(n, i) if i == 1 else None))
