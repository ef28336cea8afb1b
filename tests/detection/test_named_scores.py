"""Calibrations of scores other than the magnitude: judged by the same score, and by no other."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch

import memhook
from memhook import Calibration, CalibrationMismatchError, MemhookError, plugins
from memhook.scores.dsm import Dsm
from memhook.testing import sample, tiny_unet


@dataclass(frozen=True)
class Power:
    name: ClassVar[str] = "power"
    exponent: float = 2.0

    def __call__(self, evaluation):
        return (evaluation.pred_cond - evaluation.pred_uncond).abs().pow(self.exponent).flatten(1).sum(1)


@pytest.fixture
def unet():
    return tiny_unet()


@pytest.fixture
def offered():
    class Plugin:
        @memhook.hookimpl
        def memhook_scores(self):
            return [Power()]

    plugin = Plugin()
    plugins.register(plugin, name="powers")
    yield
    plugins.unregister(plugin)


def watched(unet, score, seed, **options):
    with memhook.watch(unet, adapter=memhook.ModuleAdapter(unet, layout="uncond_first"), score=score) as trace:
        sample(unet, samples=1, seed=seed, **options)
    return trace


def calibrated(unet, score, *, first=None):
    return memhook.calibrate([watched(unet, score, seed) for seed in range(20)], first=first)


def test_the_calibration_is_of_the_score_and_judges_it(unet, tmp_path):
    known = calibrated(unet, Dsm(at=None), first=3)
    traces = [watched(unet, Dsm(at=None), seed) for seed in range(20)]
    expected = [trace.scores["dsm"][1:3].mean() for trace in traces]
    np.testing.assert_allclose(known.scores, expected, rtol=1e-6)
    known.save(tmp_path / "dsm.safetensors")
    again = Calibration.load(tmp_path / "dsm.safetensors")
    assert again.score == {"name": "dsm", "parameters": {"at": None}}
    found = memhook.detect(watched(unet, Dsm(at=None), 50), again, fpr=0.1)
    assert found.statistic == "mean dsm"
    np.testing.assert_allclose(found.scores, watched(unet, Dsm(at=None), 50).scores["dsm"][1:3].mean(0), rtol=1e-6)


def test_another_score_or_another_parameter_is_an_error(unet):
    known = calibrated(unet, Power(2.0))
    with pytest.raises(CalibrationMismatchError, match="is of the score 'power', and this run was watched with magnitude"):
        memhook.detect(watched(unet, None, 50), known, fpr=0.1)
    with pytest.raises(CalibrationMismatchError, match=r"differs in score: .*2\.0.*3\.0"):
        memhook.detect(watched(unet, Power(3.0), 50), known, fpr=0.1)
    with pytest.raises(memhook.CalibrationError, match="no score 'dsm'"):
        memhook.calibrate([watched(unet, None, 0)], score="dsm")


def test_one_of_the_magnitude_judges_a_run_watched_with_more(unet):
    known = calibrated(unet, None)
    assert known.score == {"name": "magnitude", "parameters": {}}
    assert "score" not in known.setting
    more = memhook.detect(watched(unet, Power(), 50), known, fpr=0.1)
    np.testing.assert_array_equal(more.scores, memhook.detect(watched(unet, None, 50), known, fpr=0.1).scores)


def test_a_stop_rule_looks_where_the_score_has_a_value(unet):
    rule = memhook.stop_rule(calibrated(unet, Dsm(at=None)), fpr=0.2)
    assert rule.looks.tolist() == [2, 3, 4]
    found = rule.judge(watched(unet, Dsm(at=None), 50))
    assert np.isfinite(found.scores).all()


def test_a_guard_computes_the_score_that_the_calibration_names(unet, offered):
    known = calibrated(unet, Power(3.0), first=1)
    adapter = memhook.ModuleAdapter(unet, layout="uncond_first")
    with memhook.guard(unet, known, fpr=0.1, action="warn", adapter=adapter) as guard:
        sample(unet, samples=1, seed=3)
    np.testing.assert_array_equal(guard.detection.scores, watched(unet, Power(3.0), 3).scores["power"][0])
    with pytest.raises(MemhookError, match="give target_magnitude"), memhook.guard(unet, known, fpr=0.1, adapter=adapter):
        pass


def test_a_guard_takes_a_score_that_its_name_does_not_make(unet):
    known = calibrated(unet, Power(3.0), first=1)
    adapter = memhook.ModuleAdapter(unet, layout="uncond_first")
    with pytest.raises(MemhookError, match="no score named 'power'"), memhook.guard(unet, known, fpr=0.1, action="warn", adapter=adapter):
        pass
    unlike = pytest.raises(CalibrationMismatchError, match="is of the score 'power'")
    with unlike, memhook.guard(unet, known, fpr=0.1, action="warn", adapter=adapter, score=Power(2.0)):
        pass
    with memhook.guard(unet, known, fpr=0.1, action="warn", adapter=adapter, score=Power(3.0)) as guard:
        sample(unet, samples=1, seed=3)
    assert guard.detection is not None


def test_a_spectrum_is_a_score(unet):
    def first(seed):
        adapter = memhook.ModuleAdapter(unet, layout="uncond_first")
        return memhook.probe(unet, lambda: sample(unet, samples=1, seed=seed), adapter=adapter).evaluations[0]

    spectrum = memhook.CleanSpectrum.fit(first(seed) for seed in range(30, 34))
    known = calibrated(unet, spectrum, first=1)
    trace = watched(unet, spectrum, 50)
    np.testing.assert_array_equal(trace.scores["whitened"][0], spectrum.magnitude(first(50)).numpy())
    assert trace.has_score("whitened").tolist() == [True, False, False, False]
    memhook.detect(trace, known, fpr=0.1)
    other = memhook.CleanSpectrum.fit(first(seed) for seed in range(34, 38))
    with pytest.raises(CalibrationMismatchError, match="differs in score"):
        memhook.detect(watched(unet, other, 50), known, fpr=0.1)


def test_two_plugins_with_one_name_are_both_named(unet, offered):
    class Other:
        @memhook.hookimpl
        def memhook_scores(self):
            return [Power(5.0)]

    plugin = Other()
    plugins.register(plugin, name="others")
    try:
        with pytest.raises(MemhookError, match="'others' and 'powers' each have a score named 'power'"):
            watched(unet, "power", 0)
        assert watched(unet, "dsm", 0).scores["dsm"].shape == (4, 1)
    finally:
        plugins.unregister(plugin)


def test_a_plugin_that_fails_to_offer_hurts_no_other(unet):
    class Failing:
        @memhook.hookimpl
        def memhook_scores(self):
            raise AttributeError("no such thing")

    plugin = Failing()
    plugins.register(plugin, name="failing")
    try:
        with pytest.warns(UserWarning, match="plugin 'failing' are left out: memhook_scores failed with AttributeError"):
            assert watched(unet, "dsm", 0).scores["dsm"].shape == (4, 1)
    finally:
        plugins.unregister(plugin)


def test_whatever_else_a_guard_is_asked_predictions_need_a_finite_score(unet):
    bad = memhook.score(name="bad")(lambda evaluation: evaluation.pred_cond.flatten(1).sum(1) * torch.nan)
    trace = watched(unet, bad, 0)
    found = memhook.detect(trace, memhook.calibrate(np.arange(1.0, 21.0)), fpr=0.1)
    assert found.undecided.all()
