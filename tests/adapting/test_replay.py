"""Replaying a captured call: the same prediction, differentiable in the embedding, and nothing else touched."""

from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import memhook
from memhook import ModuleAdapter, ReplayError
from memhook.adapting.replay import look_up, put
from memhook.testing import sample, tiny_unet

SWAPPED = {
    "uncond_first": "cond_first",
    "cond_first": "uncond_first",
    "two_calls_uncond_first": "two_calls_cond_first",
    "two_calls_cond_first": "two_calls_uncond_first",
}


def capture(layout, *, unet=None, declared=None, samples=2, steps=3, **options):
    """The trace of a run, and the conditional and unconditional embeddings that it used; ``trace.unet`` is the model, kept alive."""
    unet = tiny_unet(dtype=torch.float64) if unet is None else unet
    generator = torch.Generator().manual_seed(3)
    parameter = next(unet.parameters())
    cond, uncond = (torch.randn(samples, 5, 6, generator=generator).to(parameter) for _ in range(2))
    with memhook.watch(unet, adapter=ModuleAdapter(unet, layout=declared or layout), keep="calls") as trace:
        sample(unet, layout=layout, steps=steps, cond=cond, uncond=uncond, **options)
    trace.unet = unet
    return trace, cond, uncond


# ---- what a replay gives


def test_the_captured_embedding_gives_the_captured_prediction(layout):
    trace, cond, _ = capture(layout)
    for evaluation in trace.evaluations:
        assert torch.equal(evaluation.embedding, cond)
        torch.testing.assert_close(evaluation.replay(cond).detach(), evaluation.pred_cond, rtol=1e-9, atol=1e-12)


def test_the_unconditional_embedding_gives_a_magnitude_of_zero(layout):
    """The check that catches swapped roles: then the replay would run with the conditional half's partner."""
    trace, _, uncond = capture(layout)
    for evaluation, magnitudes in zip(trace.evaluations, trace.magnitudes, strict=True):
        assert (evaluation.objective(uncond) <= 1e-9 * torch.as_tensor(magnitudes)).all()


def test_swapped_roles_are_caught_by_that(layout):
    trace, cond, uncond = capture(layout, declared=SWAPPED[layout])
    right = capture(layout)[0].evaluations[0]
    for evaluation, magnitudes in zip(trace.evaluations, trace.magnitudes, strict=True):
        assert torch.equal(evaluation.embedding, uncond)  # what is taken for conditional is not
        assert (evaluation.objective(uncond) > 0.99 * torch.as_tensor(magnitudes)).all()
        assert (evaluation.objective(cond) < 1e-9).all()
    np.testing.assert_allclose(trace.magnitudes[0], memhook.magnitude(right.pred_cond, right.pred_uncond), rtol=1e-6)  # though detection looks right


@given(st.integers(0, 10**6), st.sampled_from(sorted(SWAPPED)))
def test_any_embedding_gives_what_the_model_gives(seed, layout):
    trace, _, _ = capture(layout, steps=2)
    unet = trace.unet
    embedding = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    first = trace.evaluations[0]
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        expected = unet(x, torch.tensor(999.0), embedding)
    torch.testing.assert_close(first.replay(embedding).detach(), expected, rtol=1e-9, atol=1e-12)


def test_the_gradient_is_that_of_finite_differences(layout):
    trace, cond, _ = capture(layout)
    for evaluation in trace.evaluations[:2]:
        embedding = cond.clone().requires_grad_()
        assert torch.autograd.gradcheck(evaluation.objective, embedding, eps=1e-6, atol=1e-7, rtol=1e-5)


def test_samples_do_not_mix(layout):
    trace, cond, _ = capture(layout, samples=3)
    embedding = cond.clone().requires_grad_()
    values = trace.evaluations[0].objective(embedding)
    (gradient,) = torch.autograd.grad(values[1], embedding)
    assert gradient[[0, 2]].abs().max() == 0
    assert gradient[1].abs().max() > 0


def test_a_replay_of_half_precision_takes_a_wide_embedding():
    trace, cond, _ = capture("uncond_first", unet=tiny_unet(dtype=torch.bfloat16))
    embedding = cond.float().requires_grad_()
    (gradient,) = torch.autograd.grad(trace.evaluations[0].objective(embedding).sum(), embedding)
    assert gradient.dtype is torch.float32
    assert gradient.abs().max() > 0


def test_inside_the_run_it_is_differentiable_too(layout):
    """on_evaluation is called in a hook, and the host runs without gradients around it."""
    unet, gradients = tiny_unet(), []

    def observe(evaluation):
        embedding = evaluation.embedding.clone()
        with torch.inference_mode(mode=False), torch.enable_grad():
            embedding = embedding.clone().requires_grad_()
        value = evaluation.objective(embedding)
        assert value.requires_grad
        with torch.inference_mode(mode=False), torch.enable_grad():
            gradients.append(torch.autograd.grad(value.sum(), embedding)[0].abs().max())

    for mode in (torch.no_grad, torch.inference_mode):
        gradients.clear()
        with memhook.watch(unet, adapter=ModuleAdapter(unet, layout=layout), on_evaluation=observe) as trace, mode():
            sample(unet, layout=layout, steps=2)
        assert len(trace) == len(gradients) == 2
        assert min(gradients) > 0


# ---- what a replay leaves alone


def test_parameters_take_no_part(layout):
    trace, cond, _ = capture(layout)
    unet = trace.unet
    frozen = [unet.time.weight, unet.leave.bias]
    for parameter in frozen:
        parameter.requires_grad = False
    flags = [parameter.requires_grad for parameter in unet.parameters()]
    embedding = cond.clone().requires_grad_()
    trace.evaluations[0].objective(embedding).sum().backward()
    assert embedding.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in unet.parameters())
    assert [parameter.requires_grad for parameter in unet.parameters()] == flags


def test_flags_are_restored_after_a_failing_replay(layout):
    trace, cond, _ = capture(layout)
    unet = trace.unet

    def fail(*_):
        raise ValueError("of another hook")

    unet.register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="of another hook"):
        trace.evaluations[0].objective(cond)
    assert all(parameter.requires_grad for parameter in unet.parameters())


def test_other_hooks_of_the_host_still_run(layout):
    """Offloading libraries move weights in hooks."""
    trace, cond, _ = capture(layout)
    unet = trace.unet
    calls = []
    unet.register_forward_pre_hook(lambda *_: calls.append("before"))
    unet.register_forward_hook(lambda *_: calls.append("after"))
    trace.evaluations[0].objective(cond)
    assert calls == ["before", "after"]


def test_a_replay_records_itself_nowhere(layout):
    trace, cond, _ = capture(layout)
    unet = trace.unet
    with memhook.watch(unet, adapter=ModuleAdapter(unet, layout=layout)) as around:
        trace.evaluations[0].objective(cond)
        assert len(around) == 0
        sample(unet, steps=2, layout=layout)
    assert len(around) == 2
    assert len(trace) == 3


def test_a_replay_in_on_evaluation_does_not_disturb_the_run(layout):
    unet = tiny_unet()
    plain = sample(unet, layout=layout)
    adapter = ModuleAdapter(unet, layout=layout)
    with memhook.watch(unet, adapter=adapter, on_evaluation=lambda evaluation: evaluation.objective(evaluation.embedding)) as trace:
        output = sample(unet, layout=layout)
    assert torch.equal(output, plain)
    assert len(trace) == 4


# ---- hosts that go on to change their tensors


def test_a_host_that_works_in_place(layout):
    """The sample, the predictions and the embeddings are overwritten after each call; the capture must not notice."""
    unet = tiny_unet()
    x, cond, uncond = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 6), torch.randn(2, 5, 6)
    batch, words = torch.empty(4, 4, 8, 8), torch.empty(4, 5, 6)
    expected = []
    with memhook.watch(unet, adapter=ModuleAdapter(unet, layout=layout), keep="calls") as trace, torch.no_grad():
        for timestep in (torch.tensor(900.0), torch.tensor(500.0), torch.tensor(1.0)):
            halves = (uncond, cond) if "uncond_first" in layout else (cond, uncond)
            if layout.startswith("two_calls"):
                outputs = [unet(x, timestep, words[:2].copy_(embedding)) for embedding in halves]
            else:
                batch[:2], batch[2:], words[:2], words[2:] = x, x, *halves
                outputs = list(unet(batch, timestep, words).chunk(2))
            u, c = outputs if "uncond_first" in layout else outputs[::-1]
            expected.append((x.clone(), float(timestep), c.clone(), u.clone()))
            x.sub_(u.add_(c.sub_(u), alpha=3.0), alpha=0.3)  # changes u, c and x
            timestep.fill_(-1)
            batch.fill_(torch.nan)
            words.fill_(torch.nan)
    assert trace.timesteps.tolist() == [900, 500, 1]
    for evaluation, (_, _, c, u) in zip(trace.evaluations, expected, strict=True):
        assert torch.equal(evaluation.pred_cond, c)
        assert torch.equal(evaluation.pred_uncond, u)
        assert torch.equal(evaluation.embedding, cond)
        torch.testing.assert_close(evaluation.replay(uncond).detach(), u, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(trace.magnitudes, [(c - u).flatten(1).norm(dim=1).tolist() for *_, c, u in expected], rtol=1e-5)


def test_an_embedding_passed_to_every_evaluation_is_kept_once():
    trace, *_ = capture("two_calls_cond_first")
    assert len({evaluation.embedding.untyped_storage().data_ptr() for evaluation in trace.evaluations}) == 1


# ---- calls that cannot be replayed


class Dropping(nn.Module):
    def __init__(self, rate=0.2):
        super().__init__()
        self.unet, self.drop = tiny_unet(), nn.Dropout(rate)

    def forward(self, sample, timestep, encoder_hidden_states):
        return self.unet(sample, timestep, self.drop(encoder_hidden_states))


def test_dropout_is_an_error_not_a_number(layout):
    trace, cond, _ = capture(layout, unet=Dropping().train())
    with pytest.raises(ReplayError, match=r"another prediction \(relative difference .*expected at most 0.001\).*training mode.*model\.eval\(\)"):
        trace.evaluations[0].objective(cond)


def test_without_dropout_training_mode_is_fine(layout):
    trace, cond, _ = capture(layout, unet=Dropping(rate=0.0).train())
    trace.evaluations[0].objective(cond)


def test_the_error_comes_also_where_another_embedding_is_asked_for_first(layout):
    """Another embedding gives another prediction anyway, so the captured one is run for the check."""
    trace, _, uncond = capture(layout, unet=Dropping().train())
    with pytest.raises(ReplayError, match="another prediction"):
        trace.evaluations[1].replay(uncond)


def test_a_model_that_changed_since_is_an_error(layout):
    trace, cond, _ = capture(layout)
    unet = trace.unet
    with torch.no_grad():
        unet.leave.weight.mul_(1.1)
    with pytest.raises(ReplayError, match="changed since"):
        trace.evaluations[0].objective(cond)


class Counting(nn.Module):
    """A cache of the kind that skips work at every other call."""

    def __init__(self):
        super().__init__()
        self.unet, self.calls = tiny_unet(), 0

    def forward(self, sample, timestep, encoder_hidden_states):
        self.calls += 1
        return self.unet(sample, timestep, encoder_hidden_states) * self.calls


def test_a_model_that_keeps_state_is_an_error(layout):
    trace, cond, _ = capture(layout, unet=Counting())
    with pytest.raises(ReplayError, match=r"keep state between calls \(caching\)"):
        trace.evaluations[0].objective(cond)


@pytest.mark.parametrize("shape", [(2, 5, 7), (2, 4, 6), (4, 5, 6), (5, 6), (1, 5, 6)])
def test_an_embedding_of_another_shape_is_named(layout, shape):
    trace, *_ = capture(layout)
    with pytest.raises(ReplayError, match=rf"shape \({', '.join(map(str, shape))}\); the captured call took \(2, 5, 6\)"):
        trace.evaluations[0].replay(torch.zeros(shape, dtype=torch.float64))


def test_a_broken_prediction_cannot_be_replayed(layout):
    """Its replay cannot be compared with it, so no number is given."""
    unet = tiny_unet()
    with torch.no_grad():
        unet.leave.bias.fill_(torch.nan)
    trace, cond, _ = capture(layout, unet=unet)
    with pytest.raises(ReplayError, match="relative difference nan"):
        trace.evaluations[0].objective(cond)


def test_an_unguided_evaluation_can_be_replayed_but_has_no_objective(layout):
    trace, cond, _ = capture(layout, samples=1, guidance_scale=1.0)
    evaluation = trace.evaluations[0]
    torch.testing.assert_close(evaluation.replay(cond).detach(), evaluation.pred_cond)
    with pytest.raises(memhook.NoGuidanceError):
        evaluation.objective(cond)


# ---- places in nested arguments


class Pair(NamedTuple):
    text: Any
    size: Any


TREES = [
    ((0,), ("a", "b"), ("new", "b")),
    ((-1,), ("a", "b"), ("a", "new")),
    ((1, 0), ("a", ["b", "c"]), ("a", ["new", "c"])),
    ((0, "text"), ({"text": "a", "size": 1},), ({"text": "new", "size": 1},)),
    ((0, 0), (Pair("a", 1),), (Pair("new", 1),)),
    ((0, "text", -2), (OrderedDict(text=("a", "b")),), (OrderedDict(text=("new", "b")),)),
]


@pytest.mark.parametrize(("path", "tree", "expected"), TREES)
def test_put_is_the_inverse_of_look_up(path, tree, expected):
    changed = put(tree, path, "new")
    assert changed == expected
    assert [type(part) for part in changed] == [type(part) for part in expected]
    assert look_up(changed, {}, path) == "new"
    assert put(changed, path, look_up(tree, {}, path)) == tree


@pytest.mark.parametrize("path", [("text",), (2,), (0, "text"), (0, 0, 0), ("a", "b"), (-3,)])
def test_nothing_is_found_where_nothing_is(path):
    assert look_up((1.0, [2.0]), {"a": None}, path) is None
