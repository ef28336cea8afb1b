"""The trace: recording by hand, scores, runs, groups, and what it says when something is missing."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import memhook
from memhook import Evaluation, GuidanceLayoutError, MemhookError, NoGuidanceError, Trace
from memhook.capture.trace import Row
from memhook.testing import sample


def recorded(levels, *, samples=2, unit="timestep", missing=()):
    """A trace of random predictions with these noise levels; None where there is none."""
    generator = torch.Generator().manual_seed(0)
    trace = Trace()
    for index, level in enumerate(levels):
        cond, uncond = torch.randn(2, samples, 4, 3, generator=generator)
        trace.record(cond, None if index in missing else uncond, **({} if level is None else {unit: level}))
    return trace


# ---- recording


@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 10**6))
def test_record_measures_each_evaluation(samples, evaluations, seed):
    pairs = torch.randn(evaluations, 2, samples, 3, 4, generator=torch.Generator().manual_seed(seed))
    trace = Trace()
    for cond, uncond in pairs:
        trace.record(cond, uncond)
    assert len(trace) == evaluations
    assert trace.magnitudes.shape == (evaluations, samples)
    assert trace.magnitudes.dtype == np.float32
    for row, (cond, uncond) in zip(trace.magnitudes, pairs, strict=True):
        np.testing.assert_array_equal(row, memhook.magnitude(cond, uncond))


def test_what_is_recorded_is_read_back():
    trace = Trace()
    trace.record(torch.ones(2, 4, 8, 8), torch.zeros(2, 4, 8, 8), space="v", timestep=999, sigma=14.6)
    trace.record(torch.ones(2, 4, 8, 8), torch.zeros(2, 4, 8, 8), space="v", timestep=torch.tensor([500, 500]), sigma=torch.tensor(0.5))
    assert (trace.host, trace.space, trace.roles, trace.shape) == ("record", "v", "declared", (4, 8, 8))
    assert trace.timesteps.tolist() == [999, 500]
    np.testing.assert_allclose(trace.sigmas, [14.6, 0.5])
    assert trace.magnitudes.tolist() == [[16, 16], [16, 16]]
    assert trace.groups.tolist() == [0, 1]
    assert trace.guidance_scale is None
    assert trace.setting == {"host": "record", "space": "v"}
    assert repr(trace) == "<Trace of record: 2 evaluations, 2 samples, space v>"


def test_unknown_noise_levels_are_nan():
    trace = recorded([None, None])
    assert np.isnan(trace.timesteps).all()
    assert np.isnan(trace.sigmas).all()


def test_reading_in_between_changes_nothing():
    levels = [900, 600, 300, 1]
    expected = recorded(levels).magnitudes
    trace = Trace()
    generator = torch.Generator().manual_seed(0)
    for index, level in enumerate(levels):
        trace.record(*torch.randn(2, 2, 4, 3, generator=generator), timestep=level)
        np.testing.assert_array_equal(trace.magnitudes, expected[: index + 1])


def test_what_is_read_can_be_changed_without_harm():
    trace = recorded([2, 1])
    before = trace.magnitudes
    trace.magnitudes[:] = -1
    np.testing.assert_array_equal(trace.magnitudes, before)


def test_a_host_that_counts_its_timestep_down_in_place():
    trace, timestep = Trace(), torch.tensor([900.0, 900.0])
    for _ in range(3):
        trace.record(torch.ones(2, 4), torch.zeros(2, 4), timestep=timestep, sigma=timestep)
        timestep -= 300
    assert trace.timesteps.tolist() == trace.sigmas.tolist() == [900, 600, 300]


def test_recording_needs_no_gradients_and_keeps_none():
    cond = torch.ones(2, 4, requires_grad=True)
    trace = Trace()
    trace.record(cond, torch.zeros(2, 4))
    assert trace.magnitudes.tolist() == [[2, 2]]


@pytest.mark.parametrize(
    ("space", "message"),
    [("noise", "space is 'noise'; expected one of eps, v, x0, flow"), ("v", "magnitudes in the space 'eps'; an evaluation in 'v' cannot be added")],
)
def test_spaces_do_not_mix(space, message):
    trace = recorded([2])
    with pytest.raises(MemhookError, match=message):
        trace.record(torch.ones(2, 4), torch.zeros(2, 4), space=space)
    assert len(trace) == 1


def test_wrong_shapes_are_refused_and_not_recorded():
    trace = Trace()
    with pytest.raises(MemhookError, match=r"\(2, 4\).*\(2, 5\)"):
        trace.record(torch.ones(2, 4), torch.ones(2, 5))
    assert len(trace) == 0


# ---- missing predictions


def test_a_missing_prediction_is_nan_and_never_zero():
    trace = recorded([4, 3, 2, 1], missing={1, 3})
    assert np.isnan(trace.magnitudes).all(axis=1).tolist() == [False, True, False, True]
    assert trace.has_guidance.tolist() == [True, False, True, False]
    np.testing.assert_allclose(trace.score(), trace.magnitudes[[0, 2]].mean(axis=0))
    np.testing.assert_array_equal(trace.score(first=2), trace.magnitudes[0])


def test_a_nan_prediction_is_not_missing():
    trace = recorded([2, 1])
    trace.record(torch.full((2, 4, 3), math.nan), torch.zeros(2, 4, 3), timestep=0)
    assert trace.has_guidance.all()
    assert np.isnan(trace.score()).all()
    assert np.isfinite(trace.score(first=2)).all()


def test_nothing_recorded():
    with pytest.raises(NoGuidanceError, match=r"nothing was recorded.*inside the `with` block.*another thread"):
        _ = Trace().magnitudes
    assert Trace().shape is None
    assert Trace().roles is None
    assert Trace().runs == []
    assert "empty" in repr(Trace())


def test_no_unconditional_prediction_at_all():
    with pytest.raises(NoGuidanceError, match=r"no evaluation had an unconditional prediction.*scale above 1"):
        recorded([2, 1], missing={0, 1}).score()


def test_the_hosts_reason_is_shown():
    trace = recorded([1], missing={0})
    trace.missing("this model is distilled; use the undistilled one")
    with pytest.raises(NoGuidanceError, match="this model is distilled; use the undistilled one"):
        _ = trace.magnitudes


def test_none_among_the_first():
    with pytest.raises(NoGuidanceError, match=r"none of the first 2 evaluations.*first=None uses all"):
        recorded([3, 2, 1], missing={0, 1}).score(first=2)


# ---- scores


@given(st.integers(1, 8), st.data())
def test_the_score_is_the_mean_over_the_first_evaluations(evaluations, data):
    trace = recorded(range(evaluations, 0, -1))
    first = data.draw(st.one_of(st.none(), st.integers(1, evaluations)))
    expected = trace.magnitudes[:first].astype(np.float64).mean(axis=0)
    assert trace.score(first=first).dtype == np.float32
    np.testing.assert_allclose(trace.score(first=first), expected, rtol=1e-6)


@pytest.mark.parametrize("first", [0, -1, 4])
def test_first_has_to_be_at_hand(first):
    with pytest.raises(MemhookError, match=f"first is {first}; this trace has 3 evaluations, so expected 1 to 3, or None for all"):
        recorded([3, 2, 1]).score(first=first)


# ---- runs


def karras(steps, top=14.6, bottom=0.03):
    return [(top ** (1 / 7) + i / (steps - 1) * (bottom ** (1 / 7) - top ** (1 / 7))) ** 7 for i in range(steps)]


def heun(levels):
    return [level for pair in pairwise(levels) for level in pair]


def churned(levels):
    """Heun with the largest churn: every first level of a pair is raised by a factor of sqrt(2)."""
    return [level * (2**0.5 if index % 2 == 0 else 1) for index, level in enumerate(heun(levels))]


RUNS = {
    "ddim": [*range(981, 0, -20)],
    "leading, few steps": [901, 801, 701, 601, 501, 401, 301, 201, 101, 1],
    "image to image": [300, 200, 100, 1],
    "one step": [999],
    "two steps": [999, 499],
    "plms": [981, 961, 961, *range(941, 0, -20)],
    "heun": [999, *heun([979, 800, 600, 400, 200, 1])],
    "sigmas": karras(10),
    "churn": churned(karras(10)),
    "time rising": [0.0, 0.1, 0.25, 0.5, 0.75, 0.9],
}


@pytest.mark.parametrize("name", RUNS)
def test_one_run_is_one_run(name):
    trace = recorded(RUNS[name], unit="sigma" if name in ("sigmas", "churn") else "timestep")
    assert len(trace.runs) == 1
    assert trace.score().shape == (2,)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("count", [2, 3])
def test_repeated_runs_are_told_apart(name, count):
    trace = recorded(RUNS[name] * count, unit="sigma" if name in ("sigmas", "churn") else "timestep")
    assert [len(run) for run in trace.runs] == [len(RUNS[name])] * count
    np.testing.assert_array_equal(np.concatenate([run.magnitudes for run in trace.runs]), trace.magnitudes)


@given(
    st.lists(
        st.sampled_from([name for name in RUNS if name not in ("sigmas", "churn", "time rising", "one step", "two steps")]), min_size=1, max_size=4
    )
)
def test_runs_of_different_schedules_are_told_apart(names):
    """Also where a later run begins below the first one: fewer steps, or image to image."""
    trace = recorded([level for name in names for level in RUNS[name]])
    assert [len(run) for run in trace.runs] == [len(RUNS[name]) for name in names]


def test_a_score_over_several_runs_is_refused():
    with pytest.raises(MemhookError, match=r"holds 2 runs of the sampler; score each of trace\.runs"):
        recorded(RUNS["ddim"] * 2).score()


def test_runs_of_different_batches():
    trace = recorded([None, None], samples=2)
    trace.record(torch.ones(3, 4, 3), torch.zeros(3, 4, 3))
    with pytest.raises(MemhookError, match=r"\[2, 3\] samples, so they are several runs; read trace\.runs"):
        _ = trace.magnitudes
    assert [run.magnitudes.shape for run in trace.runs] == [(2, 2), (1, 3)]


def test_a_run_knows_what_the_trace_knows(unet, watched):
    with memhook.watch(unet, adapter=memhook.ModuleAdapter(unet, layout="uncond_first", space="v"), keep="calls") as trace:
        for seed in (1, 2):
            sample(unet, steps=3, seed=seed)
    for run, seed in zip(trace.runs, (1, 2), strict=True):
        np.testing.assert_array_equal(run.magnitudes, watched(unet, steps=3, seed=seed).magnitudes)
        assert (run.host, run.space, run.roles, run.shape) == ("module", "v", "declared", (4, 8, 8))
        assert run.setting == trace.setting
        assert len(run.evaluations) == 3


# ---- faults that a row can carry


def add(trace, **row):
    trace.add(Evaluation(torch.ones(2, 4), None), Row(torch.ones(2), **row))


def test_different_noisy_samples_are_an_error_whenever_they_are_read():
    trace = Trace()
    add(trace, same_inputs=torch.tensor([True, True]))
    assert trace.magnitudes.shape == (1, 2)
    add(trace, same_inputs=torch.tensor([True, False]))
    for _ in range(2):
        with pytest.raises(GuidanceLayoutError, match="different noisy samples"):
            _ = trace.magnitudes


def test_a_refuted_row_raises_its_message_whenever_it_is_read():
    trace = Trace()
    add(trace, refuted=(torch.tensor(False), "not this"))
    assert trace.magnitudes.shape == (1, 2)
    add(trace, refuted=(torch.tensor(True), "the call was something else"))
    for _ in range(2):
        with pytest.raises(GuidanceLayoutError, match="the call was something else"):
            _ = trace.magnitudes


# ---- steps


def test_evaluations_are_numbered_by_step():
    """A second-order sampler calls back after the first evaluation of each step; the others of a step follow."""
    trace = recorded([14, 9])
    assert (trace.steps == -1).all()
    for step, level in enumerate([8, 4]):
        trace.record(*torch.randn(2, 2, 4), timestep=level)
        trace.number_step(step)
        trace.record(*torch.randn(2, 2, 4), timestep=level / 1.5)
    assert trace.steps.tolist() == [[-1, -1], [-1, -1], [0, 0], [0, 1], [1, 0], [1, 1]]


def test_steps_that_are_reported_when_they_are_over():
    trace = recorded([8, 7, 6])
    trace.number_step(0, evaluations=3)
    trace.record(*torch.randn(2, 2, 4), timestep=5)
    trace.record(*torch.randn(2, 2, 4), timestep=4)
    trace.number_step(1, evaluations=2)
    trace.record(*torch.randn(2, 2, 4), timestep=3)  # nobody says to which step it belongs
    assert trace.steps.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [-1, -1]]


def test_a_run_without_numbers_does_not_go_on_with_those_of_the_run_before():
    trace = recorded([8])
    trace.number_step(0)
    for level in (4, 8, 4):
        trace.record(*torch.randn(2, 2, 4), timestep=level)
    assert trace.steps.tolist() == [[0, 0], [0, 1], [-1, -1], [-1, -1]]


def test_a_step_that_is_tried_again_is_no_new_run():
    """Adaptive samplers go back to a higher noise level where they reject a step."""
    for continues, runs in ((False, 2), (True, 1)):
        trace = Trace()
        for level in (14.0, 5.0, 14.0, 9.0):
            row = Row(torch.ones(2), sigma=level, continues=continues and level == 14.0 and len(trace) > 0)
            trace.add(Evaluation(torch.ones(2, 3), torch.ones(2, 3), sigma=level), row)
        assert len(trace.runs) == runs


# ---- to_dict


@given(st.integers(1, 3), st.integers(1, 4), st.sets(st.integers(1, 3)))
def test_to_dict_is_json_and_tells_everything(samples, evaluations, missing):
    trace = recorded(range(evaluations, 0, -1), samples=samples, missing=missing)
    found = json.loads(json.dumps(trace.to_dict(), allow_nan=False))
    magnitudes = np.array(found["magnitudes"], dtype=np.float32)  # None reads as NaN
    np.testing.assert_array_equal(magnitudes, trace.magnitudes)
    assert found["timesteps"] == trace.timesteps.tolist()
    assert found["sigmas"] == [None] * evaluations
    assert found["groups"] == list(range(samples))
    assert (found["host"], found["space"], found["roles"], found["guidance_scale"]) == ("record", "eps", "declared", None)


def test_to_dict_of_infinities_is_json():
    trace = Trace()
    trace.record(torch.full((1, 4), math.inf), torch.zeros(1, 4), timestep=1)
    assert json.loads(json.dumps(trace.to_dict(), allow_nan=False))["magnitudes"] == [[None]]


def test_samples_are_a_trace_of_some_of_the_samples():
    trace = Trace()
    for level in (900, 500):
        trace.record(torch.full((4, 2), float(level)) * torch.arange(1, 5)[:, None], torch.zeros(4, 2), timestep=level)
    part = trace.samples(slice(1, 3))
    assert np.array_equal(part.magnitudes, trace.magnitudes[:, 1:3])
    assert np.array_equal(part.timesteps, trace.timesteps)
    assert part.roles == trace.roles
    assert len(part.groups) == 2


@pytest.mark.parametrize("clean_first", [True, False])
def test_a_time_for_every_token(clean_first):
    """Tokens that are given have a low time that stands still; that of the others says how far the run is."""
    trace = memhook.Trace()
    for level in (900.0, 500.0, 100.0):
        times = torch.tensor([[0.0, level, level], [0.0, 7.0, 7.0]])
        trace.record(torch.ones(2, 4), torch.zeros(2, 4), timestep=times if clean_first else times.flip(1))
    assert trace.timesteps.tolist() == [900, 500, 100]
    assert len(trace.runs) == 1
