"""Guarding, mitigating, attributing and optimizing in samplers that are called as they are, without a change."""

import warnings

import numpy as np
import pytest
import torch

import memhook
from memhook import Intervention
from memhook_kdiffusion import KDiffusionAdapter, wrap
from tests.adapters import kdiffusion_wrappers as wild
from tests.adapters.kdiffusion_runs import PLAIN, arguments, noise, prompts, several, webui
from tests.adapters.kdiffusion_samplers import OWN, REAL, EpsDenoiser, VDenoiser, seeded

pytestmark = pytest.mark.filterwarnings("ignore:Should have t:UserWarning")
SIGMAS = wild.sigmas_of(4)
GUARDED = {name: {**OWN, **REAL}[name] for name in [*OWN, *REAL] if name in OWN or name in ("sample_euler", "sample_dpmpp_2m", "sample_dpmpp_sde")}


def target_between(trace):
    """A magnitude that the loudest sample is above and all others are below, and that sample."""
    order = np.sort(trace.magnitudes[0])
    assert order[-1] > order[-2]
    return float(0.7 * order[-1] + 0.3 * order[-2]), int(trace.magnitudes[0].argmax())


def guarded(make, sampler, extra, *, samples=2, adapter=None, x=None):
    """A plain run and a mitigated one of the loudest sample."""
    x = noise(samples) if x is None else x

    def run(wrapper):
        with seeded():
            return sampler(wrapper, x, SIGMAS, extra)

    wrapper = make()
    with memhook.watch(wrapper, adapter=adapter and adapter(wrapper)) as trace:
        plain = run(wrapper)
    target, loud = target_between(trace)
    wrapper = make()
    with (
        wild.hooks_of(wrapper),
        memhook.mitigate(wrapper, target_magnitude=target, adapter=adapter and adapter(wrapper), fixed_tokens=0, lr=0.1, max_steps=40) as report,
    ):
        repaired = run(wrapper)
    assert report.flagged.tolist() == [sample == loud for sample in range(samples)]
    assert report.after[loud] <= target < report.before[loud]
    assert report.substituted == len(report.trace) - 1
    others = [sample for sample in range(samples) if sample != loud]
    assert torch.equal(repaired[others], plain[others])  # to the bit
    assert not torch.allclose(repaired[loud], plain[loud], rtol=1e-3)
    assert all(parameter.grad is None for parameter in wrapper.parameters())
    return run, loud, report, repaired


def replaced(extra, loud, report):
    """The arguments with the new embedding from the start."""
    cond = extra["cond"].clone()
    cond[loud] = report.optimized.embedding[0]
    return {**extra, "cond": cond}


@pytest.mark.parametrize("name", GUARDED)
def test_every_kind_of_sampler_comes_out_as_with_the_new_embedding_all_along(name):
    network, sampler = wild.Latent(), GUARDED[name]
    if name == "adaptive":
        network = wild.Latent(seed=2)
    extra = arguments()
    _, loud, report, repaired = guarded(lambda: wild.Batched(EpsDenoiser(network)), sampler, extra)
    with seeded():
        expected = sampler(wild.Batched(EpsDenoiser(network)), noise(2), SIGMAS, replaced(extra, loud, report))
    assert torch.allclose(repaired, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("denoiser", [EpsDenoiser, VDenoiser])
@pytest.mark.parametrize("kind", PLAIN)
def test_every_layout(kind, denoiser):
    """Also where the conditional prediction is with the wrapper already when the guard decides, and where the wrapper counts its calls."""
    network, extra = wild.Latent(), arguments(3)
    _, loud, report, repaired = guarded(lambda: PLAIN[kind](denoiser(network)), OWN["heun"], extra, samples=3)
    with seeded():
        expected = OWN["heun"](PLAIN[kind](denoiser(network)), noise(3), SIGMAS, replaced(extra, loud, report))
    assert torch.allclose(repaired, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("tokens", [wild.TOKENS, 8])
def test_a1111(tokens, batched, mask):
    """Weighted prompts, slices, a buffer that copies predictions, a mask on the result, and a count of steps that must not be off by one."""
    network = wild.Latent()
    of, extra = several()
    extra["uncond"] = wild.scheduled(prompts(2, tokens=tokens, seed=2))
    made = []

    def make():
        made.append(webui(network, batched=batched, mask=mask))
        return made[-1]

    _, loud, report, repaired = guarded(make, OWN["heun"], extra)
    assert made[-1].step == len(report.trace)
    better = report.optimized.embedding[0].reshape(3, wild.TOKENS, wild.WIDTH)
    of = list(of)
    of[loud] = [(better[part], weight) for part, (_, weight) in enumerate(of[loud])]
    expected = OWN["heun"](webui(network, batched=batched, mask=mask), noise(2), SIGMAS, {**extra, "cond": wild.multicond(of)})
    assert torch.allclose(repaired, expected, rtol=1e-3, atol=1e-3)
    assert np.isfinite(report.trace.magnitudes).all()


@pytest.mark.parametrize("layout", ["uncond_first", "cond_first"])
def test_closures(layout):
    network, extra = wild.Latent(), arguments()

    def make(extra=extra):
        denoiser = EpsDenoiser(network)
        order = ("uncond", "cond") if layout == "uncond_first" else ("cond", "uncond")

        def function(x, sigma):
            text = torch.cat([extra[role] for role in order])
            found = dict(zip(order, denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), cond=text).chunk(2), strict=True))
            return found["uncond"] + 7.5 * (found["cond"] - found["uncond"])

        return wrap(function, denoiser=denoiser, layout=layout)

    _, loud, report, repaired = guarded(make, lambda model, x, sigmas, _: OWN["heun"](model, x, sigmas, {}), extra)
    expected = OWN["heun"](make(replaced(extra, loud, report)), noise(2), SIGMAS, {})
    assert torch.allclose(repaired, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("made_inside", [False, True], ids=["tensors made outside", "tensors made inside"])
@pytest.mark.parametrize("kind", [*PLAIN, "a1111"])
def test_under_inference_mode(kind, made_inside):
    """A part of a batch is repaired by gradients inside of a mode that makes no tensors for autograd; all comes out as under no_grad."""
    network = wild.Latent()

    def run(mode):
        wrapper = webui(network) if kind == "a1111" else PLAIN[kind](EpsDenoiser(network))
        extra = several()[1] if kind == "a1111" else arguments(2)
        x, sigmas = noise(2), SIGMAS.clone()
        mitigation = memhook.mitigate(wrapper, target_magnitude=target, fixed_tokens=0, lr=0.1, max_steps=40)
        with mitigation as report, mode():
            if made_inside:
                x, sigmas, extra = (
                    x.clone(),
                    sigmas.clone(),
                    {key: value.clone() if torch.is_tensor(value) else value for key, value in extra.items()},
                )
            result = OWN["heun"](wrapper, x, sigmas, extra)
        return result.clone(), report

    wrapper = webui(network) if kind == "a1111" else PLAIN[kind](EpsDenoiser(network))
    with memhook.watch(wrapper) as trace:
        OWN["heun"](wrapper, noise(2), SIGMAS, several()[1] if kind == "a1111" else arguments(2))
    target, loud = target_between(trace)
    (expected, usual), (found, report) = run(torch.no_grad), run(torch.inference_mode)
    assert report.flagged.tolist() == usual.flagged.tolist() == [sample == loud for sample in range(2)]
    assert torch.equal(report.optimized.embedding, usual.optimized.embedding)
    assert torch.equal(found, expected)
    assert report.substituted == len(report.trace) - 1


def test_two_images_of_a_prompt_get_their_own_embeddings():
    """Rows of one text are told apart by the noisy sample that they were made from."""
    network = wild.Latent()
    one = wild.conditioning(1).repeat(2, 1, 1)
    extra = {**arguments(), "cond": one}
    wrapper = wild.CondFirst(EpsDenoiser(network))
    seen = []
    handle = wrapper.inner_model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["cond"]), with_kwargs=True)
    with memhook.mitigate(wrapper, target_magnitude=0.0, fixed_tokens=0, max_steps=3) as report, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a magnitude of exactly 0 is not reached
        OWN["euler"](wrapper, noise(2), SIGMAS, extra)
    handle.remove()
    own = report.optimized.embedding
    assert not torch.equal(own[0], own[1])
    with memhook.watch(wrapper) as trace:
        OWN["euler"](wrapper, noise(2), SIGMAS, {**extra, "cond": own})
    assert report.trace.magnitudes[1:] == pytest.approx(trace.magnitudes[1:], rel=1e-3)
    assert report.substituted == 3


def test_the_guard_judges_by_a_calibration_and_stops():
    network, extra = wild.Latent(), arguments(1)
    wrapper = wild.Batched(EpsDenoiser(network))

    def trace_of(seed):
        clean = {**extra, "cond": 0.3 * wild.conditioning(1, seed=10 + seed)}
        return memhook.probe(wrapper, lambda: OWN["euler"](wrapper, noise(1, seed=seed), SIGMAS, clean))

    calibration = memhook.calibrate([trace_of(seed) for seed in range(20)], first=1)
    loud = {**extra, "cond": 4 * wild.conditioning(1)}
    finished = []
    guard = memhook.guard(wrapper, calibration, fpr=0.05, action="stop")
    with wild.hooks_of(wrapper), pytest.raises(memhook.MemorizationDetectedError) as caught, guard:
        finished.append(OWN["euler"](wrapper, noise(1), SIGMAS, loud))
    assert not finished
    assert len(caught.value.trace) == 1
    quiet = {**extra, "cond": 0.01 * wild.conditioning(1) + extra["uncond"]}
    with memhook.guard(wrapper, calibration, fpr=0.05) as report:
        result = OWN["euler"](wrapper, noise(1), SIGMAS, quiet)
    assert torch.equal(result, OWN["euler"](wrapper, noise(1), SIGMAS, quiet))
    assert report.flagged.tolist() == [False]

    def twice():
        with memhook.guard(wrapper, calibration, fpr=0.05):
            for _ in range(2):
                OWN["euler"](wrapper, noise(1), SIGMAS, quiet)

    with pytest.raises(memhook.MemhookError, match="second run"):
        twice()


def test_two_guards_in_one_another_and_a_watch_around():
    """The wrapper is asked twice for the repaired step; nobody else sees that."""
    wrapper, extra = wild.TwoCallsCondFirst(EpsDenoiser(wild.Latent())), arguments()
    with memhook.watch(wrapper) as plain:
        OWN["euler"](wrapper, noise(2), SIGMAS, extra)
    target, _ = target_between(plain)
    mitigation = memhook.mitigate(wrapper, target_magnitude=target, fixed_tokens=0, lr=0.1, max_steps=40)
    with memhook.watch(wrapper) as outer, mitigation as report, memhook.watch(wrapper) as inner:
        OWN["euler"](wrapper, noise(2), SIGMAS, extra)
    assert len(outer) == len(inner) == len(report.trace) == 4
    assert outer.magnitudes[0] == pytest.approx(plain.magnitudes[0], rel=1e-5)
    assert outer.magnitudes == pytest.approx(report.trace.magnitudes, rel=1e-5)


def test_another_prediction_alone():
    """An observer may replace the prediction and leave the embedding: it is as if the denoiser had predicted so."""
    network, extra = wild.Latent(), arguments()
    for kind in PLAIN.values():
        wrapper = kind(EpsDenoiser(network))
        x, sigma = noise(2), torch.full((2,), 12.0)
        plain = wrapper(x, sigma, **extra)
        with memhook.watch(
            wrapper, on_evaluation=lambda evaluation: Intervention(pred_cond=torch.cat([evaluation.pred_uncond[:1], evaluation.pred_cond[1:]]))
        ):
            changed = wrapper(x, sigma, **extra)
        uncond = wrapper.inner_model(x, sigma, cond=extra["uncond"])
        assert torch.allclose(changed[0], uncond[0].clamp(-40, 40) if kind is wild.TwoCalls else uncond[0], rtol=1e-4, atol=1e-4)
        assert torch.equal(changed[1], plain[1])


def test_attribution_and_optimization():
    """Gradients against finite differences of the bare network, in noise space."""
    network, extra = wild.Latent(dtype=torch.float64), arguments()
    network.alphas_cumprod = network.alphas_cumprod.double()
    extra = {key: value.double() if torch.is_tensor(value) else value for key, value in extra.items()}
    wrapper = wild.TwoCalls(VDenoiser(network))
    truth = wild.Truth(wrapper, network, space="v")
    trace = memhook.probe(wrapper, lambda: OWN["euler"](truth, noise(2).double(), SIGMAS.double(), extra))
    first = trace.evaluations[0]
    scores = memhook.attribute_tokens(trace).scores
    x, sigma = truth.asked[0]
    for sample in range(2):
        for token in (0, 3):
            slopes = []
            for axis in range(wild.WIDTH):
                ends = []
                for step in (1e-4, -1e-4):
                    text = extra["cond"][sample : sample + 1].clone()
                    text[0, token, axis] += step
                    one = x[sample : sample + 1], sigma[sample]
                    ends.append(float((truth.noise(*one, text) - truth.noise(*one, extra["uncond"][sample : sample + 1])).norm()))
                slopes.append((ends[0] - ends[1]) / 2e-4)
            assert scores[sample, token] == pytest.approx(np.linalg.norm(slopes), rel=1e-4)
    found = memhook.optimize_embedding(first.objective, first.embedding, target=0.0, max_steps=5, fixed_tokens=0)
    assert (found.after < found.before).all()


def test_a_declared_wrapper():
    network, extra = wild.Latent(), arguments(3)

    class Doubled(wild.CondFirst):
        def forward(self, x, sigma, uncond, cond, cond_scale):
            return super().forward(x, sigma, uncond, cond * 2, cond_scale)

    adapter = lambda wrapper: KDiffusionAdapter(wrapper, layout="cond_first")  # noqa: E731
    _, loud, report, repaired = guarded(lambda: Doubled(EpsDenoiser(network)), OWN["euler"], extra, samples=3, adapter=adapter)
    cond = extra["cond"].clone()
    cond[loud] = report.optimized.embedding[0] / 2
    assert torch.allclose(repaired, OWN["euler"](Doubled(EpsDenoiser(network)), noise(3), SIGMAS, {**extra, "cond": cond}), rtol=1e-3, atol=1e-3)
