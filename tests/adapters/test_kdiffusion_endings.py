"""Watching k-diffusion's samplers: steps, dtypes, threads, interruptions, and what is left behind."""

import gc
import threading
import weakref

import numpy as np
import pytest
import torch

import memhook
from memhook_kdiffusion import KDiffusionAdapter, step_callback
from tests.adapters import kdiffusion_wrappers as wild
from tests.adapters.kdiffusion_runs import (
    SAMPLERS,
    TOLERANCE,
    arguments,
    noise,
    plain_pair,
    several,
    watched,
    webui,
)
from tests.adapters.kdiffusion_samplers import OWN, PACKAGE, EpsDenoiser, seeded

pytestmark = pytest.mark.filterwarnings("ignore:Should have t:UserWarning")  # torchsde, of rounding in the package's stochastic samplers


@pytest.fixture
def network():
    return wild.Latent()


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
