"""What the tests of watching k-diffusion have in common: runs whose truth is known."""

import numpy as np
import pytest
import torch

import memhook
from tests.adapters import kdiffusion_wrappers as wild
from tests.adapters.kdiffusion_samplers import OWN, PACKAGE, REAL, EpsDenoiser, VDenoiser, seeded

needs_package = pytest.mark.skipif(PACKAGE is None, reason="needs k-diffusion (pip install --no-deps k-diffusion torchdiffeq torchsde trampoline)")
SAMPLERS = {**OWN, **REAL}
DENOISERS = {"eps": EpsDenoiser, "v": VDenoiser}
PLAIN = {"batched": wild.Batched, "cond first": wild.CondFirst, "two calls": wild.TwoCalls, "two calls, cond first": wild.TwoCallsCondFirst}
TOLERANCE = 1e-4
"""Ten times stricter than promised; float32 reaches about 1e-6, and more where ``x`` is large beside what guidance changes."""


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
