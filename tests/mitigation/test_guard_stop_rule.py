"""The guard with a stop rule: it looks after each evaluation, and repairs every prompt when it is first flagged."""

import numpy as np
import pytest
import torch
from torch import nn

import memhook
from memhook import MemhookError, MemorizationDetectedError, ModuleAdapter, guard, stop_rule
from memhook.testing import sample, tiny_unet

LAYOUTS = ["uncond_first", "two_calls_cond_first"]
UNCOND = torch.randn(1, 5, 6, generator=torch.Generator().manual_seed(99)).double()
STEPS = 5


class Late(nn.Module):
    """A denoiser to which prompts whose first number is negative are quiet at the first evaluation, and loud later."""

    def __init__(self):
        super().__init__()
        self.unet = tiny_unet(dtype=torch.float64)

    def forward(self, sample, timestep, encoder_hidden_states, **kwargs):
        late = (encoder_hidden_states[:, :1, :1] < -4) & (timestep > 900)
        return self.unet(sample, timestep, torch.where(late, encoder_hidden_states / 8, encoder_hidden_states), **kwargs)


def prompts(count, *, seed):
    cond = torch.randn(count, 5, 6, generator=torch.Generator().manual_seed(seed)).double()
    cond[:, 0, 0] = 0
    return cond


def run(model, cond, layout):
    noise = torch.randn(len(cond), 4, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    return sample(model, layout=layout, cond=cond, uncond=UNCOND.expand_as(cond), noise=noise, steps=STEPS)


@pytest.fixture(params=LAYOUTS)
def bench(request):
    model, layout = Late(), request.param
    adapter = ModuleAdapter(model, layout=layout)
    traces = []
    for seed in range(4):
        with memhook.watch(model, adapter=adapter) as trace:
            run(model, prompts(20, seed=seed), layout)
        traces.append(trace)
    rule = stop_rule(memhook.calibrate(traces), fpr=0.05, evaluations=3)
    cond = 0.9 * prompts(4, seed=50)
    cond[1] *= 8  # loud from the start
    cond[2] *= 8
    cond[2, 0, 0] = -6  # loud from the second evaluation on
    return model, layout, adapter, rule, cond


OPTIONS = {"max_steps": 80, "lr": 0.2, "fixed_tokens": 0}


def test_every_prompt_is_repaired_at_the_look_that_flags_it(bench):
    model, layout, adapter, rule, cond = bench
    plain = run(model, cond, layout)
    with guard(model, rule, adapter=adapter, **OPTIONS) as report:
        guarded = run(model, cond, layout)
    assert report.flagged.tolist() == [False, True, True, False]
    assert [(repair.evaluation, repair.samples.tolist()) for repair in report.repairs] == [(1, [1]), (2, [2])]
    assert torch.equal(guarded[[0, 3]], plain[[0, 3]])
    assert not torch.equal(guarded[1], plain[1])
    assert not torch.equal(guarded[2], plain[2])
    assert [repair.substituted for repair in report.repairs] == [4, 3]
    assert (report.after[[1, 2]] < report.before[[1, 2]]).all()
    assert str(report).count("Mitigated") == 2
    # The same as with the new embeddings from those evaluations on.
    better = cond.clone()
    better[1] = report.repairs[0].optimized.embedding[0]
    with memhook.watch(model, adapter=adapter) as whole:
        run(model, better, layout)
    np.testing.assert_allclose(report.trace.magnitudes[1:, 1], whole.magnitudes[1:, 1], rtol=1e-6)
    assert not model.unet._forward_hooks
    assert not model._forward_hooks


def test_stop_ends_the_run_at_the_first_look_that_flags(bench):
    model, layout, adapter, rule, cond = bench
    with pytest.raises(MemorizationDetectedError, match="stopped after 2 evaluations") as caught, guard(model, rule, action="stop", adapter=adapter):
        run(model, cond[2:], layout)
    assert caught.value.detection.memorized.tolist() == [True, False]


def test_clean_prompts_come_out_bit_identical(bench):
    model, layout, adapter, rule, cond = bench
    plain = run(model, cond[[0, 3]], layout)
    with guard(model, rule, adapter=adapter) as report:
        assert torch.equal(run(model, cond[[0, 3]], layout), plain)
    assert not report.flagged.any()
    assert report.repairs == []
    assert report.detection.statistic == "largest standardized score of 3 looks"


def test_the_target_is_the_median_of_clean_prompts_at_that_evaluation(bench):
    model, layout, adapter, rule, cond = bench
    with guard(model, rule, adapter=adapter, **OPTIONS) as report:
        run(model, cond, layout)
    for repair in report.repairs:
        assert repair.optimized.target == pytest.approx(float(np.median(rule.calibration.magnitudes[:, repair.evaluation - 1])))


def test_a_rule_has_its_own_rate(bench):
    model, _, adapter, rule, _ = bench
    with pytest.raises(MemhookError, match=r"the stop rule has its own, 0.05"), guard(model, rule, fpr=0.01, adapter=adapter):
        pass
