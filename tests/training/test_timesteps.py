"""Judging only some timesteps: the pass is made for their rows of the batch alone, and changes nothing about the verdicts."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import memhook
from memhook.testing import tiny_unet
from tests.training.judged import NOTHING, batch, filtered, raises
from tests.training.models import Plain, losses_of, pairs


def test_only_samples_at_judged_timesteps_are_dropped():
    model, (sample, t, text, target) = Plain(), batch(3.0, 3.0, 0.5, 3.0, 3.0, t=[799, 800, 900, 999, 10])
    with filtered(model) as f:
        loss = f.mean(losses_of(model(sample, t, text), target), keys="abcde")
    kept = [0, 2, 4]  # of magnitudes 6, 6, 1, 6, 6
    torch.testing.assert_close(loss, losses_of(model(sample, t, text), target)[kept].mean())
    report = f.report()
    assert (report.samples, report.judged, report.dropped, report.passed) == (5, 3, 2, 3)
    assert {row.key: round(row.magnitude, 4) for row in report.rows} == {"b": 6.0, "c": 1.0, "d": 6.0}


def test_the_pass_is_made_for_the_judged_rows_alone():
    model = Plain()
    with filtered(model) as f:
        for _ in range(3):
            sample, t, text, target = batch(3.0, 3.0, 0.5, t=[799, 800, 900])
            f.mean(losses_of(model(sample, t, text), target))
    passed = [(t.tolist(), with_grad) for t, with_grad, _ in model.calls]
    own, extra = ([799, 800, 900], True), ([800, 900], False)
    assert passed == [own, extra, extra, own, extra, own, extra]  # once more at first: whether a part of the batch gives the same prediction


def test_without_a_judged_sample_there_is_no_pass():
    model, (sample, t, text, target) = Plain(), batch(3.0, 3.0, t=[799, 10])
    with filtered(model) as f:
        loss = f.mean(losses_of(model(sample, t, text), target))
    assert len(model.calls) == 1
    torch.testing.assert_close(loss, losses_of(model(sample, t, text), target).mean())
    report = f.report()
    assert (report.steps, report.passes, report.passed, report.judged, report.dropped) == (1, 0, 0, 0, 0)


def test_samples_that_are_unconditional_already_need_no_pass():
    model, (sample, t, text, target) = Plain(), batch(0.0, 3.0, 0.0, t=[900, 900, 10])
    with filtered(model, threshold=0.0) as f:
        f.mean(losses_of(model(sample, t, text), target))
    assert (f.report().passed, f.report().judged, f.report().dropped) == (1, 1, 1)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 999), min_size=1, max_size=6), st.integers(0, 999), st.integers(0, 999), st.floats(0.1, 3.0))
def test_verdicts_are_those_of_a_threshold_that_is_infinite_elsewhere(timesteps, a, b, tau):
    low, high = sorted((a, b))
    unet = tiny_unet()
    generator = torch.Generator().manual_seed(len(timesteps))
    sample, text = torch.randn(len(timesteps), 4, 8, 8, generator=generator), torch.randn(len(timesteps), 5, 6, generator=generator)
    t, found = torch.tensor(timesteps), []
    for threshold, options in (
        (lambda t: torch.where((t >= low) & (t <= high), tau, torch.inf), {}),
        (tau, {"timesteps": (low, high)}),
    ):
        with memhook.training_filter(unet, null_embedding=NOTHING, threshold=threshold, **options) as f:
            unet(sample, t, text)
            keep = f.keep(keys=range(len(timesteps)))
        found.append((keep, {row.key: row.magnitude for row in f.report().rows}))
    (whole, all_magnitudes), (part, magnitudes) = found
    assert part.tolist() == whole.tolist()
    assert sorted(magnitudes) == [i for i, value in enumerate(timesteps) if low <= value <= high]
    assert magnitudes == pytest.approx({key: all_magnitudes[key] for key in magnitudes}, rel=1e-3)


@pytest.mark.parametrize(
    ("t", "timesteps"),
    [
        ([0.85, 0.2], (0.8, 1.0)),  # flow, 1 is noise
        ([0.1, 0.9], (0.0, 0.2)),  # flow, 0 is noise
        ([850.5, 200.0], (800, 1000)),  # flow in thousandths
        ([0.8, 0.7], (0.8, 1.0)),  # the nearest float32 of the end
        ([850, 20], lambda t: t > 500),
        ([850, 20], lambda t: [True, False]),
    ],
)
def test_the_range_is_in_the_unit_of_the_denoiser(t, timesteps):
    model, (sample, t, text, _) = Plain(), batch(3.0, 3.0, t=t)
    with filtered(model, timesteps=timesteps) as f:
        model(sample, t, text)
        assert f.keep().tolist() == [False, True]
    assert f.report().passed == 1


@pytest.mark.parametrize(("t", "expected"), [(torch.tensor(900), [False, True]), (900, [False, True]), (3, [True, True])])
def test_one_timestep_for_the_whole_batch(t, expected):
    model, (sample, _, text, _) = Plain(), pairs(3.0, 0.5)
    with filtered(model) as f:
        model(sample, t, text)
        assert f.keep().tolist() == expected


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_judged_prediction_that_is_not_finite(bad):
    model, (sample, t, text, target) = Plain(), batch(bad, 0.5, 3.0, t=[900, 10, 950])
    with raises("NaN or infinite", "first is sample 0"), filtered(model) as f:
        f.mean(losses_of(model(sample, t, text), target))
    with filtered(model, on_nonfinite="keep") as f:
        model(sample, t, text)
        assert f.keep().tolist() == [True, True, False]
    assert f.report().nonfinite == 1
