"""CFG wrappers as they are found in the wild, each in the order of rows and calls of its host, around a small network with a known schedule."""

import contextlib
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from memhook.testing import tiny_unet

CHANNELS, SIZE, TOKENS, WIDTH = 4, 8, 5, 6


class Latent(nn.Module):
    """A model of CompVis' kind: it is called through ``apply_model``, which no hook on it sees.

    Conditioning is a tensor, or a mapping with the text, a pooled vector, and an image; all of them change the prediction.
    """

    def __init__(self, seed=0, dtype=torch.float32):
        super().__init__()
        self.model = tiny_unet(seed=seed, dtype=dtype)
        self.register_buffer("alphas_cumprod", torch.cos(torch.linspace(0.02, 1.5, 100)) ** 2)

    def apply_model(self, x, t, cond):
        text, vector, image = cond, None, None
        if isinstance(cond, dict):
            text = cond["crossattn"] if "crossattn" in cond else torch.cat(cond["c_crossattn"], dim=1)
            vector, image = cond.get("vector"), cond.get("c_concat", [None])[0]
        if image is not None:
            x = x + 0.3 * image
        out = self.model(x, t.to(x.dtype), text)
        return out if vector is None else out * (1 + 0.1 * vector.mean(1))[:, None, None, None]

    def forward(self, *args):
        raise AssertionError("nobody calls such a model directly")


def conditioning(samples, *, tokens=TOKENS, seed=1):
    return torch.randn(samples, tokens, WIDTH, generator=torch.Generator().manual_seed(seed))


class Batched(nn.Module):
    """CompVis: one call, unconditional rows first."""

    def __init__(self, denoiser):
        super().__init__()
        self.inner_model = denoiser

    def forward(self, x, sigma, uncond, cond, cond_scale):
        u, c = self.inner_model(torch.cat([x] * 2), torch.cat([sigma] * 2), cond=torch.cat([uncond, cond])).chunk(2)
        return u + (c - u) * cond_scale


class CondFirst(Batched):
    def forward(self, x, sigma, uncond, cond, cond_scale):
        c, u = self.inner_model(torch.cat([x] * 2), torch.cat([sigma] * 2), cond=torch.cat([cond, uncond])).chunk(2)
        return u + (c - u) * cond_scale


class TwoCalls(Batched):
    """InvokeAI: an unconditional call, then a conditional one. Counts its calls, and clamps at first, as InvokeAI does."""

    def __init__(self, denoiser):
        super().__init__(denoiser)
        self.calls = 0

    def forward(self, x, sigma, uncond, cond, cond_scale):
        self.calls += 1
        u = self.inner_model(x, sigma, cond=uncond)
        c = self.inner_model(x, sigma, cond=cond)
        return (u + (c - u) * cond_scale).clamp(-40 * self.calls, 40 * self.calls)


class TwoCallsCondFirst(Batched):
    """Early ComfyUI on large images; combines in place."""

    def forward(self, x, sigma, uncond, cond, cond_scale):
        c = self.inner_model(x, sigma, cond=cond)
        u = self.inner_model(x, sigma, cond=uncond)
        return c.sub_(u).mul_(cond_scale).add_(u)


class Edit(Batched):
    """InstructPix2Pix: a row with text and image, one with the image alone, one with neither."""

    def forward(self, z, sigma, cond, uncond, text_cfg_scale, image_cfg_scale):
        text = torch.cat([cond["c_crossattn"][0], uncond["c_crossattn"][0], uncond["c_crossattn"][0]])
        image = torch.cat([cond["c_concat"][0], cond["c_concat"][0], uncond["c_concat"][0]])
        out = self.inner_model(torch.cat([z] * 3), torch.cat([sigma] * 3), cond={"c_crossattn": [text], "c_concat": [image]})
        c, i, u = out.chunk(3)
        return u + text_cfg_scale * (c - i) + image_cfg_scale * (i - u)


class Perturbed(Batched):
    """Two calls, and a third one with the conditional text on another input, as perturbed guidance makes."""

    def forward(self, x, sigma, uncond, cond, cond_scale):
        c = self.inner_model(x, sigma, cond=cond)
        p = self.inner_model(x + 0.1, sigma, cond=cond)
        u = self.inner_model(x, sigma, cond=uncond)
        return u + (c - u) * cond_scale + (c - p)


@dataclass
class Scheduled:
    """A1111: an embedding ``(l, d)``, or a mapping with one, up to a step."""

    end_at_step: int
    cond: object


@dataclass
class Weighted:
    schedules: list
    weight: float


@dataclass
class Multicond:
    """A1111: each sample's weighted prompts."""

    batch: list
    shape: tuple = field(default=())


def multicond(prompts):
    """From ``[[(embedding, weight), ...], ...]``; an embedding may be a list of ``(last step, embedding)``."""

    def schedules(what):
        return [Scheduled(*item) for item in what] if isinstance(what, list) else [Scheduled(99, what)]

    return Multicond([[Weighted(schedules(what), weight) for what, weight in parts] for parts in prompts])


def scheduled(embeddings):
    return [[Scheduled(99, embedding)] for embedding in embeddings]


class WebUI(nn.Module):
    """A1111: all conditional rows, then the unconditional ones; several calls where the numbers of tokens differ; slices; skipped passes."""

    def __init__(self, make_denoiser, *, batched=True, pad=None, mask=False):
        super().__init__()
        self.make_denoiser, self.batched, self.pad, self.mask = make_denoiser, batched, pad, mask
        self.model_wrap = None
        self.step = 0
        self.exchange_at = None

    @property
    def inner_model(self):
        if self.model_wrap is None:
            self.model_wrap = self.make_denoiser()
        return self.model_wrap

    def forward(self, x, sigma, uncond, cond, cond_scale, s_min_uncond=0.0, image_cond=None):
        if self.step == self.exchange_at:
            self.model_wrap = None
        pick = lambda schedule: next(item.cond for item in schedule if self.step <= item.end_at_step)  # noqa: E731
        flat = [(sample, part.weight, pick(part.schedules)) for sample, parts in enumerate(cond.batch) for part in parts]
        text, negative = stacked([one for _, _, one in flat]), stacked([pick(schedule) for schedule in uncond])
        owners = [sample for sample, _, _ in flat]
        image = torch.zeros_like(x) if image_cond is None else image_cond
        skip = bool(self.step % 2 and s_min_uncond > 0 and sigma[0] < s_min_uncond)
        if self.pad is not None and tokens(text) != tokens(negative):
            text, negative = self.pad(text, negative)
        rows = owners if skip else [*owners, *range(len(x))]
        x_in, sigma_in, image_in = x[rows], sigma[rows], image[rows]

        def call(part, a, b):
            crossattn = part if isinstance(part, dict) else {"c_crossattn": [part]}
            return self.inner_model(x_in[a:b], sigma_in[a:b], cond={**crossattn, "c_concat": [image_in[a:b]]})

        if tokens(text) == tokens(negative) or skip:
            whole = text if skip else joined(text, negative)
            if self.batched:
                out = call(whole, 0, len(rows))
            else:
                out = torch.zeros_like(x_in)
                for a in range(0, len(rows), len(x)):
                    out[a : a + len(x)] = call(cut(whole, a, a + len(x)), a, a + len(x))
        else:
            out = torch.zeros_like(x_in)
            size = 2 * len(x) if self.batched else len(x)
            for a in range(0, len(owners), size):
                b = min(a + size, len(owners))
                out[a:b] = call(cut(text, a, b), a, b)
            out[-len(x) :] = call(negative, len(owners), len(rows))
        if skip:
            out = torch.cat([out, out[[owners.index(sample) for sample in range(len(x))]]])
        denoised = out[-len(x) :].clone()
        for row, (sample, weight, _) in enumerate(flat):
            denoised[sample] += (out[row] - out[-len(x) :][sample]) * (weight * (1.0 if skip else cond_scale))
        self.step += 1
        if self.mask:  # inpainting: half of the picture is kept, so the result is no sum of predictions
            denoised = torch.cat([denoised[..., :4], torch.full_like(denoised[..., 4:], 0.25)], dim=-1)
        return denoised


def tokens(text):
    return (text["crossattn"] if isinstance(text, dict) else text).shape[1]


def stacked(rows):
    if isinstance(rows[0], dict):
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    longest = max(len(row) for row in rows)
    return torch.stack([torch.cat([row, row[-1:].repeat(longest - len(row), 1)]) for row in rows])


def joined(a, b):
    return {key: torch.cat([a[key], b[key]]) for key in a} if isinstance(a, dict) else torch.cat([a, b])


def cut(text, a, b):
    return {key: value[a:b] for key, value in text.items()} if isinstance(text, dict) else text[a:b]


def pad_with_empty(text, negative):
    """A1111's own way: the shorter one gets the embedding of an empty prompt behind it."""
    difference = text.shape[1] - negative.shape[1]
    filler = 0.5 * torch.ones(len(text if difference < 0 else negative), abs(difference), WIDTH)
    return (text, torch.cat([negative, filler], 1)) if difference > 0 else (torch.cat([text, filler], 1), negative)


def pad_or_cut(text, negative):
    """A1111's older way: the unconditional one is made as long as the conditional one."""
    missing = text.shape[1] - negative.shape[1]
    return text, torch.cat([negative, negative[:, -1:].repeat(1, max(missing, 0), 1)], 1)[:, : text.shape[1]]


def sigmas_of(steps, high=12.0, low=0.1, dtype=torch.float32):
    """Karras et al. 2022, Eq. 5."""
    ramp = torch.linspace(0, 1, steps)
    levels = (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    return torch.cat([levels, torch.zeros(1)]).to(dtype)


class Truth:
    """Notes what a wrapper is asked, to ask the bare network again: one sample and one conditioning at a time."""

    def __init__(self, wrapper, network, *, space="eps"):
        self.wrapper, self.network, self.space = wrapper, network, space
        self.asked = []

    def __call__(self, x, sigma, **kwargs):
        self.asked.append((x.detach().clone(), sigma.detach().clone()))
        return self.wrapper(x, sigma, **kwargs)

    @torch.no_grad()
    def noise(self, x, sigma, cond):
        """The predicted noise for one sample ``(1, ...)``, less what no conditioning changes."""
        levels = ((1 - self.network.alphas_cumprod.double()) / self.network.alphas_cumprod.double()).sqrt().log().numpy()
        level = float(sigma)
        time = torch.tensor([np.interp(np.log(level), levels, np.arange(len(levels)))])
        dtype = next(self.network.parameters()).dtype
        scaled = (x.double() / (level**2 + 1) ** 0.5).to(dtype)
        out = self.network.apply_model(scaled, time.to(dtype), cond).double()
        return out / (level**2 + 1) ** 0.5 if self.space == "v" else out

    def magnitudes(self, pair):
        """``(s, b)``; ``pair(evaluation, sample)`` gives ``([(cond, weight), ...], uncond)``, each for one sample, or None where there is no pass."""
        rows = []
        for number, (x, sigma) in enumerate(self.asked):
            row = []
            for sample in range(len(x)):
                two = pair(number, sample)
                if two is None:
                    row.append(np.nan)
                    continue
                one = x[sample : sample + 1], sigma[sample]
                uncond = self.noise(*one, two[1])
                row.append(float(sum(weight * (self.noise(*one, cond) - uncond) for cond, weight in two[0]).norm()))
            rows.append(row)
        return np.array(rows)


@contextlib.contextmanager
def hooks_of(*modules):
    """Afterwards every module inside has the hooks that it had before, and those that were made on the way have none."""
    tables = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")

    def look():
        return {part: [dict(getattr(part, table)) for table in tables] for module in modules for part in module.modules()}

    before = look()
    yield
    for part, hooks in look().items():
        assert hooks == before.get(part, [{}] * len(tables))
