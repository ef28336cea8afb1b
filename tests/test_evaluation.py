"""ROC figures, against a plain comparison of all pairs."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memhook import MemhookError
from memhook.evaluation import roc_auc, tpr_at_fpr

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
