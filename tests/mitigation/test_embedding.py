"""Optimizing an embedding: Adam on Eq. 5, per sample, until a target."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import memhook
from memhook import optimize_embedding, per_sample_target
from memhook.adapting.checkpointing import find_blocks
from memhook.errors import MemhookError
from memhook.testing import sample, tiny_unet

LAYOUTS = ["uncond_first", "cond_first", "two_calls_uncond_first", "two_calls_cond_first"]


def first_evaluation(layout="uncond_first", *, declared=None, dtype=torch.float64, unet=None, **options):
    unet = unet if unet is not None else tiny_unet(dtype=dtype)
    adapter = memhook.ModuleAdapter(unet, layout=declared or layout)
    trace = memhook.probe(unet, lambda: sample(unet, layout=layout, **options), adapter=adapter)
    return unet, trace.evaluations[0]


def transcription(unet, noise, cond, uncond, *, target, lr=0.05, steps=10):
    """Section 4.2 as it is written: Adam on the loss of the first step, for one sample, with early stopping."""
    u, e = unet(noise, 999.0, uncond).detach(), cond[:, 1:].clone().requires_grad_()
    adam, losses = torch.optim.Adam([e], lr=lr), []
    loss_of = lambda: (unet(noise, 999.0, torch.cat([cond[:, :1], e], 1)) - u).pow(2).sum().sqrt()  # noqa: E731 -- (5)
    while (loss := loss_of()) > target and len(losses) < steps:
        losses.append(loss.item())
        adam.zero_grad()
        loss.backward()
        adam.step()
    return torch.cat([cond[:, :1], e.detach()], 1), [*losses, loss.item()]


def quadratic(e):
    """An objective with a known minimum: the distance from 3."""
    return (e - 3).flatten(1).norm(dim=1)


def agrees_with_the_paper(layout, declared):
    generator = torch.Generator().manual_seed(0)
    cond, noise = torch.randn(2, 5, 6, generator=generator).double(), torch.randn(2, 4, 8, 8, generator=generator).double()
    uncond = torch.randn(1, 5, 6, generator=generator).double().expand_as(cond)
    unet, first = first_evaluation(layout, declared=declared, cond=cond, uncond=uncond, noise=noise)
    before = first.objective(first.embedding).detach()
    target = float(0.8 * before.mean())
    found = optimize_embedding(first.objective, first.embedding, target=target)
    for row in range(2):
        embedding, losses = transcription(unet, noise[row : row + 1], cond[row : row + 1], uncond[:1], target=target)
        own = found.losses[: found.updates[row] + 1, row]
        if len(own) != len(losses) or not np.allclose(own, losses, rtol=1e-6) or not torch.allclose(found.embedding[row], embedding[0], rtol=1e-6):
            return False
    return True


@pytest.mark.parametrize("layout", LAYOUTS)
def test_agrees_with_a_transcription_of_the_paper_and_a_swapped_adapter_does_not(layout):
    swapped = layout.replace("uncond", "X").replace("cond", "uncond").replace("X", "cond")
    assert agrees_with_the_paper(layout, layout)
    assert not agrees_with_the_paper(layout, swapped)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_lowers_the_magnitude_and_leaves_the_model_alone(layout):
    unet, first = first_evaluation(layout)
    given = first.embedding.clone()
    with torch.inference_mode():
        found = optimize_embedding(first.objective, first.embedding, target=0.0, max_steps=5)
    assert (found.after < found.before).all()
    assert torch.equal(first.embedding, given)
    assert not found.embedding.requires_grad
    assert all(parameter.grad is None and parameter.requires_grad for parameter in unet.parameters())
    assert np.allclose(first.objective(found.embedding).detach(), found.after)


def test_each_update_costs_one_replay_and_the_last_check_one_without_a_graph():
    unet, first = first_evaluation()
    graphs = []
    first.objective(first.embedding)
    handle = unet.leave.register_forward_hook(lambda module, args, output: graphs.append(output.requires_grad))
    optimize_embedding(first.objective, first.embedding, target=0.0, max_steps=4)
    handle.remove()
    assert graphs == [True] * 4 + [False]


def test_a_converged_sample_stops_moving_and_the_others_go_on():
    start = torch.zeros(3, 4, 5)
    start[1] = 2.9
    found = optimize_embedding(quadratic, start, target=1.0, lr=0.1, max_steps=10, fixed_tokens=0)
    assert found.converged.tolist() == [False, True, False]
    assert found.updates.tolist() == [10, 0, 10]
    assert torch.equal(found.embedding[1], start[1])
    assert (found.losses[:, 1] == found.losses[0, 1]).all()


@pytest.mark.parametrize("name", ["adam", "adamw", "nadam", "radam", "rmsprop", "sgd"])
def test_every_optimizer_stops_each_sample_where_it_would_stop_alone(name):
    start = torch.stack([torch.full((4, 5), value) for value in (0.0, 2.0, 2.5)]).double()
    options = {"target": 2.5, "lr": 0.1, "max_steps": 12, "optimizer": name, "weight_decay": 0.01, "fixed_tokens": 0}
    together = optimize_embedding(quadratic, start, **options)
    for row in range(3):
        alone = optimize_embedding(quadratic, start[row : row + 1], **options)
        assert torch.equal(alone.embedding[0], together.embedding[row])
        assert alone.updates[0] == together.updates[row]


def test_the_target_is_checked_after_the_last_update_too():
    unreached = optimize_embedding(quadratic, torch.zeros(1, 1, 1), target=2.5, lr=0.1, max_steps=4, fixed_tokens=0)
    reached = optimize_embedding(quadratic, torch.zeros(1, 1, 1), target=2.5 + 1e-5, lr=0.1, max_steps=5, fixed_tokens=0)
    assert not unreached.converged[0]
    assert reached.converged[0]
    assert reached.updates[0] == 5
    assert len(reached.losses) == 6


def test_the_start_token_does_not_move_even_under_weight_decay():
    start = torch.full((2, 4, 5), 2.0)
    found = optimize_embedding(lambda e: e[:, 1:].flatten(1).norm(dim=1), start, target=0.0, optimizer="adamw", weight_decay=0.5)
    assert torch.equal(found.embedding[:, 0], start[:, 0])
    assert (found.embedding[:, 1:] != start[:, 1:]).all()
    all_move = optimize_embedding(lambda e: e[:, 1:].flatten(1).norm(dim=1), start, target=0.0, optimizer="adamw", weight_decay=0.5, fixed_tokens=0)
    assert (all_move.embedding[:, 0] != start[:, 0]).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_moves_in_float32(dtype):
    start = torch.full((1, 2, 3), 256.0, dtype=dtype)  # a step of 0.05 is below the resolution here
    seen = []

    def objective(e):
        seen.append(e.dtype)
        return e.float().flatten(1).norm(dim=1)

    found = optimize_embedding(objective, start, target=0.0, max_steps=50, fixed_tokens=0)
    assert set(seen) == {dtype}
    assert found.embedding.dtype == dtype
    assert found.embedding.max() < 256.0
    assert (found.after < found.before).all()


def test_shared_embeddings_are_the_papers_form():
    """One Frobenius norm over a prompt's images, one embedding for all of them."""
    generator = torch.Generator().manual_seed(0)
    goals = torch.randn(4, 3, 5, generator=generator).double()
    objective = lambda e: (e - goals).flatten(1).norm(dim=1)  # noqa: E731
    start, groups = torch.zeros(4, 3, 5).double(), [7, 7, 2, 7]
    batch_target = 6.0
    found = optimize_embedding(objective, start, target=per_sample_target(batch_target, 3), groups=groups, fixed_tokens=0)
    assert torch.equal(found.embedding[0], found.embedding[1])
    assert torch.equal(found.embedding[0], found.embedding[3])
    assert not torch.equal(found.embedding[0], found.embedding[2])

    e = torch.zeros(1, 3, 5).double().requires_grad_()
    adam = torch.optim.Adam([e], lr=0.05)
    updates = 0
    while (loss := (e.expand(3, -1, -1) - goals[[0, 1, 3]]).norm()) > batch_target:
        adam.zero_grad()
        loss.backward()
        adam.step()
        updates += 1
    assert 0 < updates < 10
    assert found.updates.tolist()[:2] == [updates, updates]
    assert torch.allclose(found.embedding[0], e[0].detach())


def test_groups_of_one_in_any_order_are_no_groups():
    start = torch.stack([torch.full((2, 2), value) for value in (0.0, 1.0, 2.0)])
    plain = optimize_embedding(quadratic, start, target=3.0, fixed_tokens=0)
    grouped = optimize_embedding(quadratic, start, target=3.0, fixed_tokens=0, groups=[5, 1, 3])
    assert torch.equal(plain.embedding, grouped.embedding)
    assert plain.converged.tolist() == grouped.converged.tolist()


@given(st.floats(0, 100), st.integers(1, 64))
def test_converted_targets_are_the_root_mean_square_of_a_batch_norm(batch_target, n):
    target = per_sample_target(batch_target, n)
    assert np.linalg.norm(np.full(n, target)) == pytest.approx(batch_target)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), samples=st.integers(1, 4), target=st.floats(0, 10))
def test_samples_do_not_influence_each_other(seed, samples, target):
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(samples, 3, 2, generator=generator).double()
    together = optimize_embedding(quadratic, start, target=target, max_steps=4)
    apart = [optimize_embedding(quadratic, row[None], target=target, max_steps=4) for row in start]
    assert torch.equal(together.embedding, torch.cat([one.embedding for one in apart]))
    assert together.converged.tolist() == [bool(one.converged[0]) for one in apart]
    assert (together.after[together.converged] <= target).all()


class Blocks(nn.Module):
    """A denoiser with lists of blocks, as UNets and transformers have them."""

    def __init__(self):
        super().__init__()
        self.unet = tiny_unet(dtype=torch.float64)
        layers = [nn.Sequential(nn.Linear(6, 6), nn.SiLU(), nn.Linear(6, 6), nn.LayerNorm(6)) for _ in range(3)]
        self.blocks = nn.ModuleList(layers).double()
        self.calls = 0

    def forward(self, x, timestep, embedding):
        self.calls += 1
        for block in self.blocks:
            embedding = embedding + block(embedding)
        return self.unet(x, timestep, embedding)


def test_checkpointing_gives_the_same_result_from_recomputed_blocks():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Blocks()
    model, first = first_evaluation(unet=model)
    calls = []
    handle = model.blocks[0][0].register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    plain = optimize_embedding(first.objective, first.embedding, target=0.0, max_steps=3)
    once = len(calls)
    again = optimize_embedding(first.objective, first.embedding, target=0.0, max_steps=3, checkpoint=True)
    handle.remove()
    assert torch.equal(plain.embedding, again.embedding)
    assert once == 4
    assert len(calls) - once == 3 + 3 + 1
    assert all("forward" not in block.__dict__ for block in model.blocks)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_checkpointing_needs_blocks_and_a_replay():
    _, first = first_evaluation()
    with pytest.raises(MemhookError, match="TinyUNet has no list of repeated blocks"):
        optimize_embedding(first.objective, first.embedding, target=0.0, checkpoint=True)
    with pytest.raises(MemhookError, match="replays a captured call"):
        optimize_embedding(quadratic, torch.zeros(1, 2, 3), target=0.0, checkpoint=True)


def test_blocks_are_the_smallest_that_are_more_than_a_layer():
    block = lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2), nn.Dropout()]))  # noqa: E731
    stage = nn.Module()
    stage.attentions, stage.downsamplers = nn.ModuleList([block(), block()]), nn.ModuleList([nn.Conv2d(1, 1, 1)])
    model = nn.Module()
    model.stages = nn.ModuleList([stage])
    assert find_blocks(model) == list(stage.attentions)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": -1.0}, "never negative"),
        ({"target": float("nan")}, "never negative"),
        ({"lr": 0.0}, "lr is 0"),
        ({"max_steps": -1}, "max_steps is -1"),
        ({"optimizer": "lbfgs"}, "'lbfgs'; expected one of adam"),
        ({"fixed_tokens": 3}, "3 positions, so expected 0 to 2"),
        ({"groups": [0]}, r"groups has shape \(1,\) for 2 samples"),
        ({"embedding": torch.zeros(3, 4)}, r"shape \(3, 4\)"),
        ({"embedding": torch.zeros(2, 3, 4, dtype=torch.int64)}, "int64"),
        ({"embedding": [[0.0]]}, "is a list"),
        ({"embedding": torch.stack([torch.zeros(3, 4), torch.ones(3, 4)]), "groups": [0, 0]}, "different embeddings"),
        ({"objective": lambda e: e.sum()}, r"gave shape \(\) for 2 samples"),
        ({"objective": lambda e: e.detach().flatten(1).norm(dim=1) + 1}, "does not depend on the embedding"),
        ({"objective": lambda e: torch.ones(2, requires_grad=True)}, "does not depend on the embedding"),
        ({"objective": lambda e: e.flatten(1).sum(1) * float("nan")}, r"samples \[0, 1\] is not finite at the embedding given"),
        (
            {"objective": lambda e: (1 - e).flatten(1).sum(1) / (e.abs().flatten(1).sum(1) < 1e-3)},
            "not finite after 1 updates; lower the learning rate",
        ),
    ],
)
def test_bad_input(change, message):
    options = {"objective": quadratic, "embedding": torch.zeros(2, 3, 4), "target": 0.0, **change}
    with pytest.raises(MemhookError, match=message):
        optimize_embedding(options.pop("objective"), options.pop("embedding"), **options)


def test_bad_batch_targets():
    for batch_target, n in ((-1.0, 4), (float("inf"), 4), (1.0, 0)):
        with pytest.raises(MemhookError, match="batch target"):
            per_sample_target(batch_target, n)


def test_an_embedding_of_another_shape_than_the_captured_one():
    _, first = first_evaluation()
    with pytest.raises(memhook.ReplayError, match="captured call took"):
        optimize_embedding(first.objective, torch.zeros(2, 4, 6).double(), target=0.0)


def test_nothing_to_do_takes_no_update():
    found = optimize_embedding(quadratic, torch.full((2, 3, 4), 3.0), target=0.0)
    assert found.converged.all()
    assert found.updates.tolist() == [0, 0]
    assert "2 of 2 samples reached" in str(found)
    none = optimize_embedding(quadratic, torch.zeros(2, 3, 4), target=1.0, max_steps=0)
    assert not none.converged.any()
