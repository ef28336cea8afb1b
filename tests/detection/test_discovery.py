"""False discoveries among many prompts: exactly what scipy computes from all of them."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import false_discovery_control

import memhook
from memhook import MemhookError
from memhook.detection.discovery import PValueCounts

conformal = st.integers(1, 40).flatmap(lambda n: st.lists(st.integers(1, n + 1).map(lambda k: k / (n + 1)), min_size=1, max_size=60))


@given(conformal)
def test_adjusted_values_are_those_of_scipy_to_the_last_bit(p_values):
    found = PValueCounts(p_values).adjusted()
    assert [found[p] for p in p_values] == false_discovery_control(p_values).tolist()


@given(conformal, st.sampled_from([0.01, 0.05, 0.2, 0.5]))
def test_discoveries_are_those_of_the_procedure(p_values, rate):
    ordered, m = sorted(p_values), len(p_values)
    passing = [k for k in range(1, m + 1) if ordered[k - 1] <= rate * k / m]
    counts = PValueCounts(p_values)
    # Where p m / k equals the rate up to rounding, either answer is right.
    if not any(math.isclose(ordered[k - 1] * m / k, rate, rel_tol=1e-12) for k in range(1, m + 1)):
        assert counts.threshold(rate) == (ordered[max(passing) - 1] if passing else None)
    assert counts.discoveries(rate) == sum(value <= rate for value in false_discovery_control(p_values))


@given(st.lists(conformal, min_size=1, max_size=4))
def test_shards_add_up(shards):
    whole = PValueCounts.merged(PValueCounts(shard) for shard in shards)
    assert whole.counts == PValueCounts([p for shard in shards for p in shard]).counts
    assert (PValueCounts(shards[0]) + PValueCounts(shards[-1])).counts == PValueCounts([*shards[0], *shards[-1]]).counts


def test_counters_are_as_many_as_calibration_prompts_whatever_the_number_of_prompts():
    rng = np.random.default_rng(0)
    calibration = memhook.calibrate(rng.normal(size=200))
    counts = PValueCounts()
    for _ in range(10):
        counts.add(calibration.p_value(rng.normal(size=10_000)))
    assert len(counts) == 100_000
    assert len(counts.counts) <= 201


def test_the_rate_holds_with_one_calibration_for_all():
    """The mean share of innocent ones among discoveries, over many calibrations."""
    rng = np.random.default_rng(1)
    shares = []
    for _ in range(300):
        calibration = memhook.calibrate(rng.normal(size=500))
        innocent, guilty = rng.normal(size=180), rng.normal(4, 1, size=20)
        p_values = calibration.p_value(np.concatenate([innocent, guilty]))
        largest = PValueCounts(p_values).threshold(0.1)
        found = p_values <= (largest if largest is not None else -1)
        shares.append(found[:180].sum() / max(1, found.sum()))
    assert np.mean(shares) <= 0.1 + 4 * np.std(shares) / math.sqrt(len(shares))
    assert np.mean(shares) > 0.04


def test_undecided_prompts_are_counted_apart():
    counts = PValueCounts([0.5, math.nan, 0.5])
    assert (len(counts), counts.undecided) == (2, 1)
    assert PValueCounts().threshold(0.1) is None
    assert PValueCounts().adjusted() == {}


@pytest.mark.parametrize("value", [0.0, -0.1, 1.5, math.inf])
def test_what_is_no_p_value_is_refused(value):
    with pytest.raises(MemhookError, match="1 of 2 values are no p-values"):
        PValueCounts([0.5, value])


@pytest.mark.parametrize("rate", [0.0, 1.0, -1.0, math.nan])
def test_rates_are_between_zero_and_one(rate):
    with pytest.raises(MemhookError, match="false discovery rate is"):
        PValueCounts([0.5]).threshold(rate)
