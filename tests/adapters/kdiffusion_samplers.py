"""Samplers over denoisers of k-diffusion's form: written here from the published algorithms, and those of the real package where it is installed."""

import contextlib
import importlib
import importlib.util
import sys
import types
import warnings
from itertools import pairwise

import torch
from torch import nn


def expand(sigma, x):
    return sigma.reshape(-1, *[1] * (x.ndim - 1))


def derivative(model, x, sigma, extra):
    """Karras et al. 2022, Eq. 3: the slope of the probability-flow ODE, and the denoised sample."""
    denoised = model(x, sigma * x.new_ones(len(x)), **extra)
    return (x - denoised) / sigma, denoised


@torch.no_grad()
def euler(model, x, sigmas, extra_args, callback=None):
    """Karras et al. 2022, Algorithm 1 without its correction."""
    for i, (now, then) in enumerate(pairwise(sigmas)):
        slope, denoised = derivative(model, x, now, extra_args)
        report(callback, i, x, now, denoised)
        x = x + (then - now) * slope
    return x


@torch.no_grad()
def heun(model, x, sigmas, extra_args, callback=None):
    """Karras et al. 2022, Algorithm 1."""
    for i, (now, then) in enumerate(pairwise(sigmas)):
        slope, denoised = derivative(model, x, now, extra_args)
        report(callback, i, x, now, denoised)
        ahead = x + (then - now) * slope
        x = ahead if then == 0 else x + (then - now) * (slope + derivative(model, ahead, then, extra_args)[0]) / 2
    return x


@torch.no_grad()
def dpm_2(model, x, sigmas, extra_args, callback=None):
    """Lu et al. 2022 (DPM-Solver), the second-order step: the slope at the geometric mean of both levels."""
    for i, (now, then) in enumerate(pairwise(sigmas)):
        slope, denoised = derivative(model, x, now, extra_args)
        report(callback, i, x, now, denoised)
        if then > 0:
            middle = (now * then).sqrt()
            slope = derivative(model, x + (middle - now) * slope, middle, extra_args)[0]
        x = x + (then - now) * slope
    return x


@torch.no_grad()
def euler_ancestral(model, x, sigmas, extra_args, callback=None):
    """Song et al. 2021: step below the next level, and add noise up to it."""
    for i, (now, then) in enumerate(pairwise(sigmas)):
        slope, denoised = derivative(model, x, now, extra_args)
        report(callback, i, x, now, denoised)
        up = (then**2 * (now**2 - then**2) / now**2).sqrt()
        x = x + ((then**2 - up**2).clamp_min(0).sqrt() - now) * slope + up * torch.randn_like(x)
    return x


@torch.no_grad()
def sde_2s(model, x, sigmas, extra_args, callback=None):
    """Lu et al. 2022 (DPM-Solver++), a stochastic second-order single step: noise goes in between both evaluations too."""
    for i, (now, then) in enumerate(pairwise(sigmas)):
        _, denoised = derivative(model, x, now, extra_args)
        report(callback, i, x, now, denoised)
        if then > 0:
            middle = (now * then).sqrt()
            ahead = denoised + (middle / now) ** 2 * (x - denoised) + middle * (1 - (middle / now) ** 2).sqrt() * torch.randn_like(x)
            denoised = derivative(model, ahead, middle, extra_args)[1]
        x = denoised + (then / now) ** 2 * (x - denoised) + then * (1 - (then / now) ** 2).sqrt() * torch.randn_like(x)
    return x


@torch.no_grad()
def multistep(model, x, sigmas, extra_args, callback=None):
    """Adams-Bashforth of second order with steps of unequal length."""
    before = None
    for i, (now, then) in enumerate(pairwise(sigmas)):
        slope, denoised = derivative(model, x, now, extra_args)
        report(callback, i, x, now, denoised)
        used = slope if before is None else slope + (then - now) / (2 * (now - sigmas[i - 1])) * (slope - before)
        x, before = x + (then - now) * used, slope
    return x


@torch.no_grad()
def adaptive(model, x, sigmas, extra_args, callback=None):
    """Heun's method with error control by its Euler step: a rejected step is tried again from the very same sample. The first is rejected."""
    level, least, length, i, evaluations = sigmas[0], sigmas[sigmas > 0].min(), 2.0, 0, 0
    while level > least * 1.001:
        then = torch.maximum(least, level * torch.tensor(-length).exp())
        slope, denoised = derivative(model, x, level, extra_args)
        ahead = x + (then - level) * slope
        better = x + (then - level) * (slope + derivative(model, ahead, then, extra_args)[0]) / 2
        evaluations += 2
        if length <= 1.0:
            x, level = better, then
        length = 0.9
        if callback is not None:
            callback({"x": x, "i": i, "sigma": level, "sigma_hat": level, "denoised": denoised, "nfe": evaluations})
        i += 1
    return x


def report(callback, i, x, sigma, denoised):
    if callback is not None:
        callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})


OWN = {
    "euler": euler,
    "heun": heun,
    "dpm_2": dpm_2,
    "euler_ancestral": euler_ancestral,
    "sde_2s": sde_2s,
    "multistep": multistep,
    "adaptive": adaptive,
}
"""``sampler(model, x, sigmas, extra_args, callback=None)``."""


class EpsDenoiser(nn.Module):
    """The denoiser around a network that predicts the noise of a discrete schedule: ``x0 = x - sigma eps(x / sqrt(sigma^2 + 1), t(sigma))``."""

    def __init__(self, model):
        super().__init__()
        self.inner_model = model
        self.register_buffer("levels", ((1 - model.alphas_cumprod) / model.alphas_cumprod).sqrt().log())

    def sigma_to_t(self, sigma):
        level = sigma.log().clamp(self.levels[0], self.levels[-1])
        above = torch.searchsorted(self.levels, level).clamp(1, len(self.levels) - 1)
        low, high = self.levels[above - 1], self.levels[above]
        return above - 1 + (level - low) / (high - low)

    def forward(self, x, sigma, **kwargs):
        scaled = x / (expand(sigma, x) ** 2 + 1).sqrt()
        return x - expand(sigma, x) * self.inner_model.apply_model(scaled, self.sigma_to_t(sigma), **kwargs)


class VDenoiser(EpsDenoiser):
    """The same around one that predicts the velocity: ``x0 = x / (sigma^2 + 1) - sigma v / sqrt(sigma^2 + 1)``."""

    def forward(self, x, sigma, **kwargs):
        level = expand(sigma, x)
        v = self.inner_model.apply_model(x / (level**2 + 1).sqrt(), self.sigma_to_t(sigma), **kwargs)
        return x / (level**2 + 1) - level / (level**2 + 1).sqrt() * v


def load_package():
    """``k_diffusion.sampling`` and ``k_diffusion.external``, or None where the package or what these two need is not installed.

    The package's own ``__init__`` imports training code with a dozen heavy dependencies; these two modules need few. So they are imported under
    a parent that is empty, with a stand-in for the one function of torchvision's that is imported beside them and never called here.
    """
    found = importlib.util.find_spec("k_diffusion")
    if found is None or any(importlib.util.find_spec(name) is None for name in ("torchdiffeq", "torchsde", "scipy", "tqdm", "PIL")):
        return None
    before = set(sys.modules)
    parent = types.ModuleType("k_diffusion")
    parent.__path__ = list(found.submodule_search_locations)
    added = {"k_diffusion": parent}
    if importlib.util.find_spec("torchvision") is None:
        for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
            added[name] = types.ModuleType(name)
        added["torchvision.transforms"].functional = added["torchvision.transforms.functional"]
    try:
        sys.modules.update(added)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("k_diffusion.sampling"), importlib.import_module("k_diffusion.external")
    finally:  # other tests must not find half a package
        for name in set(sys.modules) - before:
            if name.split(".")[0] in ("k_diffusion", "torchvision"):
                del sys.modules[name]


PACKAGE = load_package()


def package_samplers():
    """Every sampler of the package in the form of `OWN`; empty where it is not installed."""
    if PACKAGE is None:
        return {}
    sampling, _ = PACKAGE

    def usual(function, **options):
        return lambda model, x, sigmas, extra_args, callback=None: function(
            model, x, sigmas, extra_args=extra_args, callback=callback, disable=True, **options
        )

    def bounded(function, **options):
        def run(model, x, sigmas, extra_args, callback=None):
            low, high = float(sigmas[sigmas > 0].min()), float(sigmas.max())
            return function(model, x, low, high, extra_args=extra_args, callback=callback, disable=True, **options)

        return run

    names = [name for name in vars(sampling) if name.startswith("sample_") and name not in ("sample_dpm_fast", "sample_dpm_adaptive")]
    found = {name: usual(getattr(sampling, name)) for name in names}
    found["sample_heun, churn"] = usual(sampling.sample_heun, s_churn=5.0)
    found["sample_dpm_fast"] = bounded(sampling.sample_dpm_fast, n=7)
    found["sample_dpm_fast, eta"] = bounded(sampling.sample_dpm_fast, n=7, eta=0.5)
    found["sample_dpm_adaptive"] = bounded(sampling.sample_dpm_adaptive, rtol=0.5, atol=0.5)
    found["sample_dpm_adaptive, rejecting"] = bounded(sampling.sample_dpm_adaptive, order=2, rtol=0.2, atol=0.1, h_init=3.0)
    return found


REAL = package_samplers()


@contextlib.contextmanager
def seeded(seed=0):
    """Samplers draw from the global random state; it is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
