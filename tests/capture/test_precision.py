"""Every way of running a model in which a watch has to work: dtypes, autocast, inference mode, broken numbers."""

import math

import numpy as np
import pytest
import torch

import memhook
from memhook import ModuleAdapter
from memhook.testing import sample, tiny_unet

MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "enable_grad": torch.enable_grad}


def run(unet, layout, *, grad=torch.no_grad, keep="scalars", seed=0, steps=3):
    """A guided run in plain torch whose calls are made in the mode asked for."""
    generator = torch.Generator().manual_seed(seed)
    parameter = next(unet.parameters())
    x, cond, uncond = (torch.randn(2, *shape, generator=generator).to(parameter) for shape in ((4, 8, 8), (5, 6), (5, 6)))
    with memhook.watch(unet, adapter=ModuleAdapter(unet, layout=layout), keep=keep) as trace, grad():
        for timestep in range(steps, 0, -1):
            if layout == "uncond_first":
                u, c = unet(torch.cat([x, x]), timestep, torch.cat([uncond, cond])).chunk(2)
            elif layout == "cond_first":
                c, u = unet(torch.cat([x, x]), timestep, torch.cat([cond, uncond])).chunk(2)
            elif layout == "two_calls_uncond_first":
                u, c = unet(x, timestep, uncond), unet(x, timestep, cond)
            else:
                c, u = unet(x, timestep, cond), unet(x, timestep, uncond)
            x = x - (u + 3 * (c - u)) / steps
    return trace, x


@pytest.mark.parametrize("mode", MODES)
def test_the_numbers_do_not_depend_on_the_grad_mode(unet, layout, mode):
    trace, _ = run(unet, layout, grad=MODES[mode], keep="calls")
    plain, _ = run(unet, layout)
    np.testing.assert_array_equal(trace.magnitudes, plain.magnitudes)
    assert not any(evaluation.pred_cond.requires_grad for evaluation in trace.evaluations)


@pytest.mark.parametrize("mode", MODES)
def test_calls_of_every_grad_mode_can_be_replayed(unet, layout, mode):
    trace, _ = run(unet, layout, grad=MODES[mode], keep="calls")
    evaluation = trace.evaluations[-1]
    embedding = evaluation.embedding.clone().requires_grad_()
    value = evaluation.objective(embedding)
    np.testing.assert_allclose(value.detach(), trace.magnitudes[-1], rtol=1e-4)
    (gradient,) = torch.autograd.grad(value.sum(), embedding)
    assert (gradient.flatten(1).norm(dim=1) > 0).all()


def test_gradients_of_the_host_flow_through_a_watched_run(unet, layout):
    _, watched = run(unet, layout, grad=torch.enable_grad, steps=2)
    watched.sum().backward()
    found = [parameter.grad.clone() for parameter in unet.parameters()]
    plain = tiny_unet()
    _, output = run(plain, layout, grad=torch.enable_grad, steps=2)
    output.sum().backward()
    assert all(torch.equal(a, b.grad) for a, b in zip(found, plain.parameters(), strict=True))
    assert any(gradient.abs().sum() > 0 for gradient in found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_models_in_other_dtypes(layout, dtype):
    unet = tiny_unet(dtype=dtype)
    trace, output = run(unet, layout, keep="calls")
    assert output.dtype is dtype
    assert trace.magnitudes.dtype == np.float32
    for index, evaluation in enumerate(trace.evaluations):
        difference = evaluation.pred_cond.double() - evaluation.pred_uncond.double()
        np.testing.assert_allclose(trace.magnitudes[index], difference.flatten(1).norm(dim=1), rtol=1e-5)


def test_autocast(unet, layout):
    def autocast():
        return torch.autocast("cpu", dtype=torch.bfloat16)

    trace, _ = run(unet, layout, grad=autocast, keep="calls")
    assert trace.evaluations[0].pred_cond.dtype is torch.bfloat16
    plain, _ = run(unet, layout)
    np.testing.assert_allclose(trace.magnitudes[0], plain.magnitudes[0], rtol=0.05)
    # A replay outside of the autocast block runs as the captured call did.
    embedding = trace.evaluations[0].embedding
    replayed = trace.evaluations[0].replay(embedding)
    assert replayed.dtype is torch.bfloat16
    with autocast():
        assert torch.equal(trace.evaluations[0].replay(embedding), replayed)


def test_a_replay_of_a_plain_call_ignores_the_autocast_around_it(unet, layout):
    trace, _ = run(unet, layout, keep="calls")
    evaluation = trace.evaluations[0]
    plain = evaluation.replay(evaluation.embedding)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(evaluation.replay(evaluation.embedding), plain)


class Breaking(torch.nn.Module):
    """A denoiser one of whose predictions has a broken value, for one sample at one evaluation."""

    def __init__(self, value):
        super().__init__()
        self.unet, self.value, self.calls = tiny_unet(), value, 0

    def forward(self, sample, timestep, encoder_hidden_states):
        output = self.unet(sample, timestep, encoder_hidden_states)
        self.calls += 1
        if self.calls == 4:
            output[-1, 0, 0, 0] = self.value
        return output


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_broken_prediction_is_undecided_and_never_clean_or_memorized(layout, value):
    unet = Breaking(value)
    with memhook.watch(unet, adapter=ModuleAdapter(unet, layout=layout)) as trace:
        sample(unet, steps=4, samples=2, layout=layout)
    assert np.isfinite(trace.magnitudes[0]).all()
    assert trace.has_guidance.all()  # broken, which is something else than missing
    detection = memhook.detect(trace, memhook.calibrate(np.linspace(0, 1, 200)), fpr=0.1)
    assert np.isfinite(trace.score()).tolist() == [True, False]
    assert detection.undecided.tolist() == [False, True]
    assert not detection.memorized[1]
    assert np.isnan(detection.p_values[1])
    assert "1 undecided" in str(detection)
