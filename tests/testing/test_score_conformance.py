"""The suite for scores passes those that are right, and finds each planted mistake."""

import pytest
import torch

import memhook
from memhook.scores.dsm import Dsm
from memhook.scores.masked import MaskedMagnitude
from memhook.testing import ScoreConformance, check_score
from memhook.testing.scores import CHECKS


class TestDsm(ScoreConformance):
    @pytest.fixture
    def score(self):
        return Dsm()


class TestMasked(ScoreConformance):
    @pytest.fixture
    def score(self):
        return MaskedMagnitude(torch.rand(8, 8, generator=torch.Generator().manual_seed(0)))


class TestSpectrum(ScoreConformance):
    @pytest.fixture
    def score(self):
        return memhook.CleanSpectrum(torch.ones(4, 8, 8), 1, "eps", 999.0)


@pytest.mark.parametrize("name", ["magnitude", "dsm", "transition_point"])
def test_every_offered_score_is_right(name):
    assert check_score(name) == [check.__name__ for check in CHECKS]


def test_a_history_is_handed_over():
    check_score(memhook.score(name="fall", needs=("pair", "history"))(lambda evaluation, history: history.amax(0) - history[-1]))


def batch_norm(evaluation):
    return (evaluation.pred_cond - evaluation.pred_uncond).norm().expand(len(evaluation.pred_cond))


def overflowing(evaluation):
    return (evaluation.pred_cond - evaluation.pred_uncond).square().flatten(1).sum(1)


def reading(evaluation):
    values = memhook.magnitude(evaluation.pred_cond, evaluation.pred_uncond)
    return values if float(values[0]) > 0 else -values


def in_place(evaluation):
    return evaluation.pred_cond.sub_(evaluation.pred_uncond).float().flatten(1).mean(1)


def random(evaluation):
    return torch.rand(len(evaluation.pred_cond))


def infinite(evaluation):
    return evaluation.pred_cond.float().flatten(1).sum(1) / 0


def one_sided(evaluation):
    return evaluation.pred_cond.float().flatten(1).norm(dim=1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (batch_norm, "in one batch and"),
        (overflowing, "float16 predictions"),
        (reading, "reads a tensor's numbers"),
        (in_place, "again|changes the predictions"),
        (random, "other numbers when asked again"),
        (infinite, "expected finite numbers"),
        (memhook.score(symmetric=True)(one_sided), "says that it is symmetric"),
    ],
)
def test_each_mistake_is_found(wrong, message):
    with pytest.raises(AssertionError, match=message):
        check_score(wrong)
