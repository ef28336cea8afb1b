"""Scores of one's own and published ones, computed while a run goes on."""

import pickle
import weakref
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch

import memhook
from memhook import Evaluation, MemhookError, NoGuidanceError, Trace
from memhook.capture.scoring import as_scored
from memhook.scores.dsm import Dsm
from memhook.scores.masked import MaskedMagnitude
from memhook.testing import sample, tiny_unet


@pytest.fixture
def unet():
    return tiny_unet()


def watched(unet, score, *, layout="uncond_first", keep="scalars", **options):
    with memhook.watch(unet, adapter=memhook.ModuleAdapter(unet, layout=layout), score=score, keep=keep) as trace:
        sample(unet, layout=layout, **options)
    return trace


def half(evaluation):
    return evaluation.pred_cond[:, :, :4].flatten(1).norm(dim=1)


@dataclass(frozen=True)
class Power:
    """A score with a parameter."""

    name: ClassVar[str] = "power"
    needs: ClassVar[str] = "pair"
    exponent: float = 2.0

    def __call__(self, evaluation):
        return (evaluation.pred_cond - evaluation.pred_uncond).abs().pow(self.exponent).flatten(1).sum(1)


@pytest.mark.parametrize("layout", ["uncond_first", "cond_first", "two_calls_uncond_first", "two_calls_cond_first"])
def test_a_function_is_computed_at_every_evaluation_beside_the_magnitude(unet, layout):
    trace = watched(unet, half, layout=layout, keep="calls")
    expected = torch.stack([half(evaluation) for evaluation in trace.evaluations]).numpy()
    np.testing.assert_allclose(trace.scores["half"], expected, rtol=1e-6)
    assert list(trace.scores) == ["half", "magnitude"]
    np.testing.assert_array_equal(trace.scores["magnitude"], trace.magnitudes)
    np.testing.assert_allclose(trace.score(2), expected[:2].mean(0), rtol=1e-6)


def test_dsm_agrees_with_its_formula_and_the_first_evaluation_has_none(unet):
    trace = watched(unet, Dsm(at=None), keep="calls")
    c = [evaluation.pred_cond.double() for evaluation in trace.evaluations]
    expected = [((c[k] - c[k - 1]) ** 2).sum(dim=(1, 2, 3)).numpy() for k in range(1, len(c))]
    assert np.isnan(trace.scores["dsm"][0]).all()
    np.testing.assert_allclose(trace.scores["dsm"][1:], expected, rtol=1e-5)
    assert trace.has_score("dsm").tolist() == [False, True, True, True]
    published = watched(unet, "dsm").scores["dsm"]
    np.testing.assert_array_equal(np.isfinite(published).all(1), [False, False, True, False])
    np.testing.assert_array_equal(published[2], trace.scores["dsm"][2])


def test_the_transition_point_agrees_with_its_formula(unet):
    trace = Trace(score="transition_point")
    runs = {"falls": [5, 4, 3, 2, 1], "early": [5, 4, 6, 3, 4], "late": [5, 4, 3, 2, 3], "flat": [5, 4, 4, 5, 6], "rises": [1, 2, 3, 4, 5]}
    for row in zip(*runs.values(), strict=True):
        values = torch.tensor(row, dtype=torch.float32)
        trace.record(values[:, None], torch.zeros(len(runs), 1))
    expected = []
    for m in runs.values():
        minima = [t for t in range(2, len(m)) if m[t] > m[t - 1] and m[t - 2] > m[t - 1]]
        expected.append([0.0 if minima and t >= minima[0] else 1.0 for t in range(len(m))])
    assert trace.scores["transition_point"].T.tolist() == expected
    assert [sum(run) for run in expected] == [5, 2, 4, 5, 5]


def test_dsm_needs_no_guidance(unet):
    trace = watched(unet, Dsm(at=1), guidance_scale=1.0, samples=3)
    assert np.isfinite(trace.scores["dsm"][1]).all()
    with pytest.raises(NoGuidanceError):
        trace.magnitudes  # noqa: B018


def test_the_masked_magnitude_agrees_with_its_formula(unet):
    mask = torch.rand(8, 8, generator=torch.Generator().manual_seed(1))
    trace = watched(unet, MaskedMagnitude(mask), keep="calls")
    for row, evaluation in zip(trace.scores["masked_magnitude"], trace.evaluations, strict=True):
        d = (evaluation.pred_cond - evaluation.pred_uncond).double()
        expected = ((d * mask) ** 2).sum(dim=(1, 2, 3)).sqrt() / mask.double().mean()
        np.testing.assert_allclose(row, expected, rtol=1e-5)
    ones = watched(unet, MaskedMagnitude(torch.ones(8, 8)))
    np.testing.assert_allclose(ones.scores["masked_magnitude"], ones.magnitudes, rtol=1e-6)


def test_several_scores_by_name_and_as_they_are_change_nothing_of_the_run(unet):
    plain = sample(unet)
    with memhook.watch(unet, adapter=memhook.ModuleAdapter(unet, layout="uncond_first"), score=["magnitude", "dsm", Power()]) as trace:
        assert torch.equal(plain, sample(unet))
    assert list(trace.scores) == ["magnitude", "dsm", "power"]
    assert trace.to_dict()["scores"].keys() == {"dsm", "power"}
    np.testing.assert_allclose(np.sqrt(trace.scores["power"]), trace.magnitudes, rtol=1e-5)
    part = trace.samples(slice(1, 2))
    np.testing.assert_array_equal(part.scores["power"], trace.scores["power"][:, 1:2])


def test_runs_in_one_block_do_not_reach_into_each_other(unet):
    with memhook.watch(unet, adapter=memhook.ModuleAdapter(unet, layout="uncond_first"), score=[Dsm(at=None)]) as trace:
        sample(unet)
        sample(unet, seed=1)
    assert np.isnan(trace.scores["dsm"]).all(1).tolist() == [True, False, False, False] * 2
    alone = watched(unet, Dsm(at=None), seed=1).scores["dsm"]
    np.testing.assert_array_equal(trace.runs[1].scores["dsm"], alone)
    with memhook.watch(unet, adapter=memhook.ModuleAdapter(unet, layout="uncond_first"), score="dsm") as trace:
        sample(unet)
        sample(unet, seed=1)
    with pytest.raises((MemhookError, NoGuidanceError), match="evaluation"):
        trace.runs[1].scores["dsm"]


def test_a_recorded_trace_computes_scores_too():
    trace = Trace(score=Power(1.0))
    trace.record(torch.full((2, 4, 8, 8), 2.0), torch.zeros(2, 4, 8, 8))
    assert trace.scores["power"].tolist() == [[512.0, 512.0]]


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda evaluation: evaluation, "one word"),
        (memhook.score(name="flat")(lambda e: e.pred_cond.norm()), r"'flat' gave a torch.float32 of shape \(\) for 2 samples"),
        (memhook.score(name="words")(lambda e: "much"), "gave a str for 2 samples"),
        (memhook.score(name="broken")(lambda e: 1 / 0), "'broken' failed at evaluation 0: ZeroDivisionError"),
        (memhook.score(name="far", needs="attention")(lambda e: e), "needs attention, which the adapter for module cannot give"),
        (memhook.score(name="odd", needs="luck")(lambda e: e), r"needs \['luck'\]; expected some of pair"),
        (memhook.score(name="magnitude")(lambda e: e), "memhook's own"),
        (Power, "the class Power; give an instance"),
        ("nosuch", "no score named 'nosuch'; installed are magnitude, dsm"),
        ([Power(), Power(3.0)], "power twice"),
        ([], "none"),
        (3, "a score is a int"),
    ],
)
def test_what_is_no_score_is_refused_by_name(unet, score, message):
    with pytest.raises(MemhookError, match=message):
        watched(unet, score)


def test_an_unknown_name_says_what_the_trace_has(unet):
    with pytest.raises(MemhookError, match=r"no score 'dsm'; it has magnitude\. Watch with score='dsm'"):
        watched(unet, None).scores["dsm"]


def test_parameters_of_a_tensor_are_its_values():
    first, other = torch.ones(8, 8), torch.ones(8, 8)
    assert as_scored(MaskedMagnitude(first)).describe() == as_scored(MaskedMagnitude(other)).describe()
    other[0, 0] = 2
    assert as_scored(MaskedMagnitude(first)).describe() != as_scored(MaskedMagnitude(other)).describe()
    assert as_scored(Power()).describe() == {"name": "power", "parameters": {"exponent": 2.0}}


def test_half_precision_is_computed_by_the_score_and_kept_in_float32():
    trace = Trace(score=half)
    ones = torch.ones(1, 4, 8, 8, dtype=torch.bfloat16)
    trace.add(Evaluation(ones, 0 * ones))
    assert trace.scores["half"].dtype == np.float32
    assert trace.scores["half"].tolist() == [[pytest.approx(128**0.5, rel=0.01)]]


def test_a_score_that_is_nan_is_no_clean_prompt(unet):
    bad = memhook.score(name="bad")(lambda evaluation: torch.full((2,), torch.nan))
    with pytest.raises(memhook.CalibrationError, match="or the score 'bad' is"):
        memhook.calibrate(watched(unet, bad), first=1)


def test_a_pickled_trace_has_its_scores_and_needs_none_of_their_code(unet):
    trace = watched(unet, [memhook.score(name="local")(lambda evaluation: 2 * half(evaluation)), Power(3.0)])
    again = pickle.loads(pickle.dumps(trace))  # noqa: S301 -- our own
    for name in ("local", "power", "magnitude"):
        np.testing.assert_array_equal(again.scores[name], trace.scores[name])
    assert again.scored("power").describe() == as_scored(Power(3.0)).describe()


def test_nothing_but_numbers_is_kept_after_the_block(unet):
    seen = []

    @memhook.score(needs="previous")
    def kept(evaluation, previous):
        seen.append(weakref.ref(previous.pred_cond))
        return previous.pred_cond.flatten(1).sum(1)

    watched(unet, kept)
    assert [reference() for reference in seen] == [None] * 3
