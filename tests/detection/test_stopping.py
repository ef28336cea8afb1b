"""The stop rule: several looks, one false-positive rate."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import memhook
from memhook import Calibration, CalibrationError, CalibrationMismatchError, MemhookError, MemorizationDetectedError, stop_rule
from memhook.testing import sample, tiny_unet

LEVELS = np.linspace(981, 1, 10).round().tolist()


def setting(looks=10):
    return {"host": "record", "space": "eps", "timesteps": LEVELS[:looks], "images_per_prompt": 1}


def correlated(rng, prompts, looks=10):
    """Magnitudes of clean prompts, correlated from evaluation to evaluation as those of a run are."""
    common = rng.normal(size=(prompts, 1))
    return np.exp(0.3 * (0.8 * common + 0.6 * rng.normal(size=(prompts, looks)))).astype(np.float32)


def trace_of(magnitudes):
    """A trace with these magnitudes, ``(s, b)``."""
    trace = memhook.Trace()
    for level, row in zip(LEVELS, magnitudes, strict=False):
        trace.record(torch.tensor(row)[:, None], torch.zeros(len(row), 1), timestep=level)
    return trace


def test_ten_looks_keep_the_rate_where_comparing_each_look_does_not():
    """10 correlated looks at a nominal 1%, as in the comparison of the methods page."""
    rng = np.random.default_rng(5)
    rates = []
    for _ in range(20):
        calibration = Calibration(correlated(rng, 1000), None, setting())
        seen = correlated(rng, 2000)
        naive, bonferroni = np.zeros(len(seen), bool), np.zeros(len(seen), bool)
        for look in range(1, 11):
            p_values = calibration.using(look).p_value(seen[:, :look].mean(axis=1))
            naive |= p_values <= 0.01
            bonferroni |= p_values <= 0.001
        rule = stop_rule(calibration, fpr=0.01)
        running = np.cumsum(seen, axis=1, dtype=np.float64) / np.arange(1, 11)
        largest = ((running - rule.center) / rule.spread).max(axis=1)
        rates.append((naive.mean(), bonferroni.mean(), (largest > rule.maxima.threshold(0.01)).mean()))
    naive, bonferroni, ours = np.mean(rates, axis=0)
    error = np.std([row[2] for row in rates]) / np.sqrt(len(rates))
    assert naive > 0.018
    assert ours == pytest.approx(0.01, abs=4 * error)
    assert bonferroni < 0.008


@given(st.integers(0, 10**6))
def test_stopping_at_the_first_crossing_is_the_verdict_on_the_largest(seed):
    rng = np.random.default_rng(seed)
    rule = stop_rule(Calibration(correlated(rng, 60), None, setting()), fpr=0.1)
    magnitudes = correlated(rng, 4).T * rng.choice([1.0, 1.5], 4)
    whole = rule.judge(trace_of(magnitudes))
    stopped = next((found for look in range(1, 11) if (found := rule(trace_of(magnitudes[:look]))) is not None), None)
    assert (stopped is not None) == whole.memorized.any()
    if stopped is not None:
        assert (whole.p_values[stopped.memorized] <= stopped.p_values[stopped.memorized]).all()  # later looks only add evidence


def test_the_verdict_is_the_transcribed_rule():
    rng = np.random.default_rng(1)
    clean, seen = correlated(rng, 200), correlated(rng, 5)
    rule = stop_rule(Calibration(clean, None, setting()), fpr=0.05, evaluations=4, seed=7)
    order = np.random.default_rng(7).permutation(200)
    running = np.cumsum(clean[:, :4], axis=1, dtype=np.float64) / np.arange(1, 5)
    a, b = running[order[:100]], running[order[100:]]
    of = lambda rows: ((rows - a.mean(0)) / a.std(0, ddof=1)).max(1)  # noqa: E731
    expected = of(np.cumsum(seen[:, :4], axis=1, dtype=np.float64) / np.arange(1, 5))
    found = rule.judge(trace_of(seen.T))
    np.testing.assert_allclose(found.scores, expected, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(found.p_values, [(1 + (of(b) >= score).sum()) / 101 for score in expected])
    assert found.calibration_size == 100
    assert found.statistic == "largest standardized score of 4 looks"


def test_it_stops_a_watched_run_and_hands_over_the_evidence():
    unet = tiny_unet()
    adapter = memhook.ModuleAdapter(unet, layout="uncond_first")
    traces = []
    for seed in range(40):
        with memhook.watch(unet, adapter=adapter) as trace:
            sample(unet, samples=1, seed=seed, steps=6)
        traces.append(trace)
    rule = stop_rule(memhook.calibrate(traces), fpr=0.05)
    loud = 9 * torch.randn(1, 5, 6, generator=torch.Generator().manual_seed(3))
    message = r"stopped after \d evaluations: 1 of 1 prompts looks memorized"
    with pytest.raises(MemorizationDetectedError, match=message) as caught, memhook.watch(unet, adapter=adapter, stop_when=rule):
        sample(unet, samples=1, seed=77, steps=6, cond=loud)
    assert len(caught.value.trace) < 6
    assert caught.value.detection.memorized.tolist() == [True]
    with memhook.watch(unet, adapter=adapter, stop_when=rule) as trace:
        sample(unet, samples=1, seed=3, steps=6)  # one of the calibration's own
    assert len(trace) == 6


def test_another_setting_is_an_error_at_the_first_look():
    rule = stop_rule(Calibration(correlated(np.random.default_rng(0), 40), None, setting() | {"space": "v"}), fpr=0.1)
    with pytest.raises(CalibrationMismatchError, match="space"):
        rule(trace_of(np.ones((1, 2), np.float32)))


def test_a_broken_prediction_is_never_taken_for_clean():
    rule = stop_rule(Calibration(correlated(np.random.default_rng(0), 40), None, setting()), fpr=0.1)
    magnitudes = np.ones((3, 2), np.float32)
    magnitudes[1, 1] = np.nan
    trace = trace_of(magnitudes)
    assert rule.judge(trace).undecided.tolist() == [False, True]
    with pytest.raises(MemhookError, match=r"prompts \[1\] are NaN or infinite after 3 evaluations"):
        rule(trace)


def test_evaluations_without_guidance_are_no_looks():
    magnitudes = correlated(np.random.default_rng(0), 40)
    magnitudes[:, [0, 3]] = np.nan
    assert stop_rule(Calibration(magnitudes, None, setting()), fpr=0.1).looks.tolist() == [2, 3, 5, 6, 7, 8, 9, 10]


def test_before_the_first_look_there_is_no_verdict():
    rule = stop_rule(Calibration(np.insert(correlated(np.random.default_rng(0), 40, 9), 0, np.nan, axis=1), None, setting()), fpr=0.1)
    trace = trace_of(np.ones((1, 2), np.float32))
    assert rule(trace) is None
    with pytest.raises(MemhookError, match="1 evaluations; this rule looks for the first time after 2"):
        rule.judge(trace)


@pytest.mark.parametrize(
    ("calibration", "options", "message"),
    [
        (Calibration(np.ones((9, 1), np.float32)), {}, "bare scores"),
        (Calibration(correlated(np.random.default_rng(0), 9, 3), None, setting(3)), {"evaluations": 4}, "magnitudes of 3, so expected 1 to 3"),
        (Calibration(correlated(np.random.default_rng(0), 190), None, setting()), {"fpr": 0.01}, "half of the calibration prompts.*at least 99"),
        (Calibration(correlated(np.random.default_rng(0), 3), None, setting()), {"fpr": 0.5}, "has 3 prompts"),
        (Calibration(np.ones((9, 2), np.float32), None, setting(2)), {"fpr": 0.5}, "all equal"),
    ],
)
def test_what_cannot_be_a_rule_says_why(calibration, options, message):
    with pytest.raises(CalibrationError, match=message):
        stop_rule(calibration, **options)
