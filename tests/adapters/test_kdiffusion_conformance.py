"""The k-diffusion adapter passes the public conformance suite in every layout."""

import pytest
import torch

from memhook.testing import AdapterConformance
from memhook_kdiffusion import KDiffusionAdapter, wrap
from tests.adapters import kdiffusion_wrappers as wild
from tests.adapters.kdiffusion_runs import noise
from tests.adapters.kdiffusion_samplers import EpsDenoiser, VDenoiser, heun

WORDS = {"": 0, "a lighthouse at dusk": 1, "two red apples": 2}
TEXTS = wild.conditioning(3)


class Switched(wild.Batched):
    """A wrapper that leaves the unconditional pass out where guidance is off."""

    def __init__(self, wrapped):
        super().__init__(wrapped.inner_model)
        self.wrapped = wrapped

    def forward(self, x, sigma, uncond, cond, cond_scale):
        return self.wrapped(x, sigma, uncond, cond, cond_scale) if cond_scale > 1 else self.inner_model(x, sigma, cond=cond)


class Conformance(AdapterConformance):  # not collected: its name does not start with Test
    evaluations = 5  # of Heun in three steps
    denoiser = EpsDenoiser

    @pytest.fixture
    def target(self):
        return Switched(self.wrapper(self.denoiser(wild.Latent())))

    @pytest.fixture
    def run(self, target):
        def run(prompts, *, guided=True):
            cond = TEXTS[[WORDS[prompt] for prompt in prompts]]
            x = noise(1).expand(len(prompts), -1, -1, -1)
            return heun(target, x, wild.sigmas_of(3), self.arguments(cond, TEXTS[:1].expand_as(cond), scale=7.5 if guided else 1.0))

        return run

    def arguments(self, cond, uncond, scale):
        return {"cond": cond, "uncond": uncond, "cond_scale": scale}


class TestBatched(Conformance):
    wrapper = wild.Batched
    imports = ("memhook_kdiffusion", "k_diffusion")


class TestVelocity(Conformance):
    wrapper, denoiser = wild.Batched, VDenoiser


class TestCondFirst(Conformance):
    wrapper = wild.CondFirst


class TestTwoCalls(Conformance):
    wrapper = wild.TwoCallsCondFirst


class TestThreeCalls(Conformance):
    wrapper = wild.Perturbed


class TestDeclared(Conformance):
    wrapper = wild.CondFirst

    def make_adapter(self, target):
        return KDiffusionAdapter(target, layout="cond_first")


class TestEdit(Conformance):
    image = 2 * noise(1, 1.0, seed=8)

    @pytest.fixture
    def target(self):
        class Switched(wild.Edit):
            def forward(self, z, sigma, cond, uncond, text_cfg_scale, image_cfg_scale):
                return (
                    super().forward(z, sigma, cond, uncond, text_cfg_scale, image_cfg_scale)
                    if text_cfg_scale > 1
                    else self.inner_model(z, sigma, cond=cond)
                )

        return Switched(EpsDenoiser(wild.Latent()))

    def arguments(self, cond, uncond, scale):
        image = self.image.expand(len(cond), -1, -1, -1)
        return {
            "cond": {"c_crossattn": [cond], "c_concat": [image]},
            "uncond": {"c_crossattn": [uncond], "c_concat": [torch.zeros_like(image)]},
            "text_cfg_scale": scale,
            "image_cfg_scale": 1.5,
        }


class TestWebUI(Conformance):
    options = {}  # noqa: RUF012 -- a test's own constant

    @pytest.fixture
    def target(self):
        class Restarting(wild.WebUI):
            """Every run begins at step 1, so that with a threshold above all noise levels its odd steps are skipped."""

            def forward(self, x, sigma, uncond, cond, cond_scale, s_min_uncond):
                self.step = 1
                return super().forward(x, sigma, uncond, cond, cond_scale, s_min_uncond)

        wrapper = Restarting(lambda: EpsDenoiser(wild.Latent()), **self.options)
        assert wrapper.inner_model is wrapper.model_wrap  # made when it is first asked for
        return wrapper

    def arguments(self, cond, uncond, scale):
        return {
            "cond": wild.multicond([[(row, 1.0)] for row in cond]),
            "uncond": wild.scheduled(uncond),
            "cond_scale": scale,
            "s_min_uncond": 0.0 if scale > 1 else 99.0,
        }


class TestWebUISlices(TestWebUI):
    options = {"batched": False}  # noqa: RUF012


class TestClosure(Conformance):
    @pytest.fixture
    def target(self):
        denoiser = EpsDenoiser(wild.Latent())
        self.given = {}

        def function(x, sigma):
            if self.given["cond_scale"] <= 1:
                return denoiser(x, sigma, cond=self.given["cond"])
            text = torch.cat([self.given["cond"], self.given["uncond"]])
            c, u = denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), cond=text).chunk(2)
            return u + self.given["cond_scale"] * (c - u)

        return wrap(function, denoiser=denoiser, layout="cond_first")

    def arguments(self, cond, uncond, scale):
        self.given.update(cond=cond, uncond=uncond, cond_scale=scale)
        return {}
