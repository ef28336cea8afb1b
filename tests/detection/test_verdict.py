"""The verdict: per prompt, in the scores' own order, and never a guess where there is no number."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import memhook
from memhook import CalibrationError, NoGuidanceError, Trace, calibrate, detect
from memhook.testing import sample


def recorded(scores, *, evaluations=1, level=None):
    """A trace whose samples have these scores."""
    trace = Trace()
    for _ in range(evaluations):
        cond = torch.zeros(len(scores), 4)
        cond[:, 0] = torch.tensor(scores)
        trace.record(cond, torch.zeros(len(scores), 4), timestep=level)
    return trace


@given(
    st.lists(st.floats(0, 10, width=32), min_size=1, max_size=6),
    st.lists(st.floats(0, 10, width=32), min_size=9, max_size=40),
    st.sampled_from([0.1, 0.2, 0.5]),
)
def test_memorized_is_a_p_value_of_at_most_the_rate(scores, clean, fpr):
    calibration = calibrate(clean)
    found = detect(recorded(scores), calibration, fpr=fpr)
    np.testing.assert_allclose(found.scores, scores, rtol=1e-6, atol=1e-18)  # squares of less vanish
    np.testing.assert_array_equal(found.p_values, calibration.p_value(found.scores))
    np.testing.assert_array_equal(found.memorized, found.p_values <= fpr)
    np.testing.assert_array_equal(found.memorized, found.scores > found.threshold)
    assert not found.undecided.any()
    assert (found.fpr, found.calibration_size) == (fpr, len(clean))


@given(st.integers(1, 5), st.integers(1, 12), st.integers(0, 10**6))
def test_a_calibration_prompt_ties_with_itself_to_the_last_bit(samples, evaluations, seed):
    """Scores of calibration and detection are the same function, rounding included; else ties would fall by chance."""
    predictions = torch.randn(evaluations, 2, samples, 3, 4, generator=torch.Generator().manual_seed(seed))
    trace = Trace()
    for cond, uncond in predictions:
        trace.record(cond, uncond)
    calibration = calibrate(trace)
    np.testing.assert_array_equal(detect(trace, calibration, fpr=0.9).scores, calibration.scores)


def test_samples_of_one_prompt_are_one_score(unet):
    words = torch.randn(3, 5, 6)
    order = [0, 1, 2, 0, 1, 2]
    with memhook.watch(unet, adapter=memhook.ModuleAdapter(unet, layout="uncond_first")) as trace:
        sample(unet, cond=words[order])
    found = detect(trace, calibrate(np.linspace(0, 10, 50)), fpr=0.1)
    assert found.groups.tolist() == order
    np.testing.assert_allclose(found.scores, [trace.score()[[i, i + 3]].mean() for i in range(3)], rtol=1e-6)


def test_the_score_is_over_the_first_evaluations_of_the_calibration():
    trace = recorded([1.0])
    trace.record(torch.full((1, 4), 5.0), torch.zeros(1, 4))
    clean = np.linspace(0, 2, 20)
    assert detect(trace, calibrate(clean, first=1), fpr=0.1).scores.tolist() == [1.0]
    assert detect(trace, calibrate(clean), fpr=0.1).scores.tolist() == [5.5]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_score_is_undecided(value):
    found = detect(recorded([0.5, value, 9.0]), calibrate(np.linspace(0, 1, 20)), fpr=0.1)
    assert found.undecided.tolist() == [False, True, False]
    assert found.memorized.tolist() == [False, False, True]
    assert np.isnan(found.p_values).tolist() == [False, True, False]


def test_one_broken_sample_makes_its_prompt_undecided(unet):
    words = torch.randn(2, 5, 6)
    uncond = torch.zeros(4, 5, 6)
    noise = torch.randn(4, 4, 8, 8)
    noise[2] = math.nan
    with memhook.watch(unet, adapter=memhook.ModuleAdapter(unet, layout="uncond_first")) as trace:
        sample(unet, cond=words[[0, 1, 0, 1]], uncond=uncond, noise=noise)
    found = detect(trace, calibrate(np.linspace(0, 1, 20)), fpr=0.1)
    assert found.undecided.tolist() == [True, False]


def test_there_is_no_truth_value():
    found = detect(recorded([9.0]), calibrate(np.linspace(0, 1, 20)), fpr=0.1)
    with pytest.raises(TypeError, match=r"a verdict for each prompt; ask detection\.memorized\.any\(\)"):
        bool(found)


RATE = " at a false-positive rate of 0.1 (calibrated on 19 clean prompts)"


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([0.5, 0.2], f"none of 2 prompts looks memorized{RATE}"),
        (
            [0.5, 9.0],
            f"1 of 2 prompts looks memorized{RATE}: prompt 1 scores 9, threshold 0.944, p = 0.05",
        ),
        (
            [9.0, 12.0, 0.1],
            f"2 of 3 prompts look memorized{RATE}: prompt 1 scores 12, threshold 0.944, p = 0.05",
        ),
        (
            [math.nan, 0.5],
            f"none of 1 prompts looks memorized{RATE}; 1 undecided, since a prediction was NaN or infinite",
        ),
        ([math.nan, math.inf], "undecided: all of 2 prompts had a prediction that was NaN or infinite"),
    ],
)
def test_it_reads_as_a_sentence(scores, expected):
    assert str(detect(recorded(scores), calibrate(np.linspace(0, 1, 19)), fpr=0.1)) == expected


def test_too_few_calibration_prompts_are_an_error_before_anything_is_said():
    with pytest.raises(CalibrationError, match=r"5 calibration prompts cannot give a false-positive rate of 0.01; calibrate with at least 99"):
        detect(recorded([1.0]), calibrate(np.arange(5)))


def test_a_run_without_guidance_has_no_verdict():
    trace = Trace()
    trace.record(torch.ones(1, 4), None)
    with pytest.raises(NoGuidanceError, match="scale above 1"):
        detect(trace, calibrate(np.arange(99)))


def test_more_evaluations_than_there_are():
    with pytest.raises(memhook.MemhookError, match="first is 3; this trace has 2 evaluations"):
        detect(recorded([1.0], evaluations=2), calibrate(np.arange(99), first=3))


def test_false_positives_come_at_the_rate_that_was_asked_for():
    """From predictions to verdicts, with prompts that are exchangeable with the calibration's."""
    generator = torch.Generator().manual_seed(0)

    def prompts(count):
        trace = Trace()
        for _ in range(3):
            trace.record(*torch.randn(2, count, 16, generator=generator))
        return trace

    rates = [detect(prompts(100), calibrate(prompts(199)), fpr=0.05).memorized.mean() for _ in range(50)]
    assert 0.04 < np.mean(rates) < 0.06
