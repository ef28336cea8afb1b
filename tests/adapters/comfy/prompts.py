"""Conditionings: encoded text with options, in lists that are combined."""

import copy

import torch

WORDS = {"": 0.0, "a lighthouse at dusk": 1.0, "two red apples": -1.0, "a very long prompt": 0.7}


def encode(prompts, *, tokens=5):
    """CONDITIONING as nodes pass it: ``[[tensor (rows, T, d), options]]``."""
    prompts = [prompts] if isinstance(prompts, str) else prompts
    generator = torch.Generator().manual_seed(tokens)
    direction = torch.randn(tokens, 6, generator=generator)
    rows = torch.stack([WORDS[prompt] * direction + 0.1 * (prompt != "") for prompt in prompts])
    return [[rows, {"pooled_output": None}]]


def _with(conditioning, **values):
    return [[tensor, {**options, **values}] for tensor, options in conditioning]


def with_area(conditioning, height, width, y, x, strength=1.0):
    return _with(conditioning, area=(height, width, y, x), strength=strength)


def with_mask(conditioning, mask):
    return _with(conditioning, mask=mask)


def with_range(conditioning, start, end):
    """Active while ``start >= sigma >= end``."""
    return _with(conditioning, timestep_start=start, timestep_end=end)


class Repeated:
    """A tensor of which every sample gets a row."""

    def __init__(self, cond):
        self.cond = cond

    def rows(self, batch):
        times = -(-batch // len(self.cond))
        return self.cond.repeat(times, *(1,) * (self.cond.ndim - 1))[:batch]


def converted(conditioning):
    """A guider's own list: an entry a prompt."""
    return [{**options, "cross_attn": tensor} for tensor, options in conditioning]


def processed(conds):
    """The list with what the model is given."""
    found = []
    for entry in conds:
        given = {"c_crossattn": Repeated(entry["cross_attn"])}
        if "concat_latent_image" in entry:
            given["concat"] = Repeated(entry["concat_latent_image"])
        found.append({**copy.copy(entry), "model_conds": given})
    return found


def opposed(lists):
    """An entry with an area gets a counterpart in every other list: the same area and options, with what that list says of the whole picture."""
    found = {name: list(conds) for name, conds in lists.items()}
    for name, conds in lists.items():
        for entry in (entry for entry in conds if "area" in entry):
            for other, own in found.items():
                whole = next((mine for mine in own if "area" not in mine), None)
                if other != name and whole is not None and all(mine.get("area") != entry["area"] for mine in own):
                    own.append({**entry, "model_conds": whole["model_conds"]})
    return found
