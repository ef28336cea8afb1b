"""Watching CFG wrappers of k-diffusion's samplers: truth is the bare network, asked again for one sample and one conditioning at a time."""

import pytest
import torch
from torch import nn

import memhook
from tests.adapters import kdiffusion_wrappers as wild
from tests.adapters.kdiffusion_runs import DENOISERS, PLAIN, SAMPLERS, TOLERANCE, agree, arguments, needs_package, noise, plain_pair, watched
from tests.adapters.kdiffusion_samplers import OWN, PACKAGE, REAL, EpsDenoiser, seeded

pytestmark = pytest.mark.filterwarnings("ignore:Should have t:UserWarning")  # torchsde, of rounding in the package's stochastic samplers


@pytest.fixture
def network():
    return wild.Latent()


# ---- every sampler, every plain layout, both kinds of model


@pytest.mark.parametrize("space", DENOISERS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_evaluation_of_every_sampler(network, sampler, space):
    wrapper = wild.Batched(DENOISERS[space](network))
    extra = arguments()
    trace, truth, result = watched(wrapper, network, SAMPLERS[sampler], extra, space=space)
    agree(trace, truth.magnitudes(plain_pair(extra)))
    assert trace.sigmas == pytest.approx([float(sigma[0]) for _, sigma in truth.asked])
    assert (trace.space, trace.roles, len(trace.runs)) == ("eps", "matched", 1)
    with seeded():
        assert torch.equal(SAMPLERS[sampler](wrapper, noise(2), wild.sigmas_of(4), extra), result)


@pytest.mark.parametrize("space", DENOISERS)
@pytest.mark.parametrize("kind", PLAIN)
def test_every_layout(network, kind, space):
    wrapper, extra = PLAIN[kind](DENOISERS[space](network)), arguments(3)
    trace, truth, _ = watched(wrapper, network, OWN["heun"], extra, space=space, samples=3)
    expected = truth.magnitudes(plain_pair(extra))
    agree(trace, expected)
    assert len(trace) == 2 * 4 - 1
    kept, *_ = watched(PLAIN[kind](DENOISERS[space](network)), network, OWN["heun"], extra, space=space, samples=3, keep="calls")
    agree(kept, expected)
    for evaluation, (x, sigma) in zip(kept.evaluations, truth.asked, strict=True):
        eps = torch.cat([(x[i : i + 1] - wrapper.inner_model(x[i : i + 1], sigma[:1], cond=extra["cond"][i : i + 1])) / sigma[0] for i in range(3)])
        assert torch.allclose(evaluation.pred_cond, eps, rtol=1e-3, atol=1e-5)
        assert torch.equal(evaluation.embedding, extra["cond"])


@needs_package
@pytest.mark.parametrize(("name", "space"), [("CompVisDenoiser", "eps"), ("CompVisVDenoiser", "v")])
@pytest.mark.parametrize("quantize", [False, True])
def test_the_packages_own_denoisers(network, name, space, quantize):
    """They call ``apply_model``, a plain method, on which hooks never fire."""
    wrapper, extra = wild.Batched(getattr(PACKAGE[1], name)(network, quantize=quantize)), arguments()
    trace, truth, _ = watched(wrapper, network, REAL["sample_heun"], extra, space=space, keep="calls")
    if not quantize:
        agree(trace, truth.magnitudes(plain_pair(extra)))
    for (x, sigma), row in zip(truth.asked, trace.magnitudes, strict=True):
        c, u = (wrapper.inner_model(x, sigma, cond=extra[role]) for role in ("cond", "uncond"))
        assert row == pytest.approx(((u - c).flatten(1).norm(dim=1) / sigma).detach().numpy(), rel=TOLERANCE)
    zero = trace.evaluations[0].objective(extra["uncond"])
    assert float(zero.max()) < 1e-3 * trace.magnitudes[0].min()


@needs_package
def test_the_packages_continuous_denoiser(network):
    class Continuous(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network

        def forward(self, x, t, cond):
            return self.net.apply_model(x, 50 * t, cond)

    wrapper, extra = wild.Batched(PACKAGE[1].VDenoiser(Continuous())), arguments()
    trace, truth, _ = watched(wrapper, network, REAL["sample_dpmpp_2m"], extra)
    for (x, sigma), row in zip(truth.asked, trace.magnitudes, strict=True):
        t = sigma.atan() / torch.pi * 2
        scaled = x / (sigma[:, None, None, None] ** 2 + 1).sqrt()
        c, u = (network.apply_model(scaled, 50 * t, extra[role]) for role in ("cond", "uncond"))
        assert row == pytest.approx(((c - u).flatten(1).norm(dim=1) / (sigma**2 + 1).sqrt()).detach().numpy(), rel=TOLERANCE)


# ---- images, other calls, equal rows


def test_the_pair_of_instruct_pix2pix_differs_in_the_text_alone(network):
    text, empty, image = wild.conditioning(1), wild.conditioning(1, seed=2), 2 * noise(1, 1.0, seed=8)
    extra = {
        "cond": {"c_crossattn": [text], "c_concat": [image]},
        "uncond": {"c_crossattn": [empty], "c_concat": [torch.zeros_like(image)]},
        "text_cfg_scale": 7.5,
        "image_cfg_scale": 1.5,
    }
    trace, truth, _ = watched(wild.Edit(EpsDenoiser(network)), network, extra=extra, samples=1, keep="calls")
    image_alone = {"c_crossattn": [empty], "c_concat": [image]}
    agree(trace, truth.magnitudes(lambda *_: ([(extra["cond"], 1.0)], image_alone)))
    assert float(trace.evaluations[0].objective(empty)) < 1e-4 * trace.magnitudes[0, 0]


def test_calls_for_other_ends_do_not_count(network):
    extra = arguments()
    trace, truth, _ = watched(wild.Perturbed(EpsDenoiser(network)), network, extra=extra)
    agree(trace, truth.magnitudes(plain_pair(extra)))


@pytest.mark.parametrize("kind", PLAIN)
def test_equal_prompts_and_equal_noise(network, kind):
    """One sample's conditional text is the other's unconditional one, one is its own, and all start from one noise."""
    a, b = wild.conditioning(2)[:, None]
    extra = {"cond": torch.cat([a, b, a]), "uncond": torch.cat([b, a, a]), "cond_scale": 7.5}
    wrapper = PLAIN[kind](EpsDenoiser(network))
    truth = wild.Truth(wrapper, network)
    with memhook.watch(wrapper) as trace:
        truth(noise(1).expand(3, -1, -1, -1), torch.full((3,), 12.0), **extra)
    expected = truth.magnitudes(plain_pair(extra))
    assert trace.magnitudes == pytest.approx(expected, rel=TOLERANCE, abs=1e-6)
    assert expected[0, 2] == 0


def test_one_conditioning_for_all_samples(network):
    class Expanding(wild.Batched):
        def forward(self, x, sigma, uncond, cond, cond_scale):
            return super().forward(x, sigma, uncond.expand(len(x), -1, -1), cond.expand(len(x), -1, -1), cond_scale)

    extra = {"cond": wild.conditioning(1), "uncond": wild.conditioning(1, seed=2), "cond_scale": 7.5}
    trace, truth, _ = watched(Expanding(EpsDenoiser(network)), network, extra=extra, samples=3)
    agree(trace, truth.magnitudes(lambda *_: ([(extra["cond"], 1.0)], extra["uncond"])))
    assert trace.groups.tolist() == [0, 0, 0]
