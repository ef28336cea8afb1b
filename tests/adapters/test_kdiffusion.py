"""Watching CFG wrappers of k-diffusion's samplers: truth is the bare network, asked again for one sample and one conditioning at a time."""

import gc
import threading
import weakref

import numpy as np
import pytest
import torch
from torch import nn

import memhook
from memhook import GuidanceLayoutError, MemhookError, NoAdapterError, NoGuidanceError
from memhook_kdiffusion import KDiffusionAdapter, guided, step_callback, wrap
from tests.adapters import kdiffusion_wrappers as wild
from tests.adapters.kdiffusion_samplers import OWN, PACKAGE, REAL, EpsDenoiser, VDenoiser, seeded

needs_package = pytest.mark.skipif(PACKAGE is None, reason="needs k-diffusion (pip install --no-deps k-diffusion torchdiffeq torchsde trampoline)")
pytestmark = pytest.mark.filterwarnings("ignore:Should have t:UserWarning")  # torchsde, of rounding in the package's stochastic samplers
SAMPLERS = {**OWN, **REAL}
DENOISERS = {"eps": EpsDenoiser, "v": VDenoiser}
PLAIN = {"batched": wild.Batched, "cond first": wild.CondFirst, "two calls": wild.TwoCalls, "two calls, cond first": wild.TwoCallsCondFirst}
TOLERANCE = 1e-4
"""Ten times stricter than promised; float32 reaches about 1e-6, and more where ``x`` is large beside what guidance changes."""


@pytest.fixture
def network():
    return wild.Latent()


def noise(samples, level=12.0, seed=3):
    return level * torch.randn(samples, wild.CHANNELS, wild.SIZE, wild.SIZE, generator=torch.Generator().manual_seed(seed))


def arguments(samples=2, scale=7.5):
    """As a script passes them to a sampler: a row for each sample."""
    return {"cond": wild.conditioning(samples), "uncond": wild.conditioning(1, seed=2).repeat(samples, 1, 1), "cond_scale": scale}


def plain_pair(extra):
    return lambda _, sample: ([(extra["cond"][sample : sample + 1], 1.0)], extra["uncond"][sample : sample + 1])


def watched(wrapper, network, sampler=OWN["euler"], extra=None, *, space="eps", samples=2, steps=4, adapter=None, keep="scalars"):
    """One run under a watch, with what it was asked."""
    truth = wild.Truth(wrapper, network, space=space)
    with wild.hooks_of(wrapper), seeded(), memhook.watch(wrapper, adapter=adapter, keep=keep) as trace:
        result = sampler(truth, noise(samples), wild.sigmas_of(steps), extra if extra is not None else arguments(samples))
    return trace, truth, result


def agree(trace, expected):
    assert trace.magnitudes.shape == expected.shape
    assert np.array_equal(np.isnan(trace.magnitudes), np.isnan(expected))
    assert np.nanmax(np.abs(trace.magnitudes / expected - 1)) < TOLERANCE


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


# ---- A1111


def webui(network, **options):
    return wild.WebUI(lambda: EpsDenoiser(network), **options)


def prompts(samples, *, tokens=wild.TOKENS, seed=1):
    return list(wild.conditioning(samples, tokens=tokens, seed=seed))


TWO = prompts(4), [1.0, -0.4, 1.7, 1.0]
"""The first sample has three prompts with weights, the second has one."""


def several(scale=7.5):
    cond, weights = TWO
    of = [[(cond[0], weights[0]), (cond[1], weights[1]), (cond[2], weights[2])], [(cond[3], weights[3])]]
    return of, {"cond": wild.multicond(of), "uncond": wild.scheduled(prompts(2, seed=2)), "cond_scale": scale}


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


# ---- what is refused


@pytest.mark.parametrize("keep", ["scalars", "calls"])
def test_conditioning_that_is_not_the_wrappers_is_an_error(network, keep):
    class Changing(wild.Batched):
        def forward(self, x, sigma, uncond, cond, cond_scale):
            return super().forward(x, sigma, uncond + 0.01, cond * 2, cond_scale)

    wrapper, extra = Changing(EpsDenoiser(network)), arguments()
    with pytest.raises(GuidanceLayoutError, match=r"another conditioning.*layout="):
        _ = watched(wrapper, network, extra=extra, keep=keep)[0].magnitudes
    adapter = KDiffusionAdapter(wrapper, layout="uncond_first")
    trace, truth, _ = watched(wrapper, network, extra=extra, adapter=adapter, keep=keep)
    agree(trace, truth.magnitudes(lambda _, i: ([(extra["cond"][i : i + 1] * 2, 1.0)], extra["uncond"][i : i + 1] + 0.01)))
    assert trace.roles == "declared"


def test_a_sample_that_the_wrapper_scales_is_an_error(network):
    """Then what it calls is no denoiser of k-diffusion's form, and its outputs are no clean samples."""

    class Scaling(wild.Batched):
        def forward(self, x, sigma, uncond, cond, cond_scale):
            return super().forward(x / 2, sigma, uncond, cond, cond_scale)

    with pytest.raises(GuidanceLayoutError, match="another noisy sample"):
        _ = watched(Scaling(EpsDenoiser(network)), network)[0].magnitudes


def test_text_in_both_roles_with_something_else_that_differs_is_an_error(network):
    """The vectors differ and the texts are one, so nothing tells which row is which."""
    text = wild.conditioning(1)
    rows = {"crossattn": torch.cat([text, text]), "vector": torch.tensor([[0.0], [1.0]])}

    class Both(wild.Batched):
        def forward(self, x, sigma, uncond, cond):
            u, c = self.inner_model(torch.cat([x, x]), torch.cat([sigma, sigma]), cond=rows).chunk(2)
            return u + 7 * (c - u)

    extra = {"uncond": {"crossattn": text, "vector": torch.zeros(1, 1)}, "cond": {"crossattn": text, "vector": torch.ones(1, 1)}}
    wrapper = Both(EpsDenoiser(network))
    with pytest.raises(GuidanceLayoutError, match="differ in something else than the text"):
        _ = watched(wrapper, network, extra=extra, samples=1)[0].magnitudes
    adapter = KDiffusionAdapter(wrapper, layout="uncond_first")
    trace, truth, _ = watched(wrapper, network, extra=extra, samples=1, adapter=adapter)
    agree(trace, truth.magnitudes(lambda *_: ([(extra["cond"], 1.0)], extra["uncond"])))


def test_arguments_of_an_unknown_form_are_an_error(network):
    extra = {**arguments(), "cond": object()}
    with pytest.raises(GuidanceLayoutError, match=r"the argument 'cond' of Batched is a object.*layout="):
        watched(wild.Batched(EpsDenoiser(network)), network, extra=extra)
    extra = {**arguments(), "cond": wild.conditioning(3)}
    with pytest.raises(GuidanceLayoutError, match=r"Tensor of shape \(3, 5, 6\) for 2 samples"):
        watched(wild.Batched(EpsDenoiser(network)), network, extra=extra)


def test_a_wrapper_that_calls_a_plain_method_is_an_error(network):
    class Direct(wild.Batched):
        def forward(self, x, sigma, uncond, cond, cond_scale):
            return self.inner_model.forward(x, sigma, cond=cond)

    wrapper = Direct(EpsDenoiser(network))
    with pytest.raises(GuidanceLayoutError, match=r"without a call of its denoiser that hooks can see.*denoiser=module"):
        watched(wrapper, network)


def test_what_is_no_wrapper_is_not_claimed(network):
    for target in (EpsDenoiser(network), nn.Linear(2, 2)):
        with pytest.raises(NoAdapterError, match="no adapter knows"), memhook.watch(target):
            pass
    if PACKAGE is not None:
        denoiser = PACKAGE[1].CompVisDenoiser(network)
        with pytest.raises(NoAdapterError, match="is a denoiser, which makes no guided prediction by itself"), memhook.watch(denoiser):
            pass


@pytest.mark.parametrize(
    ("options", "message"),
    [({"layout": "sideways"}, "layout is 'sideways'"), ({"layout": ("cond", "image")}, "layout is"), ({"cond": "c1", "uncond": None}, None)],
)
def test_settings_are_checked(network, options, message):
    wrapper = wild.Batched(EpsDenoiser(network))
    if message is None:
        assert KDiffusionAdapter(wrapper, **options).host == "kdiffusion"
        return
    with pytest.raises(MemhookError, match=message):
        KDiffusionAdapter(wrapper, **options)


def test_parameters_of_other_names(network):
    class Renamed(wild.Batched):
        def forward(self, z, s, *, prompt, nothing, w=7.5):
            return super().forward(z, s, nothing, prompt, w)

    wrapper, extra = Renamed(EpsDenoiser(network)), arguments()
    with pytest.raises(MemhookError, match=r"takes \(z, s, prompt, nothing, w\).*name it"):
        KDiffusionAdapter(wrapper)
    with pytest.raises(NoAdapterError), memhook.watch(wrapper):
        pass
    named = {"prompt": extra["cond"], "nothing": extra["uncond"]}
    trace, truth, _ = watched(wrapper, network, extra=named, adapter=KDiffusionAdapter(wrapper, cond="prompt", uncond="nothing"))
    agree(trace, truth.magnitudes(plain_pair(extra)))


def test_a_declared_layout_that_does_not_fit_is_an_error(network):
    wrapper = wild.Batched(EpsDenoiser(network))
    adapter = KDiffusionAdapter(wrapper, layout=("cond", "image", "uncond"))
    with pytest.raises(GuidanceLayoutError, match=r"on 4 rows for 2 samples.* expects 6"):
        watched(wrapper, network, adapter=adapter)


# ---- functions


@pytest.mark.parametrize("layout", ["uncond_first", "cond_first"])
@pytest.mark.parametrize("calls", [1, 2])
def test_closures(network, layout, calls):
    denoiser, extra = EpsDenoiser(network), arguments()
    order = ("uncond", "cond") if layout == "uncond_first" else ("cond", "uncond")

    def function(x, sigma):
        if calls == 1:
            text = torch.cat([extra[role] for role in order])
            found = dict(zip(order, denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), cond=text).chunk(2), strict=True))
        else:
            found = {role: denoiser(x, sigma, cond=extra[role]) for role in order}
        return found["uncond"] + 7.5 * (found["cond"] - found["uncond"])

    model = wrap(function, denoiser=denoiser, layout=layout)
    trace, truth, result = watched(model, network, OWN["dpm_2"], {}, keep="calls")
    agree(trace, truth.magnitudes(plain_pair(extra)))
    assert torch.equal(result, OWN["dpm_2"](function, noise(2), wild.sigmas_of(4), {}))
    assert trace.roles == "declared"
    assert float(trace.evaluations[0].objective(extra["uncond"]).max()) < 1e-4 * trace.magnitudes[0].min()


def test_a_function_that_takes_its_conditioning_needs_no_layout(network):
    denoiser, extra = EpsDenoiser(network), arguments()

    def function(x, sigma, cond, uncond, cond_scale):
        c, u = denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), cond=torch.cat([cond, uncond])).chunk(2)
        return u + cond_scale * (c - u)

    trace, truth, _ = watched(wrap(function, denoiser=denoiser), network, extra=extra)
    agree(trace, truth.magnitudes(plain_pair(extra)))
    assert trace.roles == "matched"


def test_guidance_around_a_function(network):
    denoiser, extra = EpsDenoiser(network), arguments()
    model = guided(lambda x, sigma, cond: denoiser(x, sigma, cond=cond), **extra)
    trace, truth, result = watched(model, network, extra={}, keep="calls")
    agree(trace, truth.magnitudes(plain_pair(extra)))
    assert trace.guidance_scale.tolist() == [7.5, 7.5]
    assert torch.equal(result, OWN["euler"](wild.Batched(denoiser), noise(2), wild.sigmas_of(4), extra))


def test_functions_that_cannot_be_seen_are_refused():
    with pytest.raises(MemhookError, match="guided do the guidance"):
        wrap(lambda x, sigma: x, denoiser=lambda x, sigma: x)
    with pytest.raises(MemhookError, match="expected what the sampler calls"):
        wrap(3, denoiser=nn.Identity())
    with pytest.raises(MemhookError, match=r"expected a torch\.nn\.Module"):
        KDiffusionAdapter(lambda x, sigma: x)
    with pytest.raises(MemhookError, match="layout"), memhook.watch(wrap(lambda x, sigma: x, denoiser=nn.Identity()), adapter=None):
        pass


# ---- steps


def test_steps_are_numbered_through_the_callback(network):
    def steps(sampler, count=4):
        wrapper = wild.Batched(EpsDenoiser(network))
        seen = []
        with seeded(), memhook.watch(wrapper) as trace:
            SAMPLERS[sampler](
                wrapper, noise(2), wild.sigmas_of(count), arguments(), callback=step_callback(trace, then=lambda info: seen.append(info["i"]))
            )
        assert seen == sorted(set(trace.steps[:, 0]))
        return trace.steps.tolist()

    assert steps("euler") == [[i, 0] for i in range(4)]
    assert steps("heun") == [[0, 0], [0, 1], [1, 0], [1, 1], [2, 0], [2, 1], [3, 0]]
    assert steps("adaptive")[:6] == [[0, 0], [0, 1], [1, 0], [1, 1], [2, 0], [2, 1]]
    if PACKAGE is not None:
        assert steps("sample_dpmpp_sde") == steps("heun") == steps("sample_dpm_2") == steps("sample_heun")
        assert steps("sample_dpm_fast") == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2], [2, 0]]
        adaptive = steps("sample_dpm_adaptive")
        assert adaptive == [[i, j] for i in range(len(adaptive) // 3) for j in range(3)]


def test_a_second_run_is_told_from_a_step_that_is_tried_again(network):
    wrapper = wild.Batched(EpsDenoiser(network))
    x = noise(2)
    with memhook.watch(wrapper) as trace:
        OWN["adaptive"](wrapper, x, wild.sigmas_of(4), arguments())
    assert trace.sigmas[2] == trace.sigmas[0] > trace.sigmas[1]  # the first step was rejected
    assert len(trace.runs) == 1
    with memhook.watch(wrapper) as trace:
        for _ in range(2):
            OWN["euler"](wrapper, x, wild.sigmas_of(4), arguments())  # from the very same tensor
    assert [len(run) for run in trace.runs] == [4, 4]


# ---- dtypes, threads, endings


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.15), (torch.float16, 0.02), (torch.float64, 1e-6)])
def test_other_dtypes(dtype, tolerance):
    """In half precision the clean samples are as coarse as ``x``; that is the host's rounding, not the watch's."""
    network = wild.Latent(dtype=dtype)
    network.alphas_cumprod = network.alphas_cumprod.to(dtype)
    wrapper = wild.Batched(EpsDenoiser(network))
    extra = {key: value.to(dtype) if isinstance(value, torch.Tensor) else value for key, value in arguments().items()}
    truth = wild.Truth(wrapper, network)
    with memhook.watch(wrapper, keep="calls") as trace:
        truth(noise(2, 1.0).to(dtype), torch.full((2,), 1.0, dtype=dtype), **extra)
    assert trace.magnitudes == pytest.approx(truth.magnitudes(plain_pair(extra)), rel=tolerance)
    c, u = (wrapper.inner_model(*truth.asked[0], cond=extra[role]).double() for role in ("cond", "uncond"))
    assert trace.magnitudes[0] == pytest.approx((c - u).flatten(1).norm(dim=1).detach().numpy(), rel=1e-2 if dtype is torch.bfloat16 else 1e-3)
    assert torch.isfinite(trace.evaluations[0].objective(extra["cond"])).all()


def test_a_host_that_runs_its_network_in_half_precision(network):
    """A1111: ``x`` is float32, the wrapper hands half of it on, under autocast as well."""

    class Half(wild.Batched):
        def forward(self, x, sigma, uncond, cond, cond_scale):
            half = [value.half() for value in (x, sigma, uncond, cond)]
            return super().forward(*half, cond_scale).float()

    half = wild.Latent(dtype=torch.float16)
    half.alphas_cumprod = half.alphas_cumprod.half()
    wrapper, extra = Half(EpsDenoiser(half)), arguments()
    with memhook.watch(wrapper) as trace:
        wrapper(noise(2, 1.0), torch.ones(2), **extra)
    assert trace.roles == "matched"
    full, extra = wild.Batched(EpsDenoiser(network)), arguments()
    with torch.autocast("cpu", dtype=torch.bfloat16), memhook.watch(full, keep="calls") as mixed:
        full(noise(2, 1.0), torch.ones(2), **extra)
    assert mixed.magnitudes == pytest.approx(trace.magnitudes, rel=0.1)
    assert mixed.evaluations[0].objective(extra["cond"]).detach().numpy() == pytest.approx(mixed.magnitudes[0], rel=0.05)


def test_inference_mode(network):
    wrapper, extra = wild.Batched(EpsDenoiser(network)), arguments()
    with torch.inference_mode(), memhook.watch(wrapper, keep="calls") as trace:
        wrapper(noise(2), torch.full((2,), 12.0), **{key: value.clone() if torch.is_tensor(value) else value for key, value in extra.items()})
    embedding = extra["cond"].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(trace.evaluations[0].objective(embedding).sum(), embedding)
    assert gradient.abs().sum() > 0


def test_two_threads_see_their_own_calls(network):
    wrapper, found = wild.TwoCalls(EpsDenoiser(network)), {}

    def work(samples):
        with memhook.watch(wrapper) as trace:
            OWN["heun"](wrapper, noise(samples), wild.sigmas_of(6), arguments(samples))
        found[samples] = trace.magnitudes

    threads = [threading.Thread(target=work, args=(samples,)) for samples in (1, 2, 3)]
    with wild.hooks_of(wrapper):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for samples, magnitudes in found.items():
        fresh = wild.TwoCalls(EpsDenoiser(network))
        trace, *_ = watched(fresh, network, OWN["heun"], arguments(samples), samples=samples, steps=6)
        assert magnitudes.shape == trace.magnitudes.shape
        assert magnitudes[0] == pytest.approx(trace.magnitudes[0], rel=1e-4)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["network", "callback"])
def test_interruptions_leave_nothing_and_the_next_run_is_right(network, error, where):
    wrapper, extra = wild.TwoCalls(EpsDenoiser(network)), arguments()
    adapter = KDiffusionAdapter(wrapper)
    original, calls = network.apply_model, []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:  # between the two calls of an evaluation
            raise error
        return original(*args, **kwargs)

    def callback(info):
        if info["i"] == 1:
            raise error

    with wild.hooks_of(wrapper), memhook.watch(wrapper, adapter=adapter) as trace:
        if where == "network":
            network.apply_model = failing
        with pytest.raises(error):
            OWN["euler"](wrapper, noise(2), wild.sigmas_of(4), extra, callback=callback if where == "callback" else None)
        network.apply_model = original
        broken = len(trace)
        truth = wild.Truth(wrapper, network)
        OWN["euler"](truth, noise(2), wild.sigmas_of(4), extra)
    assert broken == (1 if where == "network" else 2)
    assert trace.magnitudes[broken:] == pytest.approx(truth.magnitudes(plain_pair(extra)), rel=TOLERANCE)
    with wild.hooks_of(wrapper), pytest.raises(error), memhook.watch(wrapper):
        raise error


def test_nothing_is_kept_alive(network):
    wrapper = wild.Batched(EpsDenoiser(network))
    outputs = []
    handle = wrapper.inner_model.register_forward_hook(lambda module, args, output: outputs.append(weakref.ref(output)))
    trace = watched(wrapper, network)[0]
    handle.remove()
    assert np.isfinite(trace.magnitudes).all()
    gone = weakref.ref(wrapper)
    del wrapper
    gc.collect()
    assert gone() is None
    assert len(outputs) == 4
    assert all(reference() is None for reference in outputs)


def test_nothing_waits_for_the_device_until_a_number_is_read(network, monkeypatch):
    """Reading a value (``item``, ``bool``, ``tolist``, ``numpy``, ``cpu``) is what waits."""
    import memhook_kdiffusion.run as module

    waited = []
    methods = ("item", "__bool__", "tolist", "numpy", "__float__", "__int__", "__index__", "nonzero")
    originals = {name: getattr(torch.Tensor, name) for name in methods}
    inside = [0]
    for name in methods:

        def spy(tensor, *args, _name=name, **kwargs):
            if inside[0]:
                waited.append(_name)
            return originals[_name](tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, spy)
    for name in ("on_open", "on_arguments", "on_call", "on_close"):
        original = getattr(module.Run, name)

        def counted(run, *args, _original=original):
            inside[0] += 1
            try:
                return _original(run, *args)
            finally:
                inside[0] -= 1

        monkeypatch.setattr(module.Run, name, counted)
    wrapper = webui(network)
    with memhook.watch(wrapper) as trace:
        OWN["heun"](wrapper, noise(2), wild.sigmas_of(4), several()[1])
    assert waited == []
    assert trace.magnitudes.shape == (7, 2)


def test_an_exchanged_network_has_another_fingerprint(network):
    def described(of):
        wrapper = wild.Batched(EpsDenoiser(of))
        with memhook.watch(wrapper) as trace:
            wrapper(noise(2), torch.full((2,), 12.0), **arguments())
        return trace.setting["model"]

    class Plain:
        """diffusers' k pipelines: the object around the network is no module."""

        alphas_cumprod = network.alphas_cumprod

        def __init__(self, of):
            self.model = of

        def apply_model(self, *args, **kwargs):
            return self.model.apply_model(*args, **kwargs)

    assert described(network) == described(network)
    assert described(network) != described(wild.Latent(seed=1))
    assert described(Plain(network)) == described(network)
