"""What gradients cost: counted, against known arithmetic."""

import pytest
import torch
from torch import nn

from memhook.bench import gradients
from memhook.bench.gradients import GradientCost, gradient_costs, ratios
from memhook.errors import MemhookError
from memhook.testing import tiny_unet


def inputs(samples=2):
    generator = torch.Generator().manual_seed(0)
    shapes = {"sample": (samples, 4, 8, 8), "cond": (samples, 5, 6), "uncond": (samples, 5, 6)}
    return {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()} | {"timestep": 999.0}


class Deep(nn.Module):
    """Mixes samples with the embedding through repeated blocks; nearly all of its arithmetic depends on the embedding."""

    def __init__(self, blocks=4, width=64):
        super().__init__()
        self.enter = nn.Linear(6, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)) for _ in range(blocks)
        )
        self.leave = nn.Linear(width, 256)

    def forward(self, sample, timestep, embedding):
        hidden = self.enter(embedding.mean(1))
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return sample * self.leave(hidden).reshape(-1, 4, 8, 8)


@pytest.fixture(scope="module")
def deep_costs():
    return {cost.way: cost for cost in gradient_costs(Deep(), **inputs(samples=32), updates=3, repeats=1)}


def test_arithmetic_is_what_it_must_be(deep_costs):
    # The backward pass to the embedding costs a forward, the naive way both twice, a checkpointed update another forward of the blocks.
    assert deep_costs[gradients.FORWARD].forwards == 1
    assert deep_costs[gradients.LEAST].forwards == pytest.approx(2, abs=0.01)
    assert deep_costs[gradients.ATTRIBUTION].forwards == deep_costs[gradients.LEAST].forwards
    assert deep_costs[gradients.UPDATE].forwards == pytest.approx(2 + 1 / 3, abs=0.01)  # and one check after three updates
    assert deep_costs[gradients.NAIVE].forwards == pytest.approx(4, abs=0.01)
    layer, others = 64 * 64, 6 * 64 + 64 * 256
    recomputed = 4 * 2 * layer / (4 * 3 * layer + others)  # nothing is saved after a block's last layer
    assert deep_costs[gradients.CHECKPOINTED].forwards == pytest.approx(2 + 1 / 3 + recomputed, abs=0.01)


def test_bytes_are_those_of_saved_activations(deep_costs):
    assert deep_costs[gradients.FORWARD].saved_bytes == 0
    assert deep_costs[gradients.LEAST].saved_bytes > 32 * 4 * (2 * 64) * 4  # the inputs of two activations in each of four blocks
    captured = 32 * 4 * 256  # the unconditional half's samples, in one storage with the conditional ones
    assert deep_costs[gradients.UPDATE].saved_bytes == pytest.approx(deep_costs[gradients.LEAST].saved_bytes + captured, rel=0.01)
    assert deep_costs[gradients.CHECKPOINTED].saved_bytes < deep_costs[gradients.UPDATE].saved_bytes
    assert deep_costs[gradients.NAIVE].saved_bytes > 2 * deep_costs[gradients.UPDATE].saved_bytes


def test_every_storage_counts_once_and_parameters_do_not():
    layer = nn.Linear(10, 10, bias=False).requires_grad_(False)
    x = torch.zeros(1, 10, requires_grad=True)
    assert gradients._saved_bytes(layer, lambda: layer(x).sum()) == 0
    assert gradients._saved_bytes(layer, lambda: x.sigmoid().sigmoid()) == 2 * 40
    assert gradients._saved_bytes(layer, lambda: (y := x.sigmoid()) * y[:, :]) == 40


def test_a_model_without_blocks_and_its_parameters_afterwards():
    unet = tiny_unet()
    unet.enter.requires_grad_(False)
    costs = gradient_costs(unet, **inputs(), updates=1, repeats=1)
    assert gradients.CHECKPOINTED not in {cost.way for cost in costs}
    assert all(cost.seconds > 0 for cost in costs)
    assert not unet.enter.weight.requires_grad
    assert unet.leave.weight.requires_grad
    assert all(parameter.grad is None for parameter in unet.parameters())


def test_ratios():
    ways = (gradients.FORWARD, gradients.LEAST, gradients.UPDATE, gradients.NAIVE)
    rows = [
        GradientCost(way, forwards, saved, seconds)
        for way, forwards, saved, seconds in zip(ways, (1, 2, 2.1, 4), (0, 10, 10, 25), (1, 2, 2.2, 4.4), strict=True)
    ]
    assert list(ratios(rows).values()) == pytest.approx([1.05, 1.1, 0.5, 0.4])


def test_bad_input():
    with pytest.raises(MemhookError, match="updates is 0"):
        gradient_costs(tiny_unet(), **inputs(), updates=0)
