"""Judging only some timesteps: calibrations and thresholds of them, and options that do not fit."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import memhook
from memhook.training import BinnedThreshold, FilterCalibration
from tests.training.judged import batch, filtered, raises
from tests.training.models import NULL, Plain, embeddings, losses_of, pairs


def observed(timesteps=None, seeds=60):
    model = Plain()
    with memhook.training_filter(model, null_embedding=NULL, threshold=None, timesteps=timesteps) as f, torch.no_grad():
        for seed in range(seeds):
            sample, t, text, _ = pairs(0.5, 0.6, 0.7, 0.8, seed=seed)
            model(sample, t, text * (1 + t[:, None, None] / 1000))
            f.keep()
    return f


def test_a_calibration_of_judged_timesteps_has_its_bins_inside_of_them():
    calibration = observed((800, 999)).calibration(bins=3)
    assert calibration.span == (800, 999)
    assert 800 <= calibration.timesteps.min() < calibration.edges[0] < calibration.edges[-1] < calibration.timesteps.max() <= 999
    sizes = [len(part) for part in calibration.bins()]
    assert len(sizes) == 3
    assert max(sizes) - min(sizes) <= 2
    assert sum(sizes) == observed((800, 999)).report().judged


def test_a_part_of_a_calibration_is_that_of_a_run_that_judged_that_part():
    part, own = observed().calibration().within(800, 999, bins=3), observed((800, 999)).calibration(bins=3)
    assert (part.span, part.edges, part.shape) == (own.span, own.edges, own.shape)
    assert np.array_equal(part.timesteps, own.timesteps)
    np.testing.assert_allclose(part.magnitudes, own.magnitudes, rtol=1e-5)


def test_a_threshold_knows_where_it_was_calibrated(tmp_path):
    """Without timesteps= it is judged there, and beyond it nothing is flagged."""
    observed((800, 999)).calibration(bins=1).save(tmp_path / "tau.safetensors")
    threshold = FilterCalibration.load(tmp_path / "tau.safetensors").threshold(fpr=0.2)
    assert threshold(torch.tensor([799, 800, 999, 1000])).tolist() == pytest.approx([math.inf, threshold.values[0], threshold.values[0], math.inf])
    model, (sample, t, text, _) = Plain(), batch(9.0, 9.0, 0.1, t=[700, 900, 950])
    with memhook.training_filter(model, null_embedding=NULL, threshold=threshold) as f:
        model(sample, t, text)
        assert f.keep().tolist() == [True, False, True]
    assert f.report().passed == 2
    with filtered(model, threshold, timesteps=(900, 920)) as f:  # inside of it
        model(sample, t, text)
        assert f.keep().tolist() == [True, False, True]
    assert f.report().passed == 1


def test_a_part_without_presentations():
    with pytest.raises(memhook.CalibrationError, match="0 presentations cannot be divided"):
        FilterCalibration.fit(np.arange(100), np.ones(100)).within(800, 999)


# Errors


@pytest.mark.parametrize(
    ("timesteps", "message"),
    [
        ((999, 800), r"timesteps is \(999, 800\).*lower one first"),
        ((0.8, math.nan), "two finite numbers"),
        ((0, math.inf), "two finite numbers"),
        ((1, 2, 3), r"expected a range \(lowest, highest\)"),
        (800, r"timesteps is 800; expected a range"),
        ("ab", "expected a range"),
    ],
)
def test_ranges_that_are_none(timesteps, message):
    with raises(message):
        filtered(Plain(), timesteps=timesteps)


@pytest.mark.parametrize(
    ("function", "message"),
    [(lambda t: t, "returned torch.int64"), (lambda t: t[:1] > 0, r"of shape \(1,\) for 2 timesteps"), (lambda t: True, r"of shape \(\)")],
)
def test_functions_that_do_not_fit(function, message):
    model, (sample, t, text, _) = Plain(), pairs(0.5, 3.0)
    with raises(message, "expected bool of the same shape"), filtered(model, timesteps=function) as f:
        model(sample, t, text)
        f.keep()


def test_a_denoiser_that_is_given_no_timestep():
    class Timeless(nn.Module):
        def forward(self, sample, *, encoder_hidden_states):
            return sample + encoder_hidden_states.mean((1, 2))[:, None, None, None]

    model, (sample, _, text, _) = Timeless(), pairs(0.5, 3.0)
    with raises("given none that was recognized", "leave out timesteps="), filtered(model) as f, torch.no_grad():
        model(sample, encoder_hidden_states=text)
        f.keep()


def test_a_threshold_that_was_calibrated_on_less():
    threshold = BinnedThreshold((), (4.0,), span=(800.0, 999.0))
    with raises(r"timesteps is \(500, 999\), and the threshold was calibrated from 800 to 999"):
        filtered(Plain(), threshold, timesteps=(500, 999))


def test_a_range_that_the_loop_never_meets_is_said_once():
    model, (sample, _, text, _) = Plain(), pairs(3.0, 3.0)

    def step():
        model(sample, torch.tensor([0.25, 0.75]), text)
        f.keep()

    with filtered(model) as f:
        for _ in range(249):
            step()
        with pytest.warns(UserWarning, match=r"none of 500 presentations was judged: their timesteps are 0.25 to 0.75, and judged is 800 to 999"):
            step()
        for _ in range(251):
            step()


def test_a_null_embedding_that_does_not_fit_is_told_before_a_sample_is_judged():
    model, (sample, t, text, _) = Plain(), batch(3.0, 3.0, t=[10, 20])
    with raises("the null embedding"), filtered(model, null_embedding=torch.zeros(3, 4)) as f:
        model(sample, t, text)
        f.keep()


def test_an_argument_is_changed_in_place_before_the_mean():
    model, (sample, t, text, target) = Plain(), batch(0.5, 3.0, t=[10, 900])
    with raises("changed in place"), filtered(model) as f:
        losses = losses_of(model(sample, t, text), target)
        text.add_(embeddings(1.0, 1.0))
        f.mean(losses)
