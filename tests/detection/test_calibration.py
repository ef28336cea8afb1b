"""Calibration: valid p-values, thresholds that say the same, and the number of prompts that they need."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import memhook
from memhook import Calibration, CalibrationError, calibrate

finite = st.floats(-1e6, 1e6, width=32)
scores = st.lists(finite, min_size=1, max_size=40)
ties = st.lists(st.integers(0, 5).map(float), min_size=1, max_size=40)  # many equal scores
rates = st.one_of(st.floats(0.001, 0.999), st.sampled_from([0.01, 0.05, 0.07, 0.1, 0.29, 1 / 3, 0.5, 0.57]))


# ---- p-values


@given(st.one_of(scores, ties), st.one_of(finite, st.integers(0, 5).map(float)))
def test_the_p_value_is_the_formula(clean, score):
    expected = (1 + sum(c >= score for c in clean)) / (len(clean) + 1)
    assert float(calibrate(clean).p_value(score)) == expected


@given(st.one_of(scores, ties), st.lists(finite, min_size=2, max_size=10))
def test_higher_scores_never_have_higher_p_values(clean, seen):
    p_values = calibrate(clean).p_value(sorted(seen))
    assert (np.diff(p_values) <= 0).all()
    assert (p_values >= 1 / (len(clean) + 1)).all()
    assert (p_values <= 1).all()


@given(st.one_of(scores, ties))
def test_p_values_of_exchangeable_prompts_are_super_uniform(values):
    """Exactly: let each of n + 1 prompts be the new one in turn; at every level at most that share of them is below it."""
    if len(values) < 2:
        return
    p_values = np.array([float(calibrate(values[:i] + values[i + 1 :]).p_value(values[i])) for i in range(len(values))])
    for level in np.arange(1, len(values) + 1) / len(values):
        assert (p_values <= level + 1e-12).mean() <= level + 1e-12


@pytest.mark.parametrize("draw", [np.random.Generator.standard_normal, np.random.Generator.standard_cauchy, lambda rng, n: rng.integers(0, 4, n)])
def test_p_values_are_super_uniform_in_simulation(draw):
    rng, level = np.random.default_rng(0), 0.05
    hits = 0
    for _ in range(2000):
        clean = draw(rng, 40)
        hits += float(calibrate(clean).p_value(draw(rng, 1)[0])) <= level
    assert hits / 2000 <= level + 3 * math.sqrt(level * (1 - level) / 2000)


def test_continuous_scores_realize_the_rate():
    """Super-uniform alone would be met by p-values of one."""
    rng, level = np.random.default_rng(1), 0.1
    hits = sum(float(calibrate(rng.standard_normal(19)).p_value(rng.standard_normal())) <= level for _ in range(2000))
    assert abs(hits / 2000 - level) < 4 * math.sqrt(level * (1 - level) / 2000)


def test_shapes_are_kept():
    calibration = calibrate([1.0, 2.0])
    assert calibration.p_value(1.5).shape == ()
    assert calibration.p_value([[1.5], [2.5]]).tolist() == [[2 / 3], [1 / 3]]
    assert calibration.p_value([]).shape == (0,)


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf, 1e39])
def test_a_score_that_is_not_finite_has_no_p_value(score):
    assert np.isnan(calibrate([1.0, 2.0]).p_value(score))


# ---- thresholds


@given(st.one_of(scores, ties), rates, st.lists(st.one_of(finite, st.integers(0, 5).map(float)), max_size=10))
def test_above_the_threshold_is_a_p_value_of_at_most_the_rate(clean, fpr, seen):
    calibration = calibrate(clean)
    try:
        threshold = calibration.threshold(fpr)
    except CalibrationError:
        assert 1 / (len(clean) + 1) > fpr
        return
    every = np.array([*seen, *clean, threshold, np.nextafter(np.float32(threshold), np.float32(np.inf))], np.float32)
    np.testing.assert_array_equal(every > threshold, calibration.p_value(every) <= fpr)


@given(st.integers(1, 300), st.integers(1, 301))
def test_rates_on_the_edge_count_as_reached(n, k):
    """At a rate of k / (n + 1), whichever way it is rounded, threshold and p-value agree."""
    calibration = calibrate(np.arange(n))
    for fpr in (k / (n + 1), np.nextafter(k / (n + 1), 0), np.nextafter(k / (n + 1), 1)):
        if 1 / (n + 1) <= fpr < 1:
            above = (np.arange(-1, n + 1) > calibration.threshold(fpr)).sum()
            assert above == (calibration.p_value(np.arange(-1, n + 1)) <= fpr).sum()


@given(st.floats(0.002, 0.499))
def test_the_error_says_how_many_prompts_are_needed(fpr):
    with pytest.raises(CalibrationError, match=r"^1 calibration prompts cannot give a false-positive rate of") as caught:
        calibrate([1.0]).threshold(fpr)
    needed = int(str(caught.value).split("at least ")[1].split(", or")[0])
    calibrate(np.arange(needed)).threshold(fpr)
    with pytest.raises(CalibrationError):
        calibrate(np.arange(needed - 1)).threshold(fpr)


@pytest.mark.parametrize(
    ("fpr", "confidence", "needed"),
    [(0.01, None, "99"), (0.001, None, "999"), (0.01, 0.95, "299"), (0.001, 0.95, "2,995"), (0.1, 0.95, "29"), (0.01, 0.1, "99")],
)
def test_how_many_prompts_are_needed(fpr, confidence, needed):
    enough = int(needed.replace(",", ""))
    calibrate(np.arange(enough)).threshold(fpr, confidence)
    with pytest.raises(
        CalibrationError, match=f"^{enough - 1} calibration prompts .* rate of {fpr:g}.*calibrate with at least {needed}, or raise fpr"
    ):
        calibrate(np.arange(enough - 1)).threshold(fpr, confidence)


@given(st.integers(29, 4000), st.sampled_from([0.01, 0.05, 0.1]), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_a_threshold_with_confidence_agrees_with_scipy(n, fpr, confidence):
    """Flagging above the k-th largest of n realizes Beta(k, n + 1 - k); k is the largest that is safe."""
    safe = [k for k in range(1, int((n + 1) * fpr) + 1) if stats.beta.cdf(fpr, k, n + 1 - k) >= confidence]
    if not safe:
        with pytest.raises(CalibrationError, match=f"with {confidence:g} confidence"):
            calibrate(np.arange(n)).threshold(fpr, confidence)
        return
    assert calibrate(np.arange(n)).threshold(fpr, confidence) == n - max(safe)


def test_a_threshold_with_confidence_holds_for_most_calibration_sets():
    rng, fpr = np.random.default_rng(2), 0.05
    for confidence, tolerance in ((None, None), (0.9, 0.9)):
        realized = np.array([stats.norm.sf(calibrate(rng.standard_normal(200)).threshold(fpr, confidence)) for _ in range(400)])
        if tolerance is None:
            assert abs(realized.mean() - 10 / 201) < 0.005  # on average
        else:
            assert (realized <= fpr).mean() >= tolerance - 0.04


@pytest.mark.parametrize("fpr", [0, 1, -0.1, 1.5, math.nan])
def test_rates_are_between_zero_and_one(fpr):
    with pytest.raises(CalibrationError, match=r"fpr is .*; expected a rate between 0 and 1, such as 0\.01"):
        calibrate([1.0]).threshold(fpr)


@pytest.mark.parametrize("confidence", [0, 1, -1, math.nan])
def test_confidences_are_between_zero_and_one(confidence):
    with pytest.raises(CalibrationError, match=r"confidence is .*; expected a number between 0 and 1, such as 0\.95"):
        calibrate(range(1000)).threshold(0.01, confidence)


# ---- from scores


@pytest.mark.parametrize("make", [list, tuple, np.array, iter, lambda values: np.array(values, np.float64), torch.tensor])
def test_scores_come_in_many_forms(make):
    assert calibrate(make([1.0, 2.0, 3.0])).scores.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], r"shape \(0,\); expected one score a clean prompt"),
        ([[1.0, 2.0]], r"shape \(1, 2\)"),
        (1.0, r"shape \(\)"),
        ([1.0, math.nan, 2.0, math.inf], r"scores of 2 of 4 prompts are not finite \(the first is number 1\).*Leave these prompts out"),
        ([1.0, 1e39], "scores of 1 of 2 prompts are not finite"),
        (["high", "low"], "these are not scores"),
        ([[1.0], [1.0, 2.0]], "these are not scores"),
        ([None], "scores of 1 of 1 prompts are not finite"),
        ([math.nan, math.nan], "scores of 2 of 2 prompts are not finite"),
    ],
)
def test_what_are_no_scores_is_refused(values, message):
    with pytest.raises(CalibrationError, match=message):
        calibrate(values)


def test_bare_scores_may_be_of_any_number_of_evaluations():
    calibration = calibrate([1.0, 2.0], first=10)
    assert calibration.first == 10
    assert calibration.scores.tolist() == [1, 2]


# ---- from traces


def record(levels=(999, 500, 1), *, samples=2, seed=0, missing=(), shape=(4, 3), **options):
    rng = np.random.default_rng(seed)
    trace = memhook.Trace()
    for index, level in enumerate(levels):
        cond, uncond = torch.from_numpy(rng.standard_normal((2, samples, *shape), np.float32))
        trace.record(cond, None if index in missing else uncond, timestep=level, **options)
    return trace


@given(st.integers(1, 4), st.integers(1, 3), st.one_of(st.none(), st.integers(1, 3)))
def test_traces_give_a_score_a_prompt(count, samples, first):
    traces = [record(samples=samples, seed=seed) for seed in range(count)]
    calibration = calibrate(traces, first=first)
    expected = np.concatenate([trace.score(first=first) for trace in traces])  # every sample is a prompt of its own here
    np.testing.assert_allclose(calibration.scores, expected, rtol=1e-6)
    assert calibration.magnitudes.shape == (count * samples, 3)
    assert len(calibration) == count * samples


def test_images_of_one_prompt_are_averaged(unet):
    words = torch.randn(2, 5, 6)
    with memhook.watch(unet, adapter=memhook.ModuleAdapter(unet, layout="uncond_first")) as trace:
        memhook.testing.sample(unet, cond=words[[0, 1, 0, 1, 0, 1]])
    calibration = calibrate(trace)
    np.testing.assert_allclose(calibration.scores, [trace.score()[0::2].mean(), trace.score()[1::2].mean()], rtol=1e-6)
    assert calibration.setting["images_per_prompt"] == 3


def test_unequal_numbers_of_images_are_refused(unet):
    words = torch.randn(2, 5, 6)
    with memhook.watch(unet, adapter=memhook.ModuleAdapter(unet, layout="uncond_first")) as trace:
        memhook.testing.sample(unet, cond=words[[0, 1, 0]])
    with pytest.raises(CalibrationError, match=r"prompts of this trace have \[1, 2\] samples; a score needs the same number for each"):
        calibrate(trace)


def test_using_another_number_of_evaluations():
    traces = [record(seed=seed) for seed in range(3)]
    for first in (None, 1, 2, 3):
        np.testing.assert_array_equal(calibrate(traces).using(first).scores, calibrate(traces, first=first).scores)
    with pytest.raises(CalibrationError, match="first is 4; expected 1 to 3, the evaluations at hand, or None for all"):
        calibrate(traces).using(4)


def test_traces_and_scores_do_not_mix():
    with pytest.raises(CalibrationError, match="1 of 2 items are traces"):
        calibrate([record(), 1.0])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"levels": (999, 400, 1)},
            r"trace 1 was recorded in another setting than trace 0.*timesteps.*\[999\.0, 500\.0, 1\.0\].*\[999\.0, 400\.0, 1\.0\]",
        ),
        ({"levels": (999, 500)}, r"trace 1 .*guided_evaluations.*\[True, True, True\].*\[True, True\]"),
        ({"space": "v"}, r"trace 1 .*space.*'eps'.*'v'"),
        ({"shape": (4, 5)}, r"trace 1 .*shape.*\[4, 3\].*\[4, 5\]"),
    ],
)
def test_traces_of_different_settings_do_not_mix(other, message):
    with pytest.raises(CalibrationError, match=message):
        calibrate([record(), record(**other)])


def test_traces_of_different_lengths_without_noise_levels_do_not_mix():
    with pytest.raises(CalibrationError, match=r"trace 1 .*guided_evaluations.*\[True, True, True\].*\[True, True\]"):
        calibrate([record((None, None, None)), record((None, None))])


def test_traces_guided_in_different_parts_do_not_mix():
    with pytest.raises(CalibrationError, match=r"trace 1 .*guided_evaluations.*\[True, True, True\].*\[True, False, True\]"):
        calibrate([record(), record(missing={1})])


def test_traces_that_agree_up_to_first_are_good_for_that():
    """And what came later, where they differ, is not kept."""
    traces = [record(), record((999, 400, 1)), record((999, 500))]
    calibration = calibrate(traces, first=1)
    assert calibration.magnitudes.shape == (6, 1)
    assert calibration.setting["timesteps"] == [999.0]
    with pytest.raises(CalibrationError, match=r"trace 1 .*timesteps"):
        calibrate(traces, first=2)


def test_a_prompt_with_a_broken_prediction_is_refused():
    broken = record(seed=1)
    broken.record(torch.full((2, 4, 3), math.nan), torch.zeros(2, 4, 3), timestep=0)
    with pytest.raises(CalibrationError, match="scores of 2 of 2 prompts are not finite"):
        calibrate(broken)
    until_then = calibrate(broken, first=3)
    assert np.isfinite(until_then.scores).all()
    with pytest.raises(CalibrationError, match="not finite"):  # broken is not missing, also later
        until_then.using(None)


def test_missing_evaluations_are_left_out():
    calibration = calibrate([record(missing={1})])
    np.testing.assert_allclose(calibration.scores, record(missing={1}).score(), rtol=1e-6)
    with pytest.raises(CalibrationError, match="none of the first 1 evaluations had an unconditional prediction"):
        calibrate([record(missing={0})], first=1)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (3,), (2, 2, 2)])
def test_magnitudes_of_another_form_are_refused(shape):
    with pytest.raises(CalibrationError, match=r"magnitudes have shape .*; expected \(prompts, evaluations\)"):
        Calibration(np.zeros(shape, np.float32))
