"""CFG wrappers and settings that the k-diffusion adapter refuses, or asks a layout of; plain functions as denoisers."""

import pytest
import torch
from torch import nn

import memhook
from memhook import GuidanceLayoutError, MemhookError, NoAdapterError
from memhook_kdiffusion import KDiffusionAdapter, guided, wrap
from tests.adapters import kdiffusion_wrappers as wild
from tests.adapters.kdiffusion_runs import agree, arguments, noise, plain_pair, watched
from tests.adapters.kdiffusion_samplers import OWN, PACKAGE, EpsDenoiser

pytestmark = pytest.mark.filterwarnings("ignore:Should have t:UserWarning")  # torchsde, of rounding in the package's stochastic samplers


@pytest.fixture
def network():
    return wild.Latent()


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
