"""ROC figures, against a plain comparison of all pairs."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics

from memhook import MemhookError
from memhook.evaluation import roc
from memhook.evaluation.roc import roc_auc, tpr_at_fpr

scores = st.lists(st.one_of(st.integers(0, 6).map(float), st.floats(-10, 10)), min_size=1, max_size=30)


@given(scores, scores)
def test_auc_is_the_share_of_pairs_in_order(memorized, clean):
    pairs = [(m > c) + 0.5 * (m == c) for m in memorized for c in clean]
    assert roc_auc(memorized, clean) == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)


@given(scores, scores, st.sampled_from([0.01, 0.05, 0.1, 0.25, 0.5, 1.0]))
def test_tpr_is_the_best_of_all_thresholds_with_a_smaller_rate(memorized, clean, fpr):
    best = 0.0
    for threshold in [*memorized, *clean, math.inf]:
        if sum(c >= threshold for c in clean) / len(clean) < fpr:
            best = max(best, sum(m >= threshold for m in memorized) / len(memorized))
    assert tpr_at_fpr(memorized, clean, fpr=fpr) == pytest.approx(best, abs=1e-12)


@given(scores, scores)
def test_swapping_the_classes_mirrors_the_auc(memorized, clean):
    assert roc_auc(memorized, clean) + roc_auc(clean, memorized) == pytest.approx(1)


def test_separated_classes():
    assert roc_auc([3, 4], [1, 2]) == 1
    assert tpr_at_fpr([3, 4], [1, 2]) == 1
    assert roc_auc([1, 1], [1, 1]) == 0.5
    assert tpr_at_fpr([1, 2], [3, 4]) == 0


@pytest.mark.parametrize("measure", [roc_auc, tpr_at_fpr])
@pytest.mark.parametrize(
    ("memorized", "clean", "message"),
    [
        ([], [1.0], r"the memorized scores have shape \(0,\); expected a vector of at least one score"),
        ([1.0], [], "the clean scores"),
        ([[1.0]], [1.0], r"memorized scores have shape \(1, 1\)"),
        (1.0, [1.0], r"memorized scores have shape \(\)"),
        ([1.0, math.nan], [1.0], r"1 of the 2 memorized scores are not finite \(the first is number 1\).*undecided"),
        ([1.0], [math.inf, 1.0], r"1 of the 2 clean scores are not finite \(the first is number 0\)"),
    ],
)
def test_wrong_scores_are_named(measure, memorized, clean, message):
    with pytest.raises(MemhookError, match=message):
        measure(memorized, clean)


@pytest.mark.parametrize("fpr", [0, -0.1, 1.1, math.nan])
def test_rates_are_rates(fpr):
    with pytest.raises(MemhookError, match=r"fpr is .*; expected a rate above 0 and at most 1"):
        tpr_at_fpr([1.0], [0.0], fpr=fpr)


@given(scores, scores, st.sampled_from([0.01, 0.1, 0.25, 0.5, 1.0]), st.integers(0, 99))
def test_figures_of_a_resample_are_those_of_the_repeated_scores(memorized, clean, fpr, seed):
    rng = np.random.default_rng(seed)
    drawn, drawn_clean = (rng.multinomial(len(x), np.full(len(x), 1 / len(x)), size=3) for x in (memorized, clean))
    found = roc._weighted_figures(np.array(memorized), np.array(clean), drawn, drawn_clean, fpr)
    for row, m, c in zip(found, drawn, drawn_clean, strict=True):
        repeated, repeated_clean = np.repeat(memorized, m), np.repeat(clean, c)
        assert row == pytest.approx([roc_auc(repeated, repeated_clean), tpr_at_fpr(repeated, repeated_clean, fpr=fpr)], abs=1e-12)


@given(scores, scores)
def test_the_curve_is_that_of_scikit_learn_and_has_the_area(memorized, clean):
    curve = roc.roc_curve(memorized, clean)
    assert metrics.auc(curve.fpr, curve.tpr) == pytest.approx(roc_auc(memorized, clean), abs=1e-12)
    for threshold, rate, hits in zip(curve.thresholds, curve.fpr, curve.tpr, strict=True):
        assert rate == pytest.approx(np.mean(np.array(clean) >= threshold))
        assert hits == pytest.approx(np.mean(np.array(memorized) >= threshold))


def test_intervals_hold_the_true_auc_about_as_often_as_they_say():
    rng = np.random.default_rng(3)
    truth, held = 0.5 * (1 + math.erf(1 / 2)), 0  # P(N(1,1) > N(0,1)) = Phi(1 / sqrt 2)
    for number in range(100):
        interval = roc.evaluate(rng.normal(1, 1, 60), rng.normal(0, 1, 80), resamples=300, seed=number, confidence=0.9).auc
        held += interval.low <= truth <= interval.high
    assert 0.8 <= held / 100 <= 0.98


def test_near_duplicates_widen_the_interval():
    rng = np.random.default_rng(0)
    clean, originals = rng.normal(0, 1, 300), rng.normal(1, 1, 30)
    copies, families = np.repeat(originals, 10), np.repeat([str(i) for i in range(30)], 10)
    blind = roc.evaluate(copies, clean).auc
    aware = roc.evaluate(copies, clean, memorized_families=families).auc
    assert aware.value == blind.value
    assert aware.high - aware.low > 2 * (blind.high - blind.low)
    assert roc.one_per_family(families).tolist() == list(range(0, 300, 10))


def test_several_tries_are_averaged():
    rng = np.random.default_rng(0)
    memorized, clean = rng.normal(1, 1, (4, 20)), rng.normal(0, 1, (4, 50))
    found = roc.evaluate(memorized, clean, fpr=0.1)
    assert found.auc.value == pytest.approx(np.mean([roc_auc(m, c) for m, c in zip(memorized, clean, strict=True)]))
    assert found.tpr.low <= found.tpr.value <= found.tpr.high
    assert (found.memorized, found.clean) == (20, 50)
    assert roc.evaluate(memorized, clean, fpr=0.1) == found  # the seed decides


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"memorized_families": ["a"]}, "2 memorized prompts and 1 families"),
        ({"clean_families": ["a", "b"]}, "3 clean prompts and 2 families"),
        ({"confidence": 1.0}, "confidence is 1.0"),
        ({"resamples": 0}, "resamples 0"),
    ],
)
def test_what_cannot_be_resampled_says_why(arguments, message):
    with pytest.raises(MemhookError, match=message):
        roc.evaluate([1.0, 2.0], [0.0, 1.0, 3.0], **arguments)
    with pytest.raises(MemhookError, match="as many tries of both"):
        roc.evaluate([[1.0], [2.0]], [[1.0]])
